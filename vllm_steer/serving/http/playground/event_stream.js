// Server-sent events of a streamed answer.

/** The JSON data of each event until `[DONE]` or the end of the stream. */
async function* eventsOf(response) {
  let rest = "";
  for await (const text of textsOf(response.body)) {
    const lines = (rest + text).split(/\r\n|\n|\r/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function* textsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // already ended, or aborted
  }
}

/** What one event adds to the answer: text, thinking, strengths per steer, and how it ended. */
function pieceOf(event) {
  if (event.error) throw new ServerError(wordsOf(event), 0);
  const choice = event.choices?.[0];
  if (!choice) return { text: "", reasoning: "", strengths: {}, ended: null };
  const delta = choice.delta ?? {};
  return {
    text: choice.text ?? delta.content ?? "",
    reasoning: delta.reasoning ?? delta.reasoning_content ?? "",
    strengths: choice.steer_strengths ?? {},
    ended: choice.finish_reason ?? null,
  };
}
