// Dynamic strengths of an answer's tokens: a shade with a line, a title, and a table.

const LEVELS = 5;
const LARGEST_SHARE = "";

/** From 0 (nothing was added) to 5 (the maximum). */
const levelOf = (share) => Math.ceil(Math.min(share, 1) * LEVELS - 1e-9);

function titleOf(strengths) {
  return Object.entries(strengths)
    .map(([name, values]) => `${name} ${values.map((value) => value.toFixed(2)).join(", ")}`)
    .join("\n");
}

/** The shading of one answer; `maxima` has the largest strength of each dynamic steer. */
function makeShading(maxima) {
  const names = Object.keys(maxima);
  const tokens = [];
  const choice = byId("shaded");
  choice.replaceChildren(
    ...(names.length > 1
      ? [element("option", { value: LARGEST_SHARE, textContent: "the strongest steer" })] : []),
    ...names.map((name) => element("option", { value: name, textContent: name })),
  );
  const head = element("tr", {}, element("th", { textContent: "Token", scope: "col" }),
    ...names.map((name) => element("th", { textContent: name, scope: "col" })));
  const body = element("tbody");
  byId("strength-table").replaceChildren(element("thead", {}, head), body);
  byId("shading").hidden = names.length === 0;

  function shareOf(strengths) {
    const shown = choice.value === LARGEST_SHARE ? names : [choice.value];
    const shares = shown.flatMap((name) =>
      (strengths[name] ?? []).map((value) => Math.abs(value / maxima[name])));
    return Math.max(0, ...shares);
  }

  function shade({ span, strengths }) {
    span.className = `token level-${levelOf(shareOf(strengths))}`;
  }

  function add(span, strengths) {
    const token = { span, strengths };
    tokens.push(token);
    span.title = titleOf(strengths);
    shade(token);
    body.append(element("tr", {},
      element("th", { textContent: span.textContent.replaceAll("\n", "\u21b5"), scope: "row" }),
      ...names.map((name) => element("td", {
        textContent: (strengths[name] ?? []).map((value) => value.toFixed(2)).join(", "),
      }))));
  }

  function showScale() {
    const most = choice.value === LARGEST_SHARE ? null : Math.abs(maxima[choice.value]);
    const text = (level) => (most === null
      ? `${(100 * level) / LEVELS} %` : short((most * level) / LEVELS));
    byId("scale").replaceChildren(...Array.from({ length: LEVELS + 1 }, (_, level) =>
      element("span", { className: `level-${level}`, textContent: text(level) })));
    byId("scale").setAttribute("aria-label",
      `Shades from ${text(0)} to ${text(LEVELS)}${most === null ? " of the maximum" : ""}`);
  }

  choice.onchange = () => {
    tokens.forEach(shade);
    showScale();
  };
  if (names.length) showScale();
  return { add, names };
}
