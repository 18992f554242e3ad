// Server-sent events over fetch: EventSource can neither POST nor show an API key.

// Yields {event, data} until the stream ends. Raises Refused for an answer that is not a stream.
export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function* events(url, options) {
  const answer = await fetch(url, options);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, told?.error?.message ?? `The router answered ${answer.status}.`, told?.error?.code);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const blocks = held.split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        let event = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
          else if (line.startsWith("event:")) event = line.slice(6).trim();
        }
        if (data.length) yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const headers = (key) => (key ? { authorization: `Bearer ${key}` } : {});
