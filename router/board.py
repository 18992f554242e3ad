"""The picture of the cluster that the front page and /fleet show: drawn once a tick, shared by everybody who looks.

Each tick `Board` looks at the fleet and at this router's requests, and leaves a whole frame and the change from the one
before; a viewer that missed a change gets the frame. As long as nobody looks there are no ticks.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.fleet import FleetSnapshot, WorkerView
from router.live import LiveRequests, Told

TICK_S = 1.0
RATE_S = 5.0
"""Rates are over about this long."""

MOST_REQUESTS = 128
"""Requests in flight that a frame tells of: the older and the newer half, when there are more."""

BINS_PER_DECADE = 12

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What there was to see at one moment: monotonic and calendar seconds, and everything the board tells of."""

    now_s: float
    unix_s: float
    fleet: FleetSnapshot
    mirrored: Mapping[str, int]  # pages each worker is believed to hold
    router: Json


@dataclass(slots=True)
class Board:
    """`frame` and `change` are of the tick `seq`; a change leads from the frame before to this one."""

    requests: LiveRequests
    seq: int = -1
    at_s: float = -math.inf
    frame: Json = field(default_factory=dict)
    change: Json = field(default_factory=dict)
    _workers: dict[str, Json] = field(default_factory=dict)
    _links: dict[tuple[str, str], Json] = field(default_factory=dict)
    _told: int = 0  # ended requests that frames have told of
    _totals: deque[tuple[float, Mapping[str, float]]] = field(default_factory=lambda: deque(maxlen=64))

    def tick(self, look: Look) -> None:
        self.seq += 1
        self.at_s = look.now_s
        began = look.unix_s - look.now_s  # when the monotonic clock was at zero
        views = (*look.fleet.prefill, *look.fleet.decode)
        workers = {view.info.worker_id: _worker(view, look.mirrored) for view in views}
        links = self._new_links(look, views)
        flying = [live.told() for live in self.requests.flying.values()]
        ended = list(self.requests.ended)
        new = ended[max(0, len(ended) - (self.requests.num_ended - self._told)) :]
        self._told = self.requests.num_ended
        shown = flying if len(flying) <= MOST_REQUESTS else flying[: MOST_REQUESTS // 2] + flying[-MOST_REQUESTS // 2 :]
        latency = {
            "ttft": distribution([one.ttft_s for one in ended if one.ttft_s is not None]),
            "tpot": distribution([one.tpot_s for one in ended if one.tpot_s is not None]),
        }
        common: Json = {
            "seq": self.seq,
            "at": round(look.unix_s, 3),
            "router": look.router | {"registry_stale_s": round(look.fleet.registry_stale_s, 3)},
            "requests": [_request(one, began) for one in shown],
            "num_requests": len(flying),
            "latency": latency,
            "now": self._now(look, views, flying, ended, latency),
        }
        self.frame = common | {
            "kind": "frame",
            "workers": list(workers.values()),
            "gone": [],
            "links": list(links.values()),
            "finished": [_request(one, began) for one in ended],
        }
        self.change = common | {
            "kind": "change",
            "workers": [card for worker_id, card in workers.items() if self._workers.get(worker_id) != card],
            "gone": sorted(self._workers.keys() - workers.keys()),
            "links": [link for pair, link in links.items() if self._links.get(pair) != link],
            "finished": [_request(one, began) for one in new],
        }
        self._workers, self._links = workers, links

    def _new_links(self, look: Look, views: Sequence[WorkerView]) -> dict[tuple[str, str], Json]:
        links = {}
        for view in views:
            for link in view.info.links:
                pair = link.source, view.info.worker_id
                before = self._links.get(pair)
                moved = before is not None and link.read_bytes != before["bytes"]
                links[pair] = {
                    "prefill": link.source,
                    "decode": view.info.worker_id,
                    "gb_s": round(link.bytes_per_s / 1e9, 3),
                    "p50_ms": round(link.p50_us / 1e3, 3),
                    "reads": link.reads,
                    "bytes": link.read_bytes,
                    # When bytes were last seen to move, and not when they did: records come once a second.
                    "active_s": round(look.unix_s, 3) if moved or before is None else before["active_s"],
                }
        return links

    def _now(
        self,
        look: Look,
        views: Sequence[WorkerView],
        flying: Sequence[Told],
        ended: Sequence[Told],
        latency: Mapping[str, Json],
    ) -> Json:
        requests = self.requests
        totals = {
            "requests": float(requests.num_ended),
            "generation_tokens": float(
                requests.ended_generated_tokens + sum(one.generated_tokens for one in flying),
            ),
            "prompt_tokens": float(
                requests.ended_computed_tokens + sum(one.done_tokens - one.cached_tokens for one in flying)
            ),
            "read_bytes": float(sum(view.info.read_bytes for view in views)),
        }
        self._totals.append((look.now_s, totals))
        rates = _rates(self._totals)
        prompts = [one for one in ended if one.ttft_s is not None]
        prompt_tokens = sum(one.prompt_tokens for one in prompts)
        return rates | {
            "serving": sum(view.usable for view in views),
            "serving_prefill": sum(view.usable for view in look.fleet.prefill),
            "serving_decode": sum(view.usable for view in look.fleet.decode),
            "running": len(flying),
            "queued_tokens": sum(view.info.queued_tokens for view in look.fleet.prefill),
            "reading_bytes": sum(view.info.reading_bytes for view in views),
            "hit_rate": sum(one.cached_tokens for one in prompts) / prompt_tokens if prompt_tokens else 0.0,
            "hit_window": prompt_tokens,
            "ttft_p50_ms": latency["ttft"].get("p50_ms", 0.0),
        }


def _rates(totals: deque[tuple[float, Mapping[str, float]]]) -> Json:
    """Each total's growth a second since about RATE_S ago; one that shrank, with a worker that left, stood still."""
    now_s, now = totals[-1]
    then_s, then = next((one for one in reversed(totals) if one[0] <= now_s - RATE_S), totals[0])
    seconds = max(now_s - then_s, TICK_S)
    return {f"{name}_s": round(max(0.0, value - then[name]) / seconds, 3) for name, value in now.items()}


def _worker(view: WorkerView, mirrored: Mapping[str, int]) -> Json:
    info = view.info
    return {
        "worker_id": info.worker_id,
        "role": str(info.role),
        "address": info.address,
        "state": state_of(view),
        "model": info.model,
        "epoch": f"{info.epoch:016x}",
        "running": info.running,
        "waiting": info.waiting,
        "queued_tokens": info.queued_tokens,
        "free_tokens": info.free_tokens,
        "total_tokens": info.total_tokens,
        "pages": {
            "free": info.free_pages,
            "used": info.used_pages,
            "cached": info.cached_pages,
            "quarantined": info.quarantined_pages,
        },
        "read_bytes": info.read_bytes,
        "reading_bytes": info.reading_bytes,
        "mirrored_pages": mirrored.get(info.worker_id, 0),
    }


def state_of(view: WorkerView) -> str:
    return "draining" if view.info.draining else "serving" if view.serving else "down"


def _request(told: Told, began: float) -> Json:
    fields: Json = {
        "request_id": told.request_id,
        "arrived": round(began + told.arrived, 3),
        "prefill": told.prefill,
        "decode": told.decode,
        "attempt": told.attempt,
        "prompt_tokens": told.prompt_tokens,
        "cached_tokens": told.cached_tokens,
        "done_tokens": told.done_tokens,
        "generated_tokens": told.generated_tokens,
        "max_tokens": told.max_tokens,
        "phases": [[name, round(starts_s, 6)] for name, starts_s in told.phases],
    }
    if told.ended_s is not None:
        fields["ended_s"] = round(told.ended_s, 6)
    if told.failed:
        fields["failed"] = told.failed
    return fields


def distribution(seconds: Sequence[float]) -> Json:
    """How often which latency: percentiles, and counts between edges that divide each power of ten evenly."""
    values = sorted(max(value * 1e3, 1e-3) for value in seconds)
    if not values:
        return {"num": 0}

    def at(share: float) -> float:
        return round(values[min(len(values) - 1, math.ceil(share * len(values)) - 1)], 3)

    first = math.floor(math.log10(values[0]))
    decades = max(1, math.ceil(math.log10(values[-1]) + 1e-12) - first)
    counts = [0] * (decades * BINS_PER_DECADE)
    for value in values:
        bin_ = int((math.log10(value) - first) * BINS_PER_DECADE)
        counts[min(len(counts) - 1, bin_)] += 1
    edges = [round(10 ** (first + i / BINS_PER_DECADE), 6) for i in range(len(counts) + 1)]
    return {
        "num": len(values),
        "p50_ms": at(0.5),
        "p95_ms": at(0.95),
        "p99_ms": at(0.99),
        "edges_ms": edges,
        "counts": counts,
    }


def now_look(fleet: FleetSnapshot, mirrored: Mapping[str, int], router: Json) -> Look:
    return Look(now_s=time.monotonic(), unix_s=time.time(), fleet=fleet, mirrored=mirrored, router=router)
