// Requests to the server that sent this page. Keys live in two input fields and nowhere else.

const BASE = new URL(".", location.origin + location.pathname);
const addressOf = (path) => new URL(path, BASE).href;

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const apiKey = () => byId("api-key").value.trim();

function headersFor(key, hasBody) {
  return {
    ...(hasBody && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
}

/** The response to a request; `ServerError` in the server's own words if it is not a success. */
async function ask(path, { body, key = apiKey(), signal } = {}) {
  const response = await fetch(addressOf(path), {
    method: body === undefined ? "GET" : "POST",
    headers: headersFor(key, body !== undefined),
    body,
    signal,
    cache: "no-store",
  }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  let message = text;
  try {
    message = wordsOf(JSON.parse(text)) ?? text;
  } catch {
    // The body is no JSON: its text is the message.
  }
  return new ServerError(message || `HTTP ${response.status}`, response.status);
}

/** The message of an error body: OpenAI's form, vLLM's for a wrong key, or FastAPI's. */
function wordsOf(data) {
  const words = data?.error?.message ?? data?.error ?? data?.message ?? data?.detail;
  return words === undefined || typeof words === "string" ? words : JSON.stringify(words);
}

const getJson = async (path) => (await ask(path)).json();

const listSteers = () => getJson("v1/steers");

/** The served models, without the names `BASE:preset`. */
async function listModels(presets) {
  const names = (await getJson("v1/models")).data.map((model) => model.id);
  const ofPresets = new Set(names.flatMap((name) => presets.map((preset) => `${name}:${preset}`)));
  return names.filter((name) => !ofPresets.has(name));
}

/** Whether a model has a chat template, by a request that generates nothing; null: not known. */
async function hasChatTemplate(model) {
  const messages = [{ role: "user", content: "Hello" }];
  try {
    await ask("tokenize", { body: JSON.stringify({ model, messages }) });
    return true;
  } catch (error) {
    return error.status === 400 ? false : null;
  }
}
