// What a page lacks for a reader of screens or a user of a keyboard; each problem is a text.
() => {
  const problems = [];
  const visible = (node) => node.checkVisibility({ visibilityProperty: true });
  const say = (node, what) => problems.push(`${node.outerHTML.slice(0, 90)}: ${what}`);

  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  if (new Set(ids).size !== ids.length) problems.push("an id is used twice");
  for (const name of ["aria-labelledby", "aria-controls", "aria-describedby", "for"]) {
    for (const node of document.querySelectorAll(`[${name}]`)) {
      for (const id of node.getAttribute(name).split(" ")) {
        if (!document.getElementById(id)) say(node, `${name} names ${id}, which is not there`);
      }
    }
  }

  for (const node of document.querySelectorAll("[tabindex]")) {
    if (node.tabIndex > 0) say(node, "a tabindex above 0 changes the order");
  }
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(visible)
    .map((node) => Number(node.tagName[1]));
  levels.reduce((last, level) => {
    if (level > last + 1) problems.push(`heading ${level} follows heading ${last}`);
    return level;
  }, 0);
  if (levels.filter((level) => level === 1).length !== 1) problems.push("not one h1");
  for (const [selector, count] of [["main", 1], ["header", 1], ["html[lang]", 1]]) {
    if (document.querySelectorAll(selector).length < count) problems.push(`no ${selector}`);
  }

  const controls = "button, input, select, textarea, summary, a[href]";
  for (const node of [...document.querySelectorAll(controls)].filter(visible)) {
    const target = node.closest("label") ?? node;
    const box = target.getBoundingClientRect();
    if (box.bottom < 0) continue; // the skip link, until it has the focus
    if (box.width < 24 || box.height < 24) {
      say(node, `is ${box.width.toFixed(0)} x ${box.height.toFixed(0)}`);
    }
  }

  const channels = (text) => {
    const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
    return { rgb: [red, green, blue], alpha };
  };
  const luminance = (rgb) => {
    const [red, green, blue] = rgb.map((value) => value / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const groundOf = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const { rgb, alpha } = channels(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const skipped = node.closest("script, style, noscript, .hidden, :disabled");
    if (!texts.currentNode.data.trim() || skipped || !visible(node)) continue;
    const pair = [channels(getComputedStyle(node).color).rgb, groundOf(node)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) say(node, `contrast ${ratio.toFixed(2)}`);
  }
  return problems;
}
