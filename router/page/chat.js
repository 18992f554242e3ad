// The playground: one conversation with the router it is served by, and for each answer where its time went.

import { count, el, ms, percent } from "./format.js";
import { phaseClass } from "./requests.js";
import { state } from "./state.js";
import { Refused, events, headers } from "./stream.js";

const EXAMPLE_TOOL = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather at a place",
      parameters: { type: "object", properties: { place: { type: "string" }, unit: { enum: ["celsius", "fahrenheit"] } }, required: ["place"] },
    },
  },
];

const get = (id) => document.getElementById(id);

export class Chat {
  // `onRequest(id)` is told the id of each request as soon as it is known.
  constructor(onRequest) {
    this._onRequest = onRequest;
    this._messages = [];
    this._leave = null; // aborts the answer that is being streamed
    this._live = null;
    this._talk = get("talk");
    get("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this._leave) this.stop();
      else this._say();
    });
    get("message").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this._leave) this._say();
      }
    });
    get("clear").addEventListener("click", () => {
      this.clear();
      get("message").focus({ preventScroll: true });
    });
    get("example-tool").addEventListener("click", () => {
      get("tools").value = JSON.stringify(EXAMPLE_TOOL, null, 1);
    });
    this.clear();
    this.loadModels();
  }

  async loadModels() {
    try {
      const answer = await fetch("/v1/models", { headers: headers(this.key()) });
      const { data = [] } = await answer.json();
      if (data.length) get("model").replaceChildren(...data.map(({ id }) => el("option", { value: id }, id)));
    } catch {
      // The stream says that the router is away; the next conversation asks again.
    }
  }

  key() {
    return get("key").value.trim();
  }

  clear() {
    this.stop();
    this._messages = [];
    const mark = el("img", { src: "/page/mark.svg", alt: "", class: "eclipse" });
    this._talk.replaceChildren(el("div", { class: "empty" }, mark, el("p", {}, "Ask something, and see on the left which workers answer and where the time goes.")));
    if (!get("model").options.length) this.loadModels();
  }

  stop() {
    this._leave?.abort();
  }

  // What the fleet's stream says of the answer in progress, drawn under it.
  update() {
    this._live?.refresh();
  }

  _say() {
    const text = get("message").value.trim();
    if (!text) return;
    const tools = this._tools();
    if (tools === null) return;
    get("message").value = "";
    this._talk.querySelector(".empty")?.remove();
    this._messages.push({ role: "user", content: text });
    this._talk.append(el("div", { class: "said user" }, text));
    this._answer(tools);
  }

  _tools() {
    const text = get("tools").value.trim();
    if (!text) return undefined;
    try {
      const tools = JSON.parse(text);
      if (!Array.isArray(tools)) throw new Error("it is not a list");
      return tools;
    } catch (error) {
      this._note(`The tools do not parse: ${error.message}`);
      get("options").open = true;
      get("tools").focus();
      return null;
    }
  }

  _note(text) {
    get("composer-note").textContent = text;
  }

  _body(tools) {
    const system = get("system").value.trim();
    const body = {
      model: get("model").value || undefined,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this._messages],
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: Number(get("max-tokens").value) || undefined,
      temperature: Number(get("temperature").value),
      thinking: { type: get("thinking").value },
      return_progress: true,
      return_timeline: true,
    };
    if (get("effort").value) body.reasoning_effort = get("effort").value;
    if (tools) {
      body.tools = tools;
      body.tool_choice = get("tool-choice").value;
    }
    return body;
  }

  async _answer(tools) {
    const leave = (this._leave = new AbortController());
    const view = (this._live = new AnswerView((call, result) => this._give(call, result, tools)));
    this._talk.append(view.node);
    get("send").textContent = "Stop";
    this._note("");
    const stuck = () => this._talk.scrollHeight - this._talk.scrollTop - this._talk.clientHeight < 60;
    try {
      const options = {
        method: "POST",
        headers: { "content-type": "application/json", ...headers(this.key()) },
        body: JSON.stringify(this._body(tools)),
        signal: leave.signal,
      };
      let closed = false;
      for await (const { event, data } of events("/v1/chat/completions", options)) {
        if (data === "[DONE]") {
          closed = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (event === "error" || chunk.error) throw new Refused(200, chunk.error?.message ?? "The answer broke off.", chunk.error?.code);
        const follow = stuck();
        view.take(chunk);
        if (view.id && !view.told) {
          view.told = true;
          this._onRequest(view.id);
        }
        if (follow) this._talk.scrollTop = this._talk.scrollHeight;
      }
      view.end(closed ? "" : "The answer broke off before its end.");
    } catch (error) {
      view.end(leave.signal.aborted ? "Stopped." : error.message, !leave.signal.aborted);
    } finally {
      this._messages.push(view.message());
      this._leave = null;
      get("send").textContent = "Send";
      this._talk.scrollTop = this._talk.scrollHeight;
      setTimeout(() => view.refresh(), 1500); // the fleet's stream tells of the end a tick later
    }
  }

  _give(call, result, tools) {
    this._messages.push({ role: "tool", tool_call_id: call.id, content: result });
    // The model goes on once every call of its message has a result.
    const asked = [...this._messages].reverse().find((message) => message.tool_calls)?.tool_calls ?? [];
    const given = new Set(this._messages.filter((message) => message.role === "tool").map((message) => message.tool_call_id));
    if (asked.every(({ id }) => given.has(id))) this._answer(tools);
  }
}

class AnswerView {
  constructor(give) {
    this._give = give;
    this._sent = performance.now();
    this._first = null;
    this._last = null;
    this._content = "";
    this._reasoning = "";
    this._calls = [];
    this._usage = null;
    this._finish = "";
    this._progress = null;
    this._over = false;
    this.id = null;
    this.told = false;
    this._thought = el("div");
    this._thinking = el("details", { class: "reasoning", open: true, hidden: true }, el("summary", {}, "Reasoning"), this._thought);
    this._text = el("div", { class: "text streaming" });
    this._tools = el("div", { hidden: true });
    this._track = el("div", { class: "track", role: "img" });
    this._facts = el("div", { class: "facts" });
    this._error = el("div", { class: "failed", role: "alert", hidden: true });
    this.node = el("div", { class: "said assistant" }, this._thinking, this._text, this._tools, this._error, el("div", { class: "timeline" }, this._track, this._facts));
    this._timer = setInterval(() => this.refresh(), 200);
    this.refresh();
  }

  take(chunk) {
    if (chunk.id && !this.id) this.id = chunk.id.replace(/^chatcmpl-/, "");
    if (chunk.prompt_progress) this._progress = chunk.prompt_progress;
    if (chunk.usage) this._usage = chunk.usage;
    for (const choice of chunk.choices ?? []) {
      const delta = choice.delta ?? {};
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        this._first ??= performance.now();
        this._last = performance.now();
      }
      if (delta.reasoning_content) {
        this._reasoning += delta.reasoning_content;
        this._thinking.hidden = false;
        this._thought.append(delta.reasoning_content);
        this._thought.scrollTop = this._thought.scrollHeight;
      }
      if (delta.content) {
        this._content += delta.content;
        this._text.append(delta.content);
      }
      for (const part of delta.tool_calls ?? []) this._call(part);
      if (choice.finish_reason) this._finish = choice.finish_reason;
    }
  }

  _call(part) {
    let call = this._calls[part.index ?? 0];
    if (!call) {
      const text = el("div", { class: "mono" });
      const name = el("div", { class: "call" });
      call = this._calls[part.index ?? 0] = { id: "", name: "", text: "", nodes: { name, text }, card: el("div", { class: "tool" }, name, text) };
      this._tools.hidden = false;
      this._tools.append(call.card);
    }
    if (part.id) call.id = part.id;
    if (part.function?.name) {
      call.name += part.function.name;
      call.nodes.name.textContent = `calls ${call.name}`;
    }
    if (part.function?.arguments) {
      call.text += part.function.arguments;
      call.nodes.text.append(part.function.arguments);
    }
  }

  end(words, failed = false) {
    this._over = true;
    this._last ??= performance.now();
    clearInterval(this._timer);
    this._text.classList.remove("streaming");
    this._thinking.open = !this._content && !this._calls.length;
    if (words) {
      this._error.textContent = words;
      this._error.hidden = false;
      this._error.classList.toggle("failed", failed);
    }
    for (const call of this._calls) {
      if (call) this._ask(call);
    }
    this.refresh();
  }

  _ask(call) {
    const result = el("textarea", { rows: 2, placeholder: "What the tool answers", "aria-label": `Result of ${call.name}` });
    const send = el("button", { type: "button" }, "Give the result");
    send.addEventListener("click", () => {
      send.disabled = result.readOnly = true;
      this._give(call, result.value);
    });
    call.card.append(result, send);
  }

  message() {
    const message = { role: "assistant", content: this._content };
    const calls = this._calls.filter((call) => call?.id);
    if (calls.length) message.tool_calls = calls.map(({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text } }));
    if (calls.length && this._reasoning) message.reasoning_content = this._reasoning;
    return message;
  }

  // The parts of the answer's time: as the router tells them with the answer or in the fleet's stream, else as they look
  // from here.
  _parts() {
    const told = this._usage?.timeline;
    if (told?.ttft_ms) {
      const parts = Object.entries(told).filter(([name, value]) => name.endsWith("_ms") && name !== "ttft_ms" && value >= 0.05);
      return parts.map(([name, value]) => [name.slice(0, -3), value]);
    }
    const request = state.requests.get(this.id) ?? state.finished.find((one) => one.request_id === this.id);
    if (request?.phases?.length) {
      const end = request.ended_s ?? (this._over ? null : (performance.now() - this._sent) / 1000);
      const parts = request.phases.map(([name, starts], index) => {
        const until = index + 1 < request.phases.length ? request.phases[index + 1][1] : Math.max(starts, end ?? starts);
        return [name, (until - starts) * 1000];
      });
      return parts;
    }
    const now = this._over ? this._last : performance.now();
    const parts = [["waiting", (this._first ?? now) - this._sent]];
    if (this._first) parts.push(["answer", now - this._first]);
    return parts;
  }

  refresh() {
    const parts = this._parts();
    const whole = parts.reduce((sum, [, length]) => sum + Math.max(0, length), 0) || 1;
    this._track.replaceChildren(
      ...parts.map(([name, length]) => {
        const part = el("span", { class: `part ${phaseClass(name)}`, title: `${name.replaceAll("_", " ")} ${ms(length)}` });
        part.style.width = `${(100 * Math.max(0, length)) / whole}%`;
        return part;
      }),
    );
    this._track.setAttribute("aria-label", parts.map(([name, length]) => `${name.replaceAll("_", " ")} ${ms(length)}`).join(", "));
    const facts = [];
    const fact = (name, value) => facts.push(el("span", {}, name, " ", el("b", {}, value)));
    if (!this._first && !this._over) {
      const { total, processed = 0, cache = 0, eta_ms: left } = this._progress ?? {};
      if (total) {
        fact("prompt", `${percent(processed / total)} of ${count(total)} tokens${cache ? `, ${count(cache)} cached` : ""}`);
        if (left) fact("left", ms(left));
      } else fact("waiting", ms(performance.now() - this._sent));
    }
    if (this._first) fact("first token", ms(this._usage?.timeline?.ttft_ms ?? this._first - this._sent));
    const usage = this._usage;
    if (usage) {
      const { prompt_tokens: prompt, completion_tokens: tokens } = usage;
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      const thought = usage.completion_tokens_details?.reasoning_tokens ?? 0;
      if (tokens > 1) fact("per token", ms((usage.timeline?.tokens_ms ?? this._last - this._first) / (tokens - 1)));
      fact("answer", `${count(tokens)} tokens${thought ? `, ${count(thought)} of them reasoning` : ""}`);
      fact("prompt", `${count(prompt)} tokens, ${count(cached)} cached`);
    }
    if (this._finish === "length") fact("cut off by", "most tokens");
    this._facts.replaceChildren(...facts);
  }
}
