"""What each worker's prefix cache holds, as far as this router has heard: a hint for placement.

PrefixMirror decides and is pure; `follow` carries out: it reads snapshots and streams until cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import structlog
from redis.exceptions import RedisError

from wire.events import KEY_BYTES, MAX_PAGES, Entry, PageSnapshot, PrefixReader, apply
from wire.telemetry import RouterMetrics
from wire.types import PAGE_TOKENS, Stored

RESYNC_PAUSE_S = 0.2
"""Between two looks at a stream that can not be followed: its worker may just be starting."""

SILENCE_PAUSE_S = 1.0

log = structlog.get_logger()


class Outcome(Enum):
    """What became of an entry."""

    APPLIED = "applied"
    SKIPPED = "skipped"  # known already, or of a worker that waits for its snapshot
    GAP = "gap"  # it does not follow what was known, which counts for nothing any more


@dataclass(slots=True)
class _Held:
    epoch: int
    number: int | None = None  # the last entry applied; None: needs a snapshot
    keys: set[bytes] = field(default_factory=set)


class PrefixMirror:
    """The pages of every followed worker. One that can not be followed holds nothing, until it can be again."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def follow(self, workers: Mapping[str, int]) -> None:
        """Follow these lives: epoch by worker id. All others are forgotten."""
        for worker_id in self._held.keys() - workers.keys():
            del self._held[worker_id]
        for worker_id, epoch in workers.items():
            held = self._held.get(worker_id)
            if held is None or held.epoch != epoch:
                self._held[worker_id] = _Held(epoch)

    def unsynced(self) -> list[str]:
        """Workers whose snapshot has to be read next."""
        return [worker_id for worker_id, held in self._held.items() if held.number is None]

    def positions(self) -> dict[str, int]:
        """The last entry applied of every worker that needs no snapshot."""
        return {worker_id: held.number for worker_id, held in self._held.items() if held.number is not None}

    def load(self, worker_id: str, snapshot: PageSnapshot | None) -> None:
        """Start from the snapshot; without one, or with one of another life, from an empty cache."""
        held = self._held.get(worker_id)
        if held is None:
            return
        if snapshot is None or snapshot.epoch != held.epoch:
            held.number, held.keys = 0, set()
        else:
            held.number, held.keys = snapshot.number, set(snapshot.keys)

    def apply(self, worker_id: str, entry: Entry) -> Outcome:
        held = self._held.get(worker_id)
        if held is None or held.number is None:
            return Outcome.SKIPPED
        if entry.epoch == held.epoch and 0 < entry.number <= held.number:
            return Outcome.SKIPPED
        if entry.epoch != held.epoch or entry.number != held.number + 1 or len(held.keys) > MAX_PAGES:
            held.number, held.keys = None, set()
            return Outcome.GAP
        apply(held.keys, entry.events)
        held.number = entry.number
        return Outcome.APPLIED

    def resident_tokens(self, worker_id: str, digests: Sequence[bytes]) -> int:
        """Tokens of a prompt with these page digests, cut or whole, that the worker holds from the start on."""
        held = self._held.get(worker_id)
        if held is None:
            return 0
        keys = held.keys
        num_pages = next((page for page, digest in enumerate(digests) if digest[:KEY_BYTES] not in keys), len(digests))
        return num_pages * PAGE_TOKENS

    def num_pages(self) -> dict[str, int]:
        """Pages known to be held, by worker id."""
        return {worker_id: len(held.keys) for worker_id, held in self._held.items()}


async def follow(
    mirror: PrefixMirror, reader: PrefixReader, workers: Callable[[], Mapping[str, int]], metrics: RouterMetrics
) -> None:
    """Keep the mirror as fresh as Redis allows, until cancelled. `workers` gives the epoch of each worker id."""
    silent = False
    while True:
        mirror.follow(workers())
        try:
            for worker_id in mirror.unsynced():
                mirror.load(worker_id, await reader.snapshot(worker_id))
            entries = await reader.entries(mirror.positions())
        except (RedisError, OSError, TimeoutError) as error:
            # What was known stays: the workers' caches did not change because Redis is away.
            if not silent:
                log.warning("prefix_mirror_stale", error=str(error) or type(error).__name__)
            silent = True
            await asyncio.sleep(SILENCE_PAUSE_S)
            continue
        silent = False
        whole = True
        for worker_id, entry in entries:
            match mirror.apply(worker_id, entry):
                case Outcome.GAP:
                    whole = False
                    metrics.prefix_gaps.inc()
                case Outcome.APPLIED:
                    for event in entry.events:
                        kind = "stored" if isinstance(event, Stored) else "removed"
                        metrics.prefix_events.labels(kind).inc(len(event.digests))
        if not whole:
            await asyncio.sleep(RESYNC_PAUSE_S)
