// Puts the page together: the stream feeds the state, the state feeds what is drawn, keys lead everywhere.

import { themeChanged } from "./canvas.js";
import { Chat } from "./chat.js";
import { FleetMap, FleetTable } from "./fleet.js";
import { bytes, count, el, ms, percent, seconds, short } from "./format.js";
import { Distribution, Spark } from "./latency.js";
import { RequestLines } from "./requests.js";
import { follow, onChange, state } from "./state.js";

const get = (id) => document.getElementById(id);

// Figures: what is true right now, and the last minutes of it

const FIGURES = [
  { name: "Workers", colour: "muted", series: (now) => now.serving, text: (s) => [count(s.now.serving), `of ${count(s.workers.size)}`], sub: (s) => [el("span", { class: "is-prefill", title: "prefill workers that serve" }, `${count(s.now.serving_prefill)} P`), " + ", el("span", { class: "is-decode", title: "decode workers that serve" }, `${count(s.now.serving_decode)} D`)] },
  { name: "In flight", colour: "decode", series: (now) => now.running, text: (s) => [count(s.now.running), "requests"], sub: (s) => `${s.now.requests_s.toFixed(1)} finished /s` },
  { name: "Prompt", colour: "prefill", series: (now) => now.prompt_tokens_s, text: (s) => [short(s.now.prompt_tokens_s), "tokens/s"], sub: (s) => `${short(s.now.queued_tokens)} queued` },
  { name: "Answers", colour: "decode", series: (now) => now.generation_tokens_s, text: (s) => [short(s.now.generation_tokens_s), "tokens/s"], sub: () => "" },
  { name: "First token", colour: "prefill", series: (now) => now.ttft_p50_ms, text: (s) => [ms(s.latency.ttft?.p50_ms ?? NaN), ""], sub: (s) => (s.latency.ttft?.num ? `p99 ${ms(s.latency.ttft.p99_ms)}` : "no answers yet") },
  { name: "Prefix hits", colour: "muted", series: (now) => now.hit_rate, text: (s) => [percent(s.now.hit_rate), ""], sub: (s) => (s.now.hit_window ? `of ${short(s.now.hit_window)} tokens` : "no prompts yet") },
  { name: "Pages moved", colour: "transfer", series: (now) => now.read_bytes_s, text: (s) => (s.now.read_bytes_s >= 1e9 ? [(s.now.read_bytes_s / 1e9).toFixed(2), "GB/s"] : bytes(s.now.read_bytes_s).split(" ").map((word, index) => (index ? `${word}/s` : word))), sub: (s) => `${bytes(s.now.reading_bytes)} in flight` },
];

const figures = FIGURES.map((figure) => {
  const value = el("dd", {}, "–");
  const sub = el("dd", { class: "sub" });
  const canvas = el("canvas", { "aria-hidden": "true" });
  get("figures").append(el("div", { class: "figure" }, el("dt", {}, figure.name), value, sub, el("dd", { class: "spark" }, canvas)));
  return { ...figure, value, subNode: sub, spark: new Spark(canvas, figure.colour) };
});

const updateFigures = () => {
  for (const figure of figures) {
    const [number, unit] = figure.text(state);
    figure.value.replaceChildren(number, unit ? el("small", {}, unit) : "");
    figure.subNode.replaceChildren(...[figure.sub(state)].flat());
    figure.spark.update(state.history.map(figure.series));
  }
};

// The parts

const map = new FleetMap(get("fleet"), get("worker-detail"), get("tip"));
const table = new FleetTable(map, get("table-view"), get("workers-head"), get("workers-rows"));
const lines = new RequestLines(get("requests"), get("request-detail"), (request) => {
  map.highlight = new Set(request ? [request.prefill, request.decode].filter(Boolean) : []);
  map.surface.ask();
});
const ttft = new Distribution(get("ttft"), get("ttft-note"), "prefill");
const tpot = new Distribution(get("tpot"), get("tpot-note"), "decode");
const chat = new Chat((id) => lines.mine.add(id));

const CONNECTION = { live: "live", waiting: "connecting", lost: "router away, trying again", locked: "needs an administrator's key, under Options", stale: "registry away" };

const updateHead = () => {
  const { router } = state;
  const pill = get("connection");
  const words = router.draining ? "draining" : CONNECTION[state.connection];
  if (pill.textContent !== words) pill.textContent = words;
  pill.dataset.state = state.connection;
  pill.title = state.connection === "lost" || state.connection === "locked" ? (state.reason ?? "") : "";
  get("served").textContent = (router.models ?? []).join(", ");
  get("uptime").textContent = router.uptime_s ? `${router.router_id} · up ${seconds(router.uptime_s)}` : "";
};

onChange(() => {
  updateHead();
  if (state.seq < 0) return;
  updateFigures();
  map.update();
  table.update();
  lines.update();
  ttft.update(state.latency.ttft);
  tpot.update(state.latency.tpot);
  chat.update();
  const workers = [...state.workers.values()];
  const of = (role) => workers.filter((worker) => worker.role === role).length;
  get("pole-prefill").textContent = `Prefill · ${count(of("prefill"))}`;
  get("pole-decode").textContent = `Decode · ${count(of("decode"))}`;
  get("pole-links").textContent = state.links.size ? `${count(state.links.size)} ${state.links.size === 1 ? "pair has" : "pairs have"} moved pages` : "";
  get("fleet-note").textContent = state.router.registry_stale_s > 0 ? `the list is ${seconds(state.router.registry_stale_s)} old` : "";
  get("requests-note").textContent = `${count(state.numRequests)} in flight through this router`;
});

// Map or table, and finding a worker

const show = (asTable) => {
  get("as-map").setAttribute("aria-pressed", String(!asTable));
  get("as-table").setAttribute("aria-pressed", String(asTable));
  get("fleet").hidden = get("poles").hidden = asTable;
  get("table-view").hidden = !asTable;
  table.update();
  map.surface.ask();
};
get("as-map").addEventListener("click", () => show(false));
get("as-table").addEventListener("click", () => show(true));
get("filter").addEventListener("input", () => {
  map.filter = get("filter").value.trim().toLowerCase();
  map.surface.ask();
  table.update();
});

// Theme: as the system, light or dark; remembered where the browser allows it

const THEMES = ["auto", "light", "dark"];
const remembered = () => {
  try {
    return localStorage.getItem("penumbra-theme") ?? "auto";
  } catch {
    return "auto";
  }
};
const setTheme = (theme) => {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = get("theme");
  button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  button.setAttribute("aria-label", `Colour theme: ${{ auto: "as the system", light: "light", dark: "dark" }[theme]}`);
  try {
    localStorage.setItem("penumbra-theme", theme);
  } catch {
    // Private windows may refuse; the theme then lasts as long as the page.
  }
  themeChanged();
};
let theme = THEMES.includes(remembered()) ? remembered() : "auto";
const nextTheme = () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  setTheme(theme);
};
get("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeChanged);
setTheme(theme);

// Keys

get("help").addEventListener("click", () => get("keys").showModal());
const KEYS = {
  f: () => (get("fleet").hidden ? get("table-view") : get("fleet")).focus(),
  r: () => get("requests").focus(),
  "/": () => get("filter").focus(),
  m: () => show(get("table-view").hidden),
  c: () => get("message").focus(),
  n: () => chat.clear(),
  t: nextTheme,
  "?": () => get("keys").showModal(),
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !get("keys").open) {
    chat.stop();
    if (document.activeElement === get("filter") || document.activeElement === get("message")) document.activeElement.blur();
    return;
  }
  const typing = event.target.closest("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

updateHead();
follow(() => chat.key());
