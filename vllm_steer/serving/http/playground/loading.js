// Steer files: loaded from a file that is chosen or dropped, where the server allows it.

/** The name of a steer from that of its file: without the ending, and the characters it may have. */
function steerNameOf(fileName) {
  const name = fileName.replace(/\.[^.]*$/, "").replaceAll(/[^A-Za-z0-9_.-]+/g, "-");
  return name.replace(/^[^A-Za-z0-9]+/, "") || "steer";
}

function base64Of(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new ServerError(`${file.name} cannot be read`, 0));
    reader.readAsDataURL(file);
  });
}

/** Buttons and drop target; `onDone` reads the list again, `report` shows an error. */
function makeLoading({ onDone, report }) {
  let enabled = false;
  const status = byId("load-status");

  async function change(path, data, doing, done) {
    status.textContent = doing;
    report("");
    try {
      await ask(path, { body: JSON.stringify(data), key: byId("load-key").value.trim() });
      status.textContent = done;
      await onDone();
    } catch (error) {
      status.textContent = "";
      report(error.message);
    }
  }

  async function load(file) {
    const name = steerNameOf(file.name);
    try {
      const data = { steer_name: name, steer_data: await base64Of(file) };
      await change("v1/load_steer", data, `Loading ${name}`, `Loaded ${name}.`);
    } catch (error) {
      report(error.message);
    }
  }

  const unload = (name) =>
    change("v1/unload_steer", { steer_name: name }, `Unloading ${name}`, `Unloaded ${name}.`);

  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async () => {
    const [file] = byId("file").files;
    if (file) await load(file);
    byId("file").value = "";
  });
  const hasFile = (event) => enabled && event.dataTransfer?.types.includes("Files");
  const mark = (is) => document.body.classList.toggle("dropping", is);
  document.addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) mark(false);
  });
  document.addEventListener("drop", async (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    mark(false);
    for (const file of event.dataTransfer.files) await load(file);
  });

  return {
    unload,
    enable(is) {
      enabled = is;
      byId("load").hidden = !is;
    },
  };
}
