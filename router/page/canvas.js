// A canvas that knows its size in CSS pixels and the theme's colours, and is drawn at most once a frame, when something
// asked for it.

const PALETTE = ["bg", "surface", "raised", "line", "strong-line", "text", "muted", "prefill", "decode", "transfer", "queue", "cached", "free", "bad", "good"];

let palette = null;

// light-dark() resolves where a colour is used, not in the custom property, so a probe uses each once.
export const colours = () => {
  if (palette) return palette;
  const probe = document.createElement("i");
  document.body.append(probe);
  palette = {};
  for (const name of PALETTE) {
    probe.style.color = `var(--${name})`;
    palette[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return palette;
};

export const surfaces = new Set();

export const themeChanged = () => {
  palette = null;
  for (const surface of surfaces) surface.ask();
};

export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

export class Surface {
  // `draw(context, width, height, now)` returns the milliseconds after which it wants to be called again: 0 for the next
  // frame, nothing for never.
  constructor(canvas, draw) {
    this.canvas = canvas;
    this.width = 0;
    this.height = 0;
    this.drawMs = 0;
    this._draw = draw;
    this._asked = false;
    this._inSight = true;
    this._timer = 0;
    this._context = canvas.getContext("2d");
    surfaces.add(this);
    new ResizeObserver(() => this._resize()).observe(canvas);
    new IntersectionObserver(([entry]) => {
      this._inSight = entry.isIntersecting;
      if (this._inSight) this.ask();
    }).observe(canvas);
    this._resize();
  }

  ask() {
    if (this._asked) return;
    this._asked = true;
    clearTimeout(this._timer);
    requestAnimationFrame((now) => this._frame(now));
  }

  _resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const ratio = Math.min(devicePixelRatio || 1, 2);
    this.width = clientWidth;
    this.height = clientHeight;
    this.canvas.width = Math.max(1, Math.round(clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(clientHeight * ratio));
    this._context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.ask();
  }

  _frame(now) {
    this._asked = false;
    if (!this._inSight || !this.width) return;
    const began = performance.now();
    const after = this._draw(this._context, this.width, this.height, now);
    this.drawMs = performance.now() - began;
    if (after === undefined || reducedMotion.matches) return;
    if (after < 17) this.ask();
    else this._timer = setTimeout(() => this.ask(), after);
  }
}

export const rounded = (context, x, y, width, height, radius) => {
  context.beginPath();
  context.roundRect(x, y, width, height, Math.max(0, Math.min(radius, width / 2, height / 2)));
};

let sans = "";
let mono = "";

export const font = (size, weight = 400) => {
  sans ||= getComputedStyle(document.documentElement).getPropertyValue("--sans");
  return `${weight} ${size}px ${sans}`;
};

export const monoFont = (size) => {
  mono ||= getComputedStyle(document.documentElement).getPropertyValue("--mono");
  return `${size}px ${mono}`;
};

export const clip = (context, text, width) => {
  if (context.measureText(text).width <= width) return text;
  let cut = text.length;
  while (cut > 1 && context.measureText(`${text.slice(0, cut)}…`).width > width) cut -= 1;
  return cut > 1 ? `${text.slice(0, cut)}…` : "";
};
