// Requests as timelines: time runs to the right edge, which is now. The span is as long as the oldest one in flight
// needs, so that a prefill of minutes and an answer of a second both fit.

import { Surface, clip, colours, font, monoFont, rounded } from "./canvas.js";
import { count, el, percent, seconds, short } from "./format.js";
import { clock, state } from "./state.js";

const ROW = 22;
const LEFT = 92;
const RIGHT = 132;
const SPANS = [12, 20, 40, 60, 120, 240, 480, 960, 1920, 4800]; // whole seconds and minutes when cut in four

// A phase's colour. Everything before the prompt is computed is waiting, whatever its name.
export const phaseClass = (name) => {
  if (name === "prefill" || name === "transfer") return name;
  return name === "tokens" || name === "first_decode" || name === "answer" ? "decode" : "queue";
};

export class RequestLines {
  constructor(canvas, detail, onSelect) {
    this._detail = detail;
    this._onSelect = onSelect;
    this.selected = null;
    this.mine = new Set(); // requests of this page's own chat
    this._rows = [];
    this._hovered = null;
    this.surface = new Surface(canvas, (context, width, height) => this._draw(context, width, height));
    canvas.addEventListener("pointermove", (event) => this._hover(this._rows[Math.floor(event.offsetY / ROW)]?.request_id ?? null));
    canvas.addEventListener("pointerleave", () => this._hover(null));
    canvas.addEventListener("click", () => this.select(this._hovered));
    canvas.addEventListener("keydown", (event) => this._key(event));
  }

  update() {
    this._pick();
    this._tell();
    this.surface.ask();
  }

  select(id) {
    this.selected = id;
    this._tell();
    this.surface.ask();
  }

  _hover(id) {
    if (id === this._hovered) return;
    this._hovered = id;
    this._tell();
    this.surface.ask();
  }

  _key(event) {
    if (event.key === "Escape") this.select(null);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!this._rows.length) return;
      const here = this._rows.findIndex((request) => request.request_id === this.selected);
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.select(this._rows[Math.max(0, Math.min(this._rows.length - 1, here + step))].request_id);
    }
  }

  // In flight first, newest on top; then those that just ended, as far as there is room.
  _pick() {
    const room = Math.max(1, Math.floor((this.surface.height - 18) / ROW));
    const flying = [...state.requests.values()].sort((a, b) => b.arrived - a.arrived);
    const ended = state.finished.slice(-room).reverse();
    // With more in flight than rows the oldest matter most: they are what an operator looks for.
    const shown = flying.length > room ? flying.slice(-room) : flying;
    this._rows = [...shown, ...ended].slice(0, room);
  }

  _span(at) {
    let oldest = 10;
    for (const request of this._rows) {
      oldest = Math.max(oldest, at - request.arrived);
    }
    return SPANS.find((span) => span >= Math.min(oldest, 4800)) ?? 4800;
  }

  _draw(context, width, height) {
    const c = colours();
    const at = clock();
    context.clearRect(0, 0, width, height);
    if (!this._rows.length) {
      context.fillStyle = c.muted;
      context.font = font(13);
      context.textAlign = "center";
      context.fillText("Nothing is in flight. Ask something on the right.", width / 2, height / 2);
      context.textAlign = "left";
      return undefined;
    }
    const span = this._span(at);
    const x0 = LEFT;
    const wide = Math.max(10, width - LEFT - RIGHT);
    const x = (time) => x0 + wide * (1 - (at - time) / span);
    const bottom = height - 18;
    context.font = font(11);
    context.lineWidth = 1;
    for (let tick = 0; tick <= 4; tick += 1) {
      const ago = (span * tick) / 4;
      const left = Math.round(x(at - ago)) + 0.5;
      context.strokeStyle = c.line;
      context.beginPath();
      context.moveTo(left, 0);
      context.lineTo(left, bottom);
      context.stroke();
      context.fillStyle = c.muted;
      context.textAlign = tick === 4 ? "left" : "center";
      context.fillText(ago ? `−${ago < 60 ? `${ago} s` : `${ago / 60} min`}` : "now", left, height - 4);
    }
    context.textAlign = "left";
    this._rows.forEach((request, row) => {
      const y = row * ROW;
      const lit = request.request_id === this.selected || request.request_id === this._hovered;
      if (lit) {
        context.fillStyle = c.raised;
        rounded(context, 0, y, width, ROW, 5);
        context.fill();
      }
      context.font = monoFont(11.5);
      context.fillStyle = this.mine.has(request.request_id) ? c.decode : lit ? c.text : c.muted;
      context.fillText(clip(context, request.request_id.slice(0, 10), LEFT - 12), 6, y + 15);
      const over = request.ended_s !== undefined && request.ended_s !== null;
      const end = over ? request.arrived + request.ended_s : at;
      if (end < at - span) return;
      context.save();
      context.beginPath();
      context.rect(x0, y, wide, ROW);
      context.clip();
      context.globalAlpha = over && !lit ? 0.45 : 1;
      request.phases.forEach(([name, starts], index) => {
        const from = request.arrived + starts;
        const until = index + 1 < request.phases.length ? request.arrived + request.phases[index + 1][1] : end;
        const left = Math.max(x0, x(from));
        const size = Math.max(1.5, x(until) - left);
        context.fillStyle = request.failed && index + 1 === request.phases.length ? c.bad : c[phaseClass(name)];
        rounded(context, left, y + 6, size, ROW - 12, 3);
        context.fill();
        if (!over && name === "prefill" && request.prompt_tokens && index + 1 === request.phases.length) {
          // How far the prompt is, as a line under its bar.
          context.fillStyle = c.text;
          context.fillRect(left, y + ROW - 4, size * Math.min(1, request.done_tokens / request.prompt_tokens), 1.5);
        }
      });
      context.restore();
      context.globalAlpha = 1;
      context.font = font(11.5);
      context.fillStyle = request.failed ? c.bad : lit ? c.text : c.muted;
      const words = request.failed ? request.failed : `${short(request.prompt_tokens)} → ${count(request.generated_tokens)}${over ? "" : " …"}`;
      context.fillText(clip(context, words, RIGHT - 14), width - RIGHT + 10, y + 15);
    });
    // Again once a bar has grown by a pixel.
    return state.requests.size ? (1000 * span) / wide : undefined;
  }

  _tell() {
    const id = this._hovered ?? this.selected;
    const request = state.requests.get(id) ?? state.finished.find((one) => one.request_id === id);
    this._onSelect(request ?? null);
    if (!request) {
      const hidden = state.numRequests - state.requests.size;
      this._say(hidden > 0 ? `${count(hidden)} more are in flight than are told here.` : "");
      return;
    }
    const end = request.ended_s ?? clock() - request.arrived;
    const phases = request.phases.map(([name, starts], index) => {
      const until = index + 1 < request.phases.length ? request.phases[index + 1][1] : end;
      return el("span", {}, `${name.replaceAll("_", " ")} `, el("b", {}, seconds(until - starts)));
    });
    const facts = [
      el("span", { class: "name" }, request.request_id),
      el("span", {}, el("b", {}, request.prefill ? `${request.prefill} → ${request.decode}` : "not placed yet")),
      el("span", {}, "prompt ", el("b", {}, `${count(request.prompt_tokens)} tokens, ${percent(request.prompt_tokens ? request.cached_tokens / request.prompt_tokens : 0)} cached`)),
      el("span", {}, "answer ", el("b", {}, `${count(request.generated_tokens)} tokens`)),
    ];
    if (request.attempt > 1) facts.push(el("span", {}, "attempt ", el("b", {}, count(request.attempt))));
    if (request.failed) facts.push(el("span", { class: "failed" }, request.failed));
    this._words = null;
    this._detail.replaceChildren(...facts, ...phases);
  }

  _say(words) {
    if (this._words === words) return;
    this._words = words;
    this._detail.replaceChildren(el("span", {}, words));
  }
}
