// The two answers, written as they arrive and read out in sentences.

const SPOKEN_AFTER_MS = 3000;

/** Reads text out politely: at most every three seconds, and what is left at the end. */
function makeAnnouncer(region) {
  let waiting = "";
  let last = 0;
  return {
    begin(text) {
      waiting = "";
      last = Date.now();
      region.textContent = text;
    },
    add(text) {
      waiting += text;
      if (Date.now() - last < SPOKEN_AFTER_MS || !/[.!?;:\n]\s*$/.test(waiting)) return;
      this.flush();
    },
    flush(closing = "") {
      region.textContent = `${waiting} ${closing}`;
      waiting = "";
      last = Date.now();
    },
  };
}

const silent = { begin() {}, add() {}, flush() {} };

/** An answer in an element: `write(request, ...)` streams into it until it ends or is stopped. */
function makeAnswer(box, label, announcer = silent) {
  const text = element("div", { className: "text", tabIndex: 0, role: "group", "aria-label": label });
  const status = element("p", { className: "status", textContent: "No answer yet" });
  const header = element("p", { className: "steer-header" });
  box.replaceChildren(text, element("footer", {}, status, header));
  let stopping = null;

  /** Streams the answer to a request; errors are thrown, a stop is not one. */
  async function write({ path, body }, shading) {
    stopping?.abort();
    const stop = (stopping = new AbortController());
    const started = performance.now();
    const ended = (how) => {
      if (stopping !== stop) return; // a newer request has this place
      stopping = null;
      box.classList.remove("busy");
      text.removeAttribute("aria-busy");
      status.textContent = `${how}, ${((performance.now() - started) / 1000).toFixed(1)} s`;
      announcer.flush(how);
    };
    box.classList.add("busy");
    text.setAttribute("aria-busy", "true");
    status.textContent = "Waiting for the server";
    header.textContent = "";
    text.replaceChildren(
      ...(body.prompt ? [element("span", { className: "prompt", textContent: body.prompt })] : []));
    announcer.begin(`${label} answer:`);
    try {
      const response = await ask(path, { body: jsonOf(body), signal: stop.signal });
      const steers = response.headers.get("X-Steer");
      if (steers) header.textContent = `X-Steer: ${steers}`;
      ended(await receive(response, shading, stop.signal));
    } catch (error) {
      if (error.name === "AbortError") return ended("Stopped");
      ended("Failed");
      throw error;
    }
  }

  /** Adds each event's text; returns how the answer ended. */
  async function receive(response, shading, signal) {
    let how = "Ended";
    let held = {};
    for await (const event of eventsOf(response)) {
      if (signal.aborted) throw new DOMException("stopped", "AbortError");
      const piece = pieceOf(event);
      status.textContent = "Writing";
      held = joined(held, piece.strengths);
      if (piece.reasoning) add(piece.reasoning, "reasoning");
      if (piece.text) {
        const span = add(piece.text, "token");
        if (shading?.names.length) shading.add(span, held);
        held = {};
      }
      if (piece.ended) how = endings[piece.ended] ?? `Ended (${piece.ended})`;
    }
    return how;
  }

  function add(piece, className) {
    const span = element("span", { className, textContent: piece });
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
    text.append(span);
    if (atEnd) text.scrollTop = text.scrollHeight;
    announcer.add(piece);
    return span;
  }

  return { write, stop: () => stopping?.abort(), isWriting: () => stopping !== null };
}

const endings = { stop: "Complete", length: "Stopped at max tokens" };

/** Strengths of tokens whose text comes with a later event are shown there. */
function joined(held, strengths) {
  const names = new Set([...Object.keys(held), ...Object.keys(strengths)]);
  return Object.fromEntries(
    [...names].map((name) => [name, [...(held[name] ?? []), ...(strengths[name] ?? [])]]));
}
