// The request as curl, Python and JSON. A key is never part of them.

const KEY_VARIABLE = "VLLM_API_KEY";
const OF_OPENAI = ["model", "messages", "prompt", "max_tokens", "temperature", "seed", "stream"];

/** A text as one word of a shell. */
const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl({ path, body }, hasKey) {
  return [
    `curl -sS --no-buffer ${shellWord(addressOf(path))}`,
    "  -H 'Content-Type: application/json'",
    ...(hasKey ? [`  -H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    `  -d ${shellWord(jsonOf(body))}`,
  ].join(" \\\n");
}

/** A JSON value as a Python literal. JSON's texts and numbers are Python's too. */
function pythonOf(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(pythonOf).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, each]) => `${pythonOf(key)}: ${pythonOf(each)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}

function asPython({ path, body }, hasKey) {
  const known = Object.entries(body).filter(([name]) => OF_OPENAI.includes(name));
  const extra = Object.fromEntries(
    Object.entries(body).filter(([name]) => !OF_OPENAI.includes(name)));
  const key = hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"';
  const isChat = path === CHAT;
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(addressOf("v1"))}, api_key=${key})`,
    `chunks = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...known.map(([name, value]) => `    ${name}=${pythonOf(value)},`),
    `    extra_body=${pythonOf(extra)},`,
    ")",
    "for chunk in chunks:",
    `    print(chunk.choices[0].${isChat ? 'delta.content or ""' : "text"}, end="", flush=True)`,
    "print()",
  ].join("\n");
}

const SAMPLES = {
  curl: asCurl,
  python: asPython,
  json: ({ body }) => jsonOf(body),
};

/** Tabs that show one of the three, chosen by click or arrow keys; returns `show(request)`. */
function makeSamples() {
  const names = Object.keys(SAMPLES);
  const tabs = names.map((name) => byId(`tab-${name}`));
  let chosen = 0;
  let request = null;

  function show(next = request) {
    request = next;
    if (request === null) return;
    byId("code").textContent = SAMPLES[names[chosen]](request, apiKey() !== "");
    byId("code").setAttribute("aria-labelledby", tabs[chosen].id);
    const withKey = apiKey() && names[chosen] !== "json"
      ? ` The API key is not copied: put it into the environment variable ${KEY_VARIABLE}.` : "";
    byId("code-note").textContent =
      `POST ${addressOf(request.path)}, as this page sends it.${withKey}`;
    tabs.forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(index === chosen));
      tab.tabIndex = index === chosen ? 0 : -1;
    });
  }

  function choose(index) {
    chosen = (index + tabs.length) % tabs.length;
    show();
  }

  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => choose(index));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      choose(index + step);
      tabs[chosen].focus();
    });
  });
  byId("copy").addEventListener("click", () => copy(byId("code").textContent, "Copied."));
  return show;
}

/** Copy a text; without a clipboard, as on a page without TLS, by the browser's old command. */
async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { value: text, className: "hidden" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    if (!copied) done = "The browser does not allow copying; select the text and copy it.";
  }
  byId("copied").textContent = done;
}
