// The page: reads the lists, and connects settings, answers and samples.

const announcer = makeAnnouncer(byId("announced"));
const answers = {
  unsteered: makeAnswer(byId("unsteered"), "Unsteered"),
  steered: makeAnswer(byId("steered"), "Steered", announcer),
};
const showSamples = makeSamples();
const loading = makeLoading({ onDone: readSteers, report });
let rows = [];
let asked = null; // the JSON of the request that was answered last
let isStarted = false; // before that the settings in the address are not read yet

function report(message) {
  byId("problem").textContent = message;
}

const currentRequest = () => requestOf(readSettings(), steerOf(rows));

/** Show what the settings stand for now. */
function update() {
  const request = currentRequest();
  showSamples(request);
  if (isStarted) keepInAddress(rows);
  byId("changed").hidden = asked === null || asked === jsonOf(request.body);
  byId("copied").textContent = "";
}

const askAgain = after(400, () => {
  const isNew = asked !== null && asked !== jsonOf(currentRequest().body);
  if (isNew && byId("follow").checked && byId("ask").checkValidity()) generate(["steered"]);
});

function strengthChanged() {
  update();
  askAgain();
}

function maximaIn(steer) {
  if (steer === "none") return {};
  const dynamic = Object.entries(steer).filter(([, value]) => isDynamic(value));
  return Object.fromEntries(dynamic.map(([name, value]) => [name, value.max]));
}

/** Ask for the answers of these names and wait for their ends; errors are shown. */
async function generate(names) {
  const steered = currentRequest();
  const { steer_strengths, ...plain } = steered.body;
  const unsteered = { path: steered.path, body: { ...plain, steer: "none" } };
  asked = jsonOf(steered.body);
  report("");
  update();
  byId("stop").disabled = false;
  const writing = names.map((name) => (name === "steered"
    ? answers.steered.write(steered, makeShading(maximaIn(steered.body.steer)))
    : answers.unsteered.write(unsteered)));
  const results = await Promise.allSettled(writing);
  const messages = results.filter((result) => result.status === "rejected")
    .map((result) => result.reason.message);
  if (messages.length) report([...new Set(messages)].join("\n"));
  if (!Object.values(answers).some((answer) => answer.isWriting())) disableStop();
}

function disableStop() {
  if (document.activeElement === byId("stop")) byId("generate").focus();
  byId("stop").disabled = true;
}

/** Read the list of steers again; strengths of steers that are still there are kept. */
async function readSteers() {
  const before = new Map(rows.map((row) => [row.id, row.value()]));
  const { data: listed, runtime } = await listSteers();
  const data = listed.filter((entry) => entry.kind !== "condition"); // they take no strength
  const make = (entry, index) =>
    makeRow(entry, index, { onChange: strengthChanged, onUnload: loading.unload });
  rows = data.map(make);
  rows.forEach((row) => row.restore(before.get(row.id) ?? null));
  const isPreset = (row, index) => data[index].object === "preset";
  const presets = rows.filter(isPreset);
  const steers = rows.filter((row, index) => !isPreset(row, index));
  byId("presets").replaceChildren(...presets.map((row) => row.row));
  byId("steers").replaceChildren(...steers.map((row) => row.row));
  byId("preset-list").hidden = presets.length === 0;
  byId("list-status").textContent = steers.length ? "" : "This server has no steers.";
  loading.enable(runtime === true);
  update();
  return presets.map((row) => row.id);
}

async function readModel(isChosen) {
  const has = await hasChatTemplate(byId("model").value);
  byId("chat").disabled = has === false;
  byId("no-chat").hidden = has !== false;
  if (has === false) byId("completion").checked = true;
  else if (has && !isChosen) byId("chat").checked = true;
  update();
}

function restoreRows(steer) {
  if (steer !== null) rows.forEach((row) => row.restore(steer.get(row.id) ?? null));
}

function restoreApi(parts) {
  const api = parts.get("api");
  if (api === "chat" || api === "completion") byId(api).checked = true;
  return parts.has("api");
}

/** Read steers and models from the server, and the settings from the address. */
async function start() {
  const address = settingsInAddress();
  byId("list-status").textContent = "Reading the list of steers";
  try {
    const presets = await readSteers();
    const models = await listModels(presets);
    byId("model").replaceChildren(
      ...models.map((name) => element("option", { value: name, textContent: name })));
  } catch (error) {
    byId("list-status").textContent = "The list of steers could not be read.";
    if (error.status === 401) byId("connection").open = true;
    return report(error.message);
  }
  report("");
  restoreFields(address);
  restoreRows(address.steer);
  isStarted = true;
  await readModel(restoreApi(address.parts));
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate(["unsteered", "steered"]);
  const isBelow = byId("answers").getBoundingClientRect().top > innerHeight / 2;
  if (isBelow) byId("answers").scrollIntoView({ behavior: scrolling() });
});
const scrolling = () =>
  (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => {
  Object.values(answers).forEach((answer) => answer.stop());
});
byId("all-off").addEventListener("click", () => {
  rows.forEach((row) => row.restore(null));
  strengthChanged();
});
byId("ask").addEventListener("input", update);
byId("model").addEventListener("change", () => readModel(false));
byId("api-key").addEventListener("input", update);
byId("api-key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") start();
});
byId("connect").addEventListener("click", start);
byId("copy-link").addEventListener("click", () => {
  keepInAddress(rows);
  copy(location.href, "Copied the link.");
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("answers").focus();
});
addEventListener("hashchange", start);
start();
