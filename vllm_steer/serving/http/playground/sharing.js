// The settings in the address, behind "#", which a browser does not send to the server.

const FIELDS = { max_tokens: "max-tokens", temperature: "temperature", seed: "seed" };

/** `french:5,german:dynamic:2`, as a request may write it too. */
function steerText(rows) {
  return rows
    .map((row) => [row.id, row.value()])
    .filter(([, value]) => value !== null)
    .map(([name, value]) => (isDynamic(value) ? `${name}:dynamic:${value.max}` : `${name}:${value}`))
    .join(",");
}

function fragmentOf(rows) {
  const parts = new URLSearchParams({
    prompt: byId("prompt").value,
    api: byId("chat").checked ? "chat" : "completion",
    model: byId("model").value,
    steer: steerText(rows),
  });
  for (const [name, id] of Object.entries(FIELDS)) {
    if (byId(id).value !== "") parts.set(name, byId(id).value);
  }
  return `#${parts}`;
}

function keepInAddress(rows) {
  history.replaceState(null, "", fragmentOf(rows));
}

/** The fragment's settings, as far as they are valid; `steer` is null where it says none. */
function settingsInAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { parts, steer: parts.has("steer") ? steersIn(parts.get("steer")) : null };
}

/** By name the value of a request; a part that cannot be read is left out. */
function steersIn(text) {
  const steers = new Map();
  for (const part of text.split(",")) {
    const [name, strength, most] = part.split(":");
    if (strength === "dynamic" && isNumber(most)) {
      steers.set(name, { strength, max: Number(most) });
    } else if (isNumber(strength) && most === undefined) {
      steers.set(name, Number(strength));
    }
  }
  return steers;
}

const isNumber = (text) => Boolean(text?.trim()) && Number.isFinite(Number(text));

function restoreFields({ parts }) {
  if (parts.has("prompt")) byId("prompt").value = parts.get("prompt");
  for (const [name, id] of Object.entries(FIELDS)) {
    if (isNumber(parts.get(name))) byId(id).value = parts.get(name);
    else if (parts.size) byId(id).value = byId(id).defaultValue;
  }
  const model = parts.get("model");
  if ([...byId("model").options].some((option) => option.value === model)) {
    byId("model").value = model;
  }
}
