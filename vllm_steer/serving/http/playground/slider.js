// A slider with a number field: the number is the value, the slider shows it within its range.

const STEPS_OF_A_HALF = 50;

/** The largest of 1, 2, 5 times a power of ten that divides `reach` into at least 50 steps. */
function stepFor(reach) {
  const most = reach / STEPS_OF_A_HALF;
  const power = 10 ** Math.floor(Math.log10(most) + 1e-9);
  const factor = [5, 2, 1].find((each) => each * power <= most * (1 + 1e-9));
  return Number((factor * power).toPrecision(1));
}

function makeSlider({ id, label, lowest, reach, limit, onChange }) {
  const range = element("input", { type: "range", id, "aria-labelledby": `${id}-name` });
  const number = element("input", {
    type: "number",
    step: "any",
    inputMode: "decimal",
    "aria-label": `${label}, as a number`,
  });
  if (limit !== null) {
    number.min = -limit;
    number.max = limit;
  }
  let value = 0;
  let furthest = reach;

  function show() {
    furthest = limit ?? Math.max(reach, Math.abs(value));
    const step = stepFor(furthest);
    const first = lowest < 0 ? -furthest : 0;
    Object.assign(range, { min: first, max: furthest, step, value });
    const share = (at) => (Math.min(Math.max(at, first), furthest) - first) / (furthest - first);
    range.style.setProperty("--from", `${100 * share(Math.min(0, value))}%`);
    range.style.setProperty("--to", `${100 * share(Math.max(0, value))}%`);
    return { first, furthest, share };
  }

  function set(next, { keepText = false } = {}) {
    value = Number(short(next));
    const shown = show();
    if (!keepText) number.value = short(value);
    onChange(value, shown);
  }

  range.addEventListener("input", () => {
    const step = Number(range.step);
    const edge = Math.abs(range.valueAsNumber) >= furthest;
    set(edge ? range.valueAsNumber : Math.round(range.valueAsNumber / step) * step);
  });
  number.addEventListener("input", () => {
    if (Number.isFinite(number.valueAsNumber)) set(number.valueAsNumber, { keepText: true });
  });
  number.addEventListener("change", () => set(value));
  return { range, number, set, value: () => value };
}
