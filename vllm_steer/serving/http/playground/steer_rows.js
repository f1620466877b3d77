// One row per steer and preset: a slider with its number, the default, and dynamic strength.

const KINDS = {
  lm_steer: "LM-Steer",
  vector: "vector",
  delta: "step delta",
  low_rank: "low-rank map",
  sae: "SAE feature",
};
const DYNAMIC_MAXIMUM = 2; // the server's own default
const PRESET_REACH = 2;

const layersText = (layers) => `${/[-,]/.test(layers) ? "layers" : "layer"} ${layers}`;

function factsOf(entry) {
  if (entry.object === "preset") {
    return Object.entries(entry.steers).map(([name, mix]) => `${name} ${mixText(mix)}`).join(", ");
  }
  const facts = [KINDS[entry.kind] ?? entry.kind, `at ${entry.site}`];
  if (entry.layers) facts.push(layersText(entry.layers));
  if (entry.mode) facts.push(entry.mode);
  if (entry.limit != null) facts.push(`limit ${short(entry.limit)}`);
  if (entry.source === "runtime") facts.push("loaded while serving");
  return facts.join(", ");
}

const mixText = (mix) =>
  typeof mix === "object"
    ? Object.values(mix).map((value) => (typeof value === "object" ? JSON.stringify(value) : value)).join(" ")
    : String(mix).replaceAll(":", " ");

/** The row of a steer or preset. `onChange` is called after each change by the user. */
function makeRow(entry, index, { onChange, onUnload }) {
  const isPreset = entry.object === "preset";
  const standard = isPreset ? 1 : entry.default_strength;
  const id = `${entry.object}-${index}`;
  const dynamic = element("input", { type: "checkbox", id: `${id}-dynamic` });
  const unit = element("span", { textContent: isPreset ? "factor" : "" });
  const least = element("span", { "aria-hidden": "true" });
  const most = element("span", { "aria-hidden": "true" });
  const ticks = [0, standard].map(() => element("span", { className: "tick" }));
  const row = element("li", { className: "row off" });
  let quiet = true;

  const slider = makeSlider({
    id,
    label: entry.id,
    lowest: isPreset ? 0 : -1,
    reach: isPreset ? PRESET_REACH : 2 * Math.abs(standard) || 1,
    limit: entry.limit ?? null,
    onChange: show,
  });
  const name = isPreset
    ? element("button", { type: "button", className: "pressable", textContent: entry.id })
    : element("label", { className: "name", textContent: entry.id, for: id });
  name.id = `${id}-name`;

  function show(value, { first, furthest, share }) {
    row.classList.toggle("off", value === 0);
    unit.textContent = dynamic.checked ? "at most" : isPreset ? "factor" : "";
    const state = value === 0 ? "off" : short(value);
    slider.range.setAttribute("aria-valuetext", dynamic.checked ? `at most ${state}` : state);
    if (isPreset) name.setAttribute("aria-pressed", String(value !== 0));
    reset.disabled = value === 0 && !dynamic.checked;
    least.textContent = short(first);
    most.textContent = short(furthest);
    ticks.forEach((tick, at) => tick.style.setProperty("left", positionOf(share([0, standard][at]))));
    if (!quiet) onChange();
  }

  const normal = element("button", {
    type: "button",
    className: "quiet",
    textContent: `Default ${short(standard)}`,
    "aria-label": `${entry.id}: default ${short(standard)}`,
  });
  const reset = element("button", {
    type: "button",
    className: "quiet",
    textContent: "Reset",
    "aria-label": `Reset ${entry.id}`,
  });
  normal.addEventListener("click", () => {
    dynamic.checked = false;
    slider.set(standard);
  });
  reset.addEventListener("click", () => {
    dynamic.checked = false;
    slider.set(0);
    slider.range.focus(); // the button is disabled now
  });
  name.addEventListener("click", () => {
    if (isPreset) slider.set(slider.value() === 0 ? 1 : 0);
  });
  dynamic.addEventListener("change", () => {
    const maximum = Math.min(DYNAMIC_MAXIMUM, entry.limit ?? DYNAMIC_MAXIMUM);
    slider.set(dynamic.checked && slider.value() === 0 ? maximum : slider.value());
  });

  const more = element("div", { className: "more" });
  if (!isPreset) {
    const label = element("label", {}, dynamic, "Dynamic");
    label.append(element("span", { className: "hidden", textContent: ` strength of ${entry.id}` }));
    more.append(label, normal, reset);
  }
  if (entry.source === "runtime") more.append(unloadButton(entry.id, onUnload));
  row.append(
    element("span", { className: "named" },
      name, element("span", { className: "note", textContent: factsOf(entry) })),
    element("span", { className: "value" }, unit, slider.number),
    element("div", { className: "track" },
      least, element("div", {}, slider.range, ...ticks), most),
    more,
  );
  slider.set(0);
  quiet = false;

  return {
    id: entry.id,
    row,
    /** What the request says of this steer; null if it is off. */
    value() {
      const strength = slider.value();
      if (strength === 0) return null;
      return dynamic.checked ? { strength: "dynamic", max: strength } : strength;
    },
    /** Set a value of a request, or null, without a call of `onChange`. */
    restore(value) {
      quiet = true;
      dynamic.checked = !isPreset && typeof value === "object" && value !== null;
      slider.set(dynamic.checked ? value.max : (value ?? 0));
      quiet = false;
    },
  };
}

/** The middle of the thumb at a share of the track, which it never leaves. */
const positionOf = (share) => `calc(0.5625rem + (100% - 1.125rem) * ${share})`;

function unloadButton(name, onUnload) {
  const button = element("button", {
    type: "button",
    className: "quiet",
    textContent: "Unload",
    "aria-label": `Unload ${name}`,
  });
  button.addEventListener("click", () => onUnload(name));
  return button;
}
