// The request that the settings stand for: the page sends it, and shows it to copy.

const CHAT = "v1/chat/completions";
const COMPLETION = "v1/completions";

const isDynamic = (value) => typeof value === "object" && value !== null;

/** The steers that are on, by name, as the field `steer` has them; "none" without one. */
function steerOf(rows) {
  const on = rows.map((row) => [row.id, row.value()]).filter(([, value]) => value !== null);
  return on.length ? Object.fromEntries(on) : "none";
}

/** Path and body of the steered request; `steer` is what `steerOf` gives. */
function requestOf(settings, steer) {
  const { model, prompt, isChat, maxTokens, temperature, seed } = settings;
  const strengths = steer !== "none" && Object.values(steer).some(isDynamic);
  const body = {
    model,
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: maxTokens,
    temperature,
    ...(seed !== null && { seed }),
    stream: true,
    steer,
    ...(strengths && { steer_strengths: true }),
  };
  return { path: isChat ? CHAT : COMPLETION, body };
}

/** The JSON that is sent: `body` on lines of its own. */
const jsonOf = (body) => JSON.stringify(body, null, 2);

function readSettings() {
  const seed = byId("seed").valueAsNumber;
  return {
    model: byId("model").value,
    prompt: byId("prompt").value,
    isChat: byId("chat").checked,
    maxTokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    seed: Number.isFinite(seed) ? seed : null,
  };
}
