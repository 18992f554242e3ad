// The fleet as a map: prefill on the left, decode on the right, a thread for each pair that moves pages. One canvas, so
// a thousand workers cost a thousand rectangles and no DOM nodes; and a table of which only the rows in sight exist.

import { Surface, clip, colours, font, monoFont, reducedMotion, rounded } from "./canvas.js";
import { bytes, count, el, ms, percent, short, speed } from "./format.js";
import { clock, state } from "./state.js";

const MOST_THREADS = 90;
const CROWD = 24; // threads from which on they are a texture, without labels and without motion
const ROW = 28; // of the table, as in style.css
const byName = new Intl.Collator("en", { numeric: true }).compare;

const pool = (worker) => {
  const { free = 0, used = 0, cached = 0, quarantined = 0 } = worker.pages ?? {};
  const total = free + used + cached + quarantined;
  return { total, used: total ? used / total : 0, cached: total ? cached / total : 0, bad: total ? quarantined / total : 0 };
};

// Columns and rows of n cells in a box, so that the cells are as large as they can be without becoming odd shapes.
export const grid = (n, width, height) => {
  let best = { columns: 1, w: width, h: height, score: -1 };
  for (let columns = 1; columns <= Math.max(1, n); columns += 1) {
    const rows = Math.ceil(n / columns);
    const w = Math.min(290, width / columns);
    const h = Math.min(78, height / rows);
    const score = Math.min(w, h * (w > 84 ? 2.8 : 1.15)); // cards are wide, mere cells nearly square
    if (score > best.score) best = { columns, w, h, score };
    if (w < 5) break;
  }
  return best;
};

export class FleetMap {
  constructor(canvas, detail, tip) {
    this._canvas = canvas;
    this._detail = detail;
    this._tip = tip;
    this._cells = [];
    this._at = new Map(); // worker id -> cell
    this._partners = []; // who the worker in focus moves pages with
    this._edge = { prefill: 0, decode: 0 }; // where threads leave one pool and reach the other
    this._key = "";
    this.selected = null;
    this.hovered = null;
    this.filter = "";
    this.highlight = new Set(); // workers of the request in focus
    this.surface = new Surface(canvas, (context, width, height, now) => this._draw(context, width, height, now));
    canvas.addEventListener("pointermove", (event) => this._hover(event));
    canvas.addEventListener("pointerleave", () => this._hover(null));
    canvas.addEventListener("click", () => this.select(this.hovered));
    canvas.addEventListener("keydown", (event) => this._key_(event));
    this._tell();
  }

  update() {
    if (this.selected && !state.workers.has(this.selected)) this.selected = null;
    this._fit();
    this._tell();
    this.surface.ask();
  }

  select(id) {
    this.selected = id;
    this._tell();
    this.surface.ask();
  }

  matches(worker) {
    if (!this.filter) return true;
    const text = `${worker.worker_id} ${worker.role} ${worker.state} ${worker.address}`.toLowerCase();
    return this.filter.split(/\s+/).every((word) => text.includes(word));
  }

  // A few workers are a short row of cards; many want room.
  _fit() {
    const tall = Math.max(...["prefill", "decode"].map((role) => [...state.workers.values()].filter((worker) => worker.role === role).length));
    this._canvas.dataset.size = tall <= 2 ? "few" : tall <= 12 ? "some" : "many";
  }

  _layout(width, height) {
    const roles = { prefill: [], decode: [] };
    for (const worker of state.workers.values()) roles[worker.role]?.push(worker.worker_id);
    const key = `${width}x${height}/${roles.prefill.join()}/${roles.decode.join()}`;
    if (key === this._key) return;
    this._key = key;
    this._cells = [];
    this._at.clear();
    // Between the two pools there is room for the threads: more of it where cards leave it free anyway.
    const side = (width * (state.workers.size > 60 ? 0.86 : 0.74)) / 2;
    for (const [role, ids] of Object.entries(roles)) {
      ids.sort(byName);
      const { columns, w, h } = grid(ids.length, side, height);
      const rows = Math.ceil(ids.length / columns);
      const left = role === "prefill" ? 0 : width - Math.min(columns, ids.length) * w;
      this._edge[role] = role === "prefill" ? Math.min(columns, ids.length) * w + 2 : left - 2;
      const top = Math.max(0, (height - rows * h) / 2);
      const gap = w > 84 ? 8 : w > 12 ? 2 : 1;
      ids.forEach((id, index) => {
        const cell = {
          id,
          role,
          index,
          columns,
          x: left + (index % columns) * w + gap / 2,
          y: top + Math.floor(index / columns) * h + gap / 2,
          w: w - gap,
          h: h - gap,
        };
        this._cells.push(cell);
        this._at.set(id, cell);
      });
    }
  }

  _draw(context, width, height, now) {
    this._layout(width, height);
    const c = colours();
    context.clearRect(0, 0, width, height);
    if (!this._cells.length) {
      context.fillStyle = c.muted;
      context.font = font(13);
      context.textAlign = "center";
      context.fillText("No worker has registered yet.", width / 2, height / 2);
      context.textAlign = "left";
      return undefined;
    }
    const moving = this._threads(context, c, now);
    for (const cell of this._cells) this._cell(context, c, cell);
    for (const id of this._partners) this._ring(context, c.transfer, id, 1.5);
    for (const id of this.highlight) this._ring(context, c.transfer, id, 2);
    if (this.hovered) this._ring(context, c["strong-line"], this.hovered, 1);
    if (this.selected) this._ring(context, c.text, this.selected, 2);
    return moving ? 0 : undefined;
  }

  _ring(context, colour, id, thickness) {
    const cell = this._at.get(id);
    if (!cell) return;
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    rounded(context, cell.x - 2, cell.y - 2, cell.w + 4, cell.h + 4, cell.h > 24 ? 9 : 3);
    context.stroke();
  }

  _threads(context, c, now) {
    const focus = this.selected ?? this.hovered;
    let links = [...state.links.values()].filter((link) => this._at.has(link.prefill) && this._at.has(link.decode));
    if (focus) links = links.filter((link) => link.prefill === focus || link.decode === focus);
    links.sort((a, b) => b.active_s - a.active_s || b.gb_s - a.gb_s);
    links = links.slice(0, MOST_THREADS);
    const crowd = links.length > CROWD;
    const small = this._cells[0].h < 26; // cells lie in front of each other: threads run between the two pools only
    this._partners = focus && small ? links.map((link) => (link.prefill === focus ? link.decode : link.prefill)) : [];
    let moving = false;
    const at = clock();
    context.lineCap = "round";
    for (const link of links) {
      const from = this._at.get(link.prefill);
      const to = this._at.get(link.decode);
      const x0 = small ? this._edge.prefill : from.x + from.w;
      const y0 = from.y + from.h / 2;
      const x1 = small ? this._edge.decode : to.x;
      const y1 = to.y + to.h / 2;
      const bend = Math.max(20, (x1 - x0) * 0.45);
      const fresh = at - link.active_s < 2.5;
      context.strokeStyle = c.transfer;
      context.globalAlpha = fresh ? (crowd ? 0.45 : 0.9) : crowd ? 0.08 : 0.32;
      context.lineWidth = Math.min(5, 1 + Math.log2(1 + link.gb_s) * (crowd ? 0.4 : 1));
      context.beginPath();
      context.moveTo(x0, y0);
      context.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
      context.stroke();
      if (fresh && !crowd && !reducedMotion.matches) {
        moving = true;
        context.globalAlpha = 1;
        context.strokeStyle = c.surface;
        context.lineWidth = Math.max(1, context.lineWidth - 1.5);
        context.setLineDash([3, 15]);
        context.lineDashOffset = -now / 22;
        context.stroke();
        context.setLineDash([]);
      }
    }
    if (!crowd) {
      context.font = font(11.5, 600);
      context.textAlign = "center";
      const taken = [];
      for (const link of links.slice(0, 12)) {
        const from = this._at.get(link.prefill);
        const to = this._at.get(link.decode);
        const text = speed(link.gb_s);
        const half = context.measureText(text).width / 2 + 6;
        // Somewhere on its curve where no other label is.
        const spot = [0.5, 0.3, 0.7, 0.18, 0.82, 0.4, 0.6]
          .map((t) => ({
            x: small ? this._edge.prefill + (this._edge.decode - this._edge.prefill) * t : from.x + from.w + (to.x - from.x - from.w) * t,
            y: from.y + from.h / 2 + (to.y + to.h / 2 - from.y - from.h / 2) * t * t * (3 - 2 * t),
          }))
          .find(({ x, y }) => taken.every((other) => Math.abs(other.x - x) > other.half + half + 2 || Math.abs(other.y - y) > 19));
        if (!spot) continue;
        taken.push({ ...spot, half });
        const { x, y } = spot;
        context.globalAlpha = 1;
        context.fillStyle = c.surface;
        rounded(context, x - half, y - 9, 2 * half, 18, 9);
        context.fill();
        context.fillStyle = c.transfer;
        context.fillText(text, x, y + 4);
      }
      context.textAlign = "left";
    }
    context.globalAlpha = 1;
    return moving;
  }

  _cell(context, c, cell) {
    const worker = state.workers.get(cell.id);
    if (!worker) return;
    const { x, y, w, h } = cell;
    const { used, cached, bad } = pool(worker);
    const own = c[cell.role];
    const down = worker.state === "down";
    context.globalAlpha = this.matches(worker) ? (worker.state === "draining" ? 0.55 : 1) : 0.16;
    if (h < 26 || w < 84) {
      // A small cell is its pool, filled from below.
      context.fillStyle = c.free;
      context.fillRect(x, y, w, h);
      if (down) {
        context.fillStyle = c.bad;
        context.fillRect(x, y, w, h);
      } else {
        const height = (share) => (share > 0 ? Math.max(1, share * h) : 0);
        let top = y + h;
        for (const [share, colour] of [[bad, c.bad], [used, own], [cached, c.cached]]) {
          const tall = height(share);
          if (!tall) continue;
          top -= tall;
          context.fillStyle = colour;
          context.fillRect(x, Math.max(y, top), w, Math.min(tall, h));
        }
      }
      context.globalAlpha = 1;
      return;
    }
    context.fillStyle = c.raised;
    rounded(context, x, y, w, h, 8);
    context.fill();
    // The edge says which pool it is, and lights up while it works.
    context.save();
    context.clip();
    context.globalAlpha *= down ? 1 : worker.running ? 1 : 0.4;
    context.fillStyle = down ? c.bad : own;
    context.fillRect(cell.role === "prefill" ? x : x + w - 3, y, 3, h);
    context.restore();
    const lines = h >= 62 ? 3 : h >= 40 ? 2 : 1;
    const inner = w - 26;
    const left = x + 13;
    context.fillStyle = c.text;
    context.font = monoFont(12.5);
    context.fillText(clip(context, cell.id, inner), left, y + (lines > 1 ? 20 : 14));
    if (lines > 1) {
      context.fillStyle = down ? c.bad : c.muted;
      context.font = font(11.5);
      context.fillText(clip(context, worker.state === "serving" ? load(worker) : worker.state, inner), left, y + 36);
    }
    if (lines > 2) {
      const words = `${percent(used)} in use, ${percent(cached)} cached`;
      context.fillStyle = c.muted;
      context.fillText(clip(context, words, inner), left, y + 52);
    }
    const bar = y + h - (lines > 1 ? 12 : 8);
    context.save();
    rounded(context, left, bar, inner, 5, 2.5);
    context.clip();
    context.fillStyle = c.line;
    context.fillRect(left, bar, inner, 5);
    let edge = left;
    for (const [share, colour] of [[used, own], [cached, c.cached], [bad, c.bad]]) {
      if (!share) continue;
      const wide = Math.max(2, share * inner);
      context.fillStyle = colour;
      context.fillRect(edge, bar, wide, 5);
      edge += wide;
    }
    context.restore();
    context.globalAlpha = 1;
  }

  _hover(event) {
    let found = null;
    if (event) {
      const cell = this._cells.find(({ x, y, w, h }) => event.offsetX >= x - 1 && event.offsetX <= x + w + 1 && event.offsetY >= y - 1 && event.offsetY <= y + h + 1);
      found = cell?.id ?? null;
    }
    this._tip.hidden = !found;
    if (found) {
      const worker = state.workers.get(found);
      this._tip.textContent = `${found}\n${worker.state} · ${load(worker)}`;
      this._tip.style.left = `${Math.min(innerWidth - 240, event.clientX + 14)}px`;
      this._tip.style.top = `${event.clientY + 16}px`;
    }
    if (found !== this.hovered) {
      this.hovered = found;
      this.surface.ask();
    }
  }

  _key_(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") this.select(null);
    else if (event.key in steps && this._cells.length) {
      event.preventDefault();
      const here = this._at.get(this.selected);
      if (!here) {
        this.select(this._cells[0].id);
        return;
      }
      const [dx, dy] = steps[event.key];
      // The nearest cell that way; sideways distance counts double, so that a row stays a row.
      let best = null;
      let least = Infinity;
      for (const cell of this._cells) {
        const x = cell.x + cell.w / 2 - here.x - here.w / 2;
        const y = cell.y + cell.h / 2 - here.y - here.h / 2;
        const ahead = x * dx + y * dy;
        const aside = Math.abs(x * dy) + Math.abs(y * dx);
        if (ahead > 0.5 && ahead + 2 * aside < least) {
          least = ahead + 2 * aside;
          best = cell;
        }
      }
      if (best) this.select(best.id);
    }
  }

  _tell() {
    const worker = state.workers.get(this.selected);
    if (!worker) {
      const workers = [...state.workers.values()];
      const bad = workers.filter((one) => one.state !== "serving");
      const quarantined = workers.reduce((sum, one) => sum + (one.pages?.quarantined ?? 0), 0);
      const words = bad.length ? `${bad.length} not serving: ${bad.slice(0, 4).map((one) => `${one.worker_id} (${one.state})`).join(", ")}${bad.length > 4 ? ", …" : ""}` : workers.length ? "All of them serve." : "";
      const more = quarantined ? ` ${count(quarantined)} pages are quarantined.` : "";
      if (this._said !== words + more) {
        this._said = words + more;
        this._detail.replaceChildren(el("span", {}, words + more), el("span", {}, workers.length ? "Point at a worker, or press f and use the arrows." : ""));
      }
      return;
    }
    this._said = null;
    const { total, used, cached } = pool(worker);
    const facts = [
      ["", `${worker.state} · ${load(worker)}`],
      ["pages ", `${count(worker.pages?.used)} used, ${count(worker.pages?.cached)} cached, ${count(worker.pages?.free)} free${worker.pages?.quarantined ? `, ${count(worker.pages.quarantined)} quarantined` : ""}`],
      ["pool ", `${percent(used)} in use, ${percent(cached)} cached of ${short(total * 256)} tokens`],
      ["at ", worker.address],
      ["model ", worker.model.slice(0, 12)],
    ];
    if (worker.role === "decode") facts.splice(3, 0, ["reading ", bytes(worker.reading_bytes ?? 0)]);
    const links = [...state.links.values()].filter((link) => link.prefill === this.selected || link.decode === this.selected).sort((a, b) => b.active_s - a.active_s);
    for (const link of links.slice(0, 3)) {
      const other = link.prefill === this.selected ? link.decode : link.prefill;
      facts.push([`${worker.role === "decode" ? "from" : "to"} ${other} `, `${speed(link.gb_s)}, p50 ${ms(link.p50_ms)}, ${bytes(link.bytes)}`]);
    }
    if (links.length > 3) facts.push(["and ", `${links.length - 3} more pairs`]);
    this._detail.replaceChildren(el("span", { class: "name" }, worker.worker_id), ...facts.map(([name, value]) => el("span", {}, name, el("b", {}, value))));
  }
}

export const load = (worker) => {
  const words = [`${count(worker.running)} running`];
  if (worker.waiting) words.push(`${count(worker.waiting)} waiting`);
  if (worker.queued_tokens) words.push(`${short(worker.queued_tokens)} tokens queued`);
  return words.join(" · ");
};

const COLUMNS = [
  ["worker", (w) => w.worker_id, (w) => w.worker_id],
  ["role", (w) => w.role, (w) => w.role],
  ["state", (w) => w.state, (w) => w.state],
  ["running", (w) => w.running, (w) => count(w.running)],
  ["waiting", (w) => w.waiting, (w) => count(w.waiting)],
  ["queued", (w) => w.queued_tokens, (w) => short(w.queued_tokens)],
  ["in use", (w) => pool(w).used, (w) => percent(pool(w).used)],
  ["cached", (w) => pool(w).cached, (w) => percent(pool(w).cached)],
  ["quarantined", (w) => w.pages?.quarantined ?? 0, (w) => count(w.pages?.quarantined ?? 0)],
  ["read", (w) => w.read_bytes ?? 0, (w) => (w.role === "decode" ? bytes(w.read_bytes ?? 0) : "")],
];

export class FleetTable {
  constructor(map, scroller, head, body) {
    this._map = map;
    this._scroller = scroller;
    this._body = body;
    this._sort = 0;
    this._up = true;
    this._rows = [];
    this._heads = COLUMNS.map(([name], index) => {
      const cell = el("th", { scope: "col" }, el("button", { type: "button", onclick: () => this._sortBy(index) }, name));
      head.append(cell);
      return cell;
    });
    scroller.addEventListener("scroll", () => requestAnimationFrame(() => this._fill()));
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-id]");
      if (row) map.select(row.dataset.id);
      this._fill();
    });
  }

  _sortBy(index) {
    this._up = this._sort === index ? !this._up : index < 3;
    this._sort = index;
    this.update();
  }

  update() {
    if (this._scroller.hidden) return;
    const value = COLUMNS[this._sort][1];
    const way = this._up ? 1 : -1;
    this._rows = [...state.workers.values()].filter((worker) => this._map.matches(worker)).sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      return way * (typeof left === "string" ? byName(left, right) : left - right) || byName(a.worker_id, b.worker_id);
    });
    this._heads.forEach((cell, index) => {
      if (index === this._sort) cell.setAttribute("aria-sort", this._up ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
    this._body.parentElement.setAttribute("aria-rowcount", this._rows.length + 1);
    this._fill();
  }

  _fill() {
    const first = Math.max(0, Math.floor(this._scroller.scrollTop / ROW) - 4);
    const shown = this._rows.slice(first, first + Math.ceil(this._scroller.clientHeight / ROW) + 8);
    const space = (rows) => {
      const cell = el("td", { colspan: COLUMNS.length });
      cell.style.height = `${rows * ROW}px`;
      return el("tr", { class: "pad", "aria-hidden": "true" }, cell);
    };
    const rows = shown.map((worker, index) =>
      el(
        "tr",
        { "data-id": worker.worker_id, "aria-rowindex": first + index + 2, "aria-selected": worker.worker_id === this._map.selected ? "true" : undefined },
        ...COLUMNS.map(([name, , text]) => el("td", { "data-bad": (name === "state" && worker.state === "down") || (name === "quarantined" && worker.pages?.quarantined > 0) }, text(worker))),
      ),
    );
    const below = this._rows.length - first - shown.length;
    this._body.replaceChildren(...(first ? [space(first)] : []), ...rows, ...(below > 0 ? [space(below)] : []));
  }
}
