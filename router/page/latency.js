// How long answers took, on a logarithmic scale: milliseconds and minutes in one picture.

import { Surface, colours, font, rounded } from "./canvas.js";
import { ms } from "./format.js";

const BOTTOM = 18;
const TOP = 16;

export class Distribution {
  constructor(canvas, note, colour) {
    this._note = note;
    this._colour = colour;
    this._data = null;
    this.surface = new Surface(canvas, (context, width, height) => this._draw(context, width, height));
  }

  update(data) {
    this._data = data;
    this._note.textContent = data?.num ? `p50 ${ms(data.p50_ms)} · p95 ${ms(data.p95_ms)} · p99 ${ms(data.p99_ms)} of the last ${data.num}` : "no answers yet";
    this.surface.ask();
  }

  _draw(context, width, height) {
    const c = colours();
    context.clearRect(0, 0, width, height);
    const data = this._data;
    const floor = height - BOTTOM;
    context.fillStyle = c.line;
    context.fillRect(0, floor, width, 1);
    if (!data?.num) return undefined;
    const { edges_ms: edges, counts } = data;
    const low = Math.log(edges[0]);
    const high = Math.log(edges[edges.length - 1]);
    const x = (value) => ((Math.log(value) - low) / (high - low)) * width;
    const most = Math.max(...counts, 1);
    counts.forEach((number, index) => {
      if (!number) return;
      const left = x(edges[index]);
      const tall = Math.max(2, (number / most) * (floor - TOP));
      context.fillStyle = c[this._colour];
      rounded(context, left + 0.75, floor - tall, x(edges[index + 1]) - left - 1.5, tall, 2);
      context.fill();
    });
    context.font = font(11);
    context.fillStyle = c.muted;
    // Powers of ten, as many as there is room for.
    for (let power = Math.ceil(low / Math.LN10 - 1e-9); 10 ** power <= edges[edges.length - 1] * 1.001; power += 1) {
      const at = x(10 ** power);
      context.textAlign = at < 24 ? "left" : at > width - 24 ? "right" : "center";
      context.fillText(ms(10 ** power).replace(".0", "").replace(".00", ""), at, height - 4);
    }
    let free = -Infinity;
    for (const [name, value] of [["p50", data.p50_ms], ["p95", data.p95_ms], ["p99", data.p99_ms]]) {
      const at = Math.round(Math.min(width - 1, Math.max(0, x(value)))) + 0.5;
      context.strokeStyle = c.text;
      context.globalAlpha = 0.75;
      context.setLineDash([2, 3]);
      context.beginPath();
      context.moveTo(at, TOP - 2);
      context.lineTo(at, floor);
      context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 1;
      if (at - free > 26) {
        context.fillStyle = c.text;
        context.textAlign = at > width - 20 ? "right" : at < 14 ? "left" : "center";
        context.fillText(name, at, 10);
        free = at;
      }
    }
    context.textAlign = "left";
    return undefined;
  }
}

export class Spark {
  constructor(canvas, colour) {
    this._colour = colour;
    this._values = [];
    this.surface = new Surface(canvas, (context, width, height) => this._draw(context, width, height));
  }

  update(values) {
    this._values = values;
    this.surface.ask();
  }

  _draw(context, width, height) {
    const c = colours();
    context.clearRect(0, 0, width, height);
    const values = this._values.map((value) => (Number.isFinite(value) ? value : 0));
    if (values.length < 2) return undefined;
    const most = Math.max(...values) || 1;
    const step = width / (values.length - 1);
    const y = (value) => height - 1.5 - (value / most) * (height - 5);
    context.beginPath();
    values.forEach((value, index) => (index ? context.lineTo(index * step, y(value)) : context.moveTo(0, y(value))));
    context.strokeStyle = c[this._colour];
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(0, height);
    context.closePath();
    context.globalAlpha = 0.13;
    context.fillStyle = c[this._colour];
    context.fill();
    context.globalAlpha = 1;
    return undefined;
  }
}
