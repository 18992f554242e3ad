// What the page knows of the cluster: one full frame, then changes to it. Everybody who draws reads from here.

import { Refused, events, headers } from "./stream.js";

const HISTORY = 90; // ticks a sparkline looks back on
const FINISHED_S = 900; // how long a finished request stays for the timelines
const MOST_FINISHED = 400;

export const state = {
  seq: -1,
  router: {},
  workers: new Map(),
  links: new Map(),
  requests: new Map(), // in flight
  numRequests: 0,
  finished: [],
  latency: {},
  now: {},
  history: [],
  clock: 0, // the router's, in seconds, as of `heard`
  heard: 0, // performance.now() of the last frame
  connection: "waiting",
};

// The router's clock now, in seconds, without asking it.
export const clock = () => state.clock + (performance.now() - state.heard) / 1000;

const listeners = new Set();
export const onChange = (listener) => listeners.add(listener);
const tell = () => listeners.forEach((listener) => listener(state));

const linkKey = (link) => `${link.prefill}>${link.decode}`;

// Takes in a frame or a change. False when a change does not follow from what is known.
export const take = (message) => {
  const whole = message.kind === "frame";
  if (!whole && message.seq !== state.seq + 1) return false;
  if (whole) {
    state.workers.clear();
    state.links.clear();
    state.finished = [];
  }
  state.seq = message.seq;
  state.router = message.router;
  for (const worker of message.workers) state.workers.set(worker.worker_id, worker);
  for (const id of message.gone) state.workers.delete(id);
  for (const link of message.links) state.links.set(linkKey(link), link);
  for (const [key, link] of state.links) {
    if (!state.workers.has(link.prefill) || !state.workers.has(link.decode)) state.links.delete(key);
  }
  state.requests = new Map(message.requests.map((request) => [request.request_id, request]));
  state.numRequests = message.num_requests;
  state.finished.push(...message.finished);
  state.finished = state.finished.filter((request) => message.at - request.arrived - (request.ended_s ?? 0) < FINISHED_S).slice(-MOST_FINISHED);
  state.latency = message.latency;
  state.now = message.now;
  state.history.push(message.now);
  if (state.history.length > HISTORY) state.history.shift();
  state.clock = message.at;
  state.heard = performance.now();
  return true;
};

const pause = (delay) => new Promise((done) => setTimeout(done, delay));

// Follow the router for as long as the page is open. A page nobody sees asks for nothing.
export const follow = async (key) => {
  let delay = 250;
  for (;;) {
    if (document.hidden) {
      await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    }
    const leave = new AbortController();
    let refused = false;
    const hide = () => document.hidden && leave.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      for await (const { event, data } of events("/fleet/events", { headers: headers(key()), signal: leave.signal })) {
        if (event !== "fleet") continue;
        if (!take(JSON.parse(data))) break; // a change was missed: connect again for a whole frame
        state.connection = state.router.registry_stale_s > 0 ? "stale" : "live";
        delay = 250;
        tell();
      }
    } catch (error) {
      state.reason = error.message;
      refused = error instanceof Refused && (error.status === 401 || error.status === 403);
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    if (!document.hidden) {
      state.connection = refused ? "locked" : "lost";
      tell();
    }
    await pause(delay * (0.5 + Math.random() / 2));
    delay = Math.min(2 * delay, 5000);
  }
};
