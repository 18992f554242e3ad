"""How fast pages come from each other worker, as this worker's own reads have shown."""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from kvtransfer.plan import item_bytes
from kvtransfer.reader import ReadJob, ReadResult
from wire.registry import MAX_LINKS
from wire.types import Link

WINDOW = 64
"""Reads of one pair that its speed is taken from."""

MAX_PEERS = 1024
"""Pairs remembered; the one unused for longest is forgotten first."""


@dataclass(slots=True)
class _Peer:
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # (bytes, seconds)
    reads: int = 0
    read_bytes: int = 0


class Links:
    """Told of every read job, by the event loop and by the reader's thread; asked for a report by the heartbeat."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[str, int]] = {}  # being read: from whom, bytes
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # the last one used, last
        self.read_bytes = 0

    def submitted(self, job: ReadJob) -> None:
        sizes = {region_class.name: item_bytes(region_class) for region_class in job.card.classes}
        num_bytes = sum(len(group.items) * sizes.get(group.page_class, 0) for group in job.groups)
        with self._lock:
            self._jobs[job.job_id] = (job.card.worker_id, num_bytes)

    def ended(self, result: ReadResult) -> None:
        with self._lock:
            source, _ = self._jobs.pop(result.job_id, ("", 0))
            if not source or not result.ok or not result.num_bytes:
                return
            peer = self._peers.setdefault(source, _Peer())
            self._peers.move_to_end(source)
            if len(self._peers) > MAX_PEERS:
                self._peers.popitem(last=False)
            peer.recent.append((result.num_bytes, result.seconds))
            peer.reads += 1
            peer.read_bytes += result.num_bytes
            self.read_bytes += result.num_bytes

    @property
    def reading_bytes(self) -> int:
        """Of jobs submitted and not ended."""
        with self._lock:
            return sum(num_bytes for _, num_bytes in self._jobs.values())

    def report(self) -> tuple[Link, ...]:
        """The pairs used last, latest first."""
        with self._lock:
            return tuple(_link(source, self._peers[source]) for source in list(reversed(self._peers))[:MAX_LINKS])


def _link(source: str, peer: _Peer) -> Link:
    seconds = [took for _, took in peer.recent]
    return Link(
        source=source,
        bytes_per_s=round(sum(size for size, _ in peer.recent) / max(sum(seconds), 1e-9)),
        p50_us=round(statistics.median(seconds) * 1e6),
        reads=peer.reads,
        read_bytes=peer.read_bytes,
    )
