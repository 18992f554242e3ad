"""Which pages each worker's prefix cache holds, told through Redis: workers publish, routers follow.

Every life (epoch) of a worker numbers its entries 1, 2, 3, ... in the stream `<namespace>:prefix:<id>`; the entry's
id carries the number. `<namespace>:prefix:<id>:pages` holds a snapshot: all pages after one of those numbers. It is
written again whenever the stream is trimmed, so snapshot and stream together are always complete: a
router that starts late, or finds a number missing, reads the snapshot and goes on from there. A publisher that had
to drop events (Redis was away, or slower than the cache) writes a snapshot and leaves a number out.

Both keys expire unless their worker renews them. All of this is a hint for placement: digests travel as their first
8 bytes, and losing Redis costs better choices, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from wire.convert import WORKER_ID
from wire.errors import ConfigError
from wire.registry import connect, honour_cancellation
from wire.types import PrefixEvent, Removed, Stored

KEY_BYTES = 8
"""What is left of a digest here. Two of a million pages share 8 bytes once in 37 million fleets."""

BATCH_S = 0.05  # events of this long travel as one entry
BLOCK_S = 0.25  # a router that waits for entries looks at its list of workers this often
REFRESH_S = 5.0
KEY_TTL_S = 30.0
TIMEOUT_S = 2.0
RETRY_S = 0.5

MAX_PENDING_PAGES = 1 << 17
"""Pages in events not yet sent; beyond, a snapshot is shorter than the history."""
SNAPSHOT_ENTRIES, SNAPSHOT_PAGES = 256, 1 << 16
"""After so many entries, or pages in them, the snapshot is written again and the stream trimmed."""
KEPT_ENTRIES = 32
"""Entries from before a snapshot that stay, some two seconds of them: who is slower reads the snapshot."""
MAX_PAGES = 1 << 22
"""Pages of one worker a router remembers: a billion tokens."""

_HEAD = struct.Struct("<QQ")  # epoch, number
_OP = struct.Struct("<cI")  # kind, count; then the keys
_STORED, _REMOVED = b"S", b"R"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a worker's stream. Digests in `events` are cut to 8 bytes, parents are left out."""

    epoch: int
    number: int
    events: tuple[PrefixEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class PageSnapshot:
    """All pages a worker held after entry `number` of its life `epoch`."""

    epoch: int
    number: int
    keys: AbstractSet[bytes] = field(repr=False)


# Bytes


def encode_events(events: Iterable[PrefixEvent]) -> bytes:
    """Digests may be whole or cut already."""
    parts = []
    for event in events:
        kind = _STORED if isinstance(event, Stored) else _REMOVED
        parts.append(_OP.pack(kind, len(event.digests)))
        parts += cut(event.digests)
    return b"".join(parts)


def decode_events(data: bytes) -> tuple[PrefixEvent, ...]:
    """Raises ValueError for bytes no publisher wrote."""
    events: list[PrefixEvent] = []
    at = 0
    while at < len(data):
        if len(data) < at + _OP.size:
            raise ValueError(f"{len(data)} bytes end inside an event's head")
        kind, count = _OP.unpack_from(data, at)
        at += _OP.size
        if kind not in (_STORED, _REMOVED) or len(data) < at + count * KEY_BYTES:
            raise ValueError(f"{len(data)} bytes do not hold {count} pages of kind {kind!r} at {at}")
        digests = tuple(_keys(data[at : at + count * KEY_BYTES]))
        events.append(Stored(digests) if kind == _STORED else Removed(digests))
        at += count * KEY_BYTES
    return tuple(events)


def encode_snapshot(snapshot: PageSnapshot) -> bytes:
    return _HEAD.pack(snapshot.epoch, snapshot.number) + b"".join(snapshot.keys)


def decode_snapshot(data: bytes) -> PageSnapshot:
    """Raises ValueError for bytes no publisher wrote."""
    if len(data) < _HEAD.size or (len(data) - _HEAD.size) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no snapshot of pages")
    if len(data) > _HEAD.size + MAX_PAGES * KEY_BYTES:
        raise ValueError(f"more than {MAX_PAGES} pages")
    epoch, number = _HEAD.unpack_from(data)
    return PageSnapshot(epoch, number, frozenset(_keys(data[_HEAD.size :])))


def _keys(data: bytes) -> list[bytes]:
    return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]


def cut(digests: Iterable[bytes]) -> list[bytes]:
    """Digests as they travel here. Cut once, they are looked up for many workers faster than whole ones."""
    return [digest[:KEY_BYTES] for digest in digests]


def apply(keys: set[bytes], events: Iterable[PrefixEvent]) -> None:
    """Change a set of page keys as the events say."""
    for event in events:
        change = keys.update if isinstance(event, Stored) else keys.difference_update
        change(cut(event.digests))


# The worker's side


class PrefixPublisher:
    """Tells routers what one life of a worker holds. Use it as `async with`; inside, `publish` costs no waiting.

    All methods belong to one event loop. Nothing here raises because of Redis.
    """

    def __init__(self, redis_url: str, worker_id: str, epoch: int, namespace: str = "penumbra") -> None:
        """Raises ConfigError for a URL redis-py does not understand, or ids that can not be keys."""
        self._stream, self._snapshot_key = _redis_keys(namespace, worker_id)
        self._worker_id = worker_id
        self._epoch = epoch
        self._redis = connect(redis_url, TIMEOUT_S, Retry(NoBackoff(), retries=0))
        self._keys: set[bytes] = set()
        self._number = 0
        self._pending: list[PrefixEvent] = []
        self._num_pending = 0
        self._since_snapshot = [0, 0]  # entries, pages
        # Whatever an earlier life left behind goes first.
        self._dropped = True
        self._lost = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="prefix-publisher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled() and (fault := self._task.exception()):
            log.error("prefix_events_crashed", worker_id=self._worker_id, exc_info=fault)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                await self._redis.delete(self._stream, self._snapshot_key)
        await self._redis.aclose()

    def publish(self, events: Sequence[PrefixEvent]) -> None:
        """Pass the events on, in order, within about 50 ms if Redis is there."""
        if not events:
            return
        apply(self._keys, events)
        self._pending += events
        self._num_pending += sum(len(event.digests) for event in events)
        if self._num_pending > MAX_PENDING_PAGES:
            self._dropped = True
        if self._dropped:
            self._pending, self._num_pending = [], 0
        self._wake.set()

    async def _run(self) -> None:
        renewed = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    if self._dropped:
                        await self._start_over()
                    if self._pending:
                        await self._send()
                    if time.monotonic() - renewed >= REFRESH_S:
                        renewed = time.monotonic()
                        await self._renew()
                if self._lost:
                    log.info("prefix_events_back", worker_id=self._worker_id)
                self._lost = False
            except (RedisError, OSError, TimeoutError) as error:
                if not self._lost:
                    log.warning("prefix_events_lost", worker_id=self._worker_id, error=str(error))
                self._lost = self._dropped = True
                await asyncio.sleep(RETRY_S)
            honour_cancellation()
            self._wake.clear()
            if not self._pending and not self._dropped:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await self._wake.wait()
            await asyncio.sleep(BATCH_S)

    async def _start_over(self) -> None:
        """A snapshot, and behind it an entry whose number shows everyone that one was left out."""
        self._pending, self._num_pending = [], 0
        self._number += 2
        snapshot = encode_snapshot(PageSnapshot(self._epoch, self._number - 1, self._keys))
        self._dropped = False
        async with self._redis.pipeline(transaction=True) as batch:
            batch.set(self._snapshot_key, snapshot, px=_ms(KEY_TTL_S))
            batch.delete(self._stream)
            self._add(batch, b"")
            await batch.execute()
        self._since_snapshot = [0, 0]

    async def _send(self) -> None:
        events, num_pages = self._pending, self._num_pending
        self._pending, self._num_pending = [], 0
        self._number += 1
        async with self._redis.pipeline(transaction=True) as batch:
            self._add(batch, encode_events(events))
            await batch.execute()
        self._since_snapshot[0] += 1
        self._since_snapshot[1] += num_pages
        if self._since_snapshot[0] >= SNAPSHOT_ENTRIES or self._since_snapshot[1] >= SNAPSHOT_PAGES:
            await self._write_snapshot()

    async def _renew(self) -> None:
        async with self._redis.pipeline(transaction=True) as batch:
            batch.pexpire(self._snapshot_key, _ms(KEY_TTL_S))
            batch.pexpire(self._stream, _ms(KEY_TTL_S))
            there, _ = await batch.execute()
        if not there:  # Redis lost its data without losing us
            await self._write_snapshot()

    async def _write_snapshot(self) -> None:
        # Events still pending are in `_keys` already; applying them once more, in order, changes nothing.
        snapshot = encode_snapshot(PageSnapshot(self._epoch, self._number, self._keys))
        async with self._redis.pipeline(transaction=True) as batch:
            batch.set(self._snapshot_key, snapshot, px=_ms(KEY_TTL_S))
            batch.xtrim(self._stream, maxlen=KEPT_ENTRIES, approximate=False)
            await batch.execute()
        self._since_snapshot = [0, 0]

    def _add(self, batch: Any, data: bytes) -> None:
        batch.xadd(self._stream, {"epoch": f"{self._epoch:016x}", "events": data}, id=f"{self._number}-0")
        batch.pexpire(self._stream, _ms(KEY_TTL_S))


# The router's side


class PrefixReader:
    """Reads what publishers wrote. Use it as `async with`; it owns its connections.

    Its calls raise RedisError, OSError or TimeoutError when Redis does not answer.
    """

    def __init__(self, redis_url: str, namespace: str = "penumbra") -> None:
        self._namespace = namespace
        self._redis = connect(redis_url, TIMEOUT_S, Retry(NoBackoff(), retries=0))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._redis.aclose()

    async def snapshot(self, worker_id: str) -> PageSnapshot | None:
        """None when there is none that can be read."""
        _, key = _redis_keys(self._namespace, worker_id)
        async with asyncio.timeout(TIMEOUT_S):
            data: Any = await self._redis.getrange(key, 0, _HEAD.size + MAX_PAGES * KEY_BYTES)
        honour_cancellation()
        try:
            return decode_snapshot(data) if data else None
        except ValueError as error:
            log.warning("prefix_snapshot_skipped", worker_id=worker_id, reason=str(error))
            return None

    async def entries(self, after: Mapping[str, int]) -> list[tuple[str, Entry]]:
        """(worker id, entry) behind the given number of each worker, in order; waits a quarter second at most.

        An entry that can not be read comes as number 0, which no worker uses.
        """
        names = {_redis_keys(self._namespace, worker_id)[0]: worker_id for worker_id in after}
        if not names:
            await asyncio.sleep(BLOCK_S)
            return []
        positions: Any = {stream: f"{after[worker_id]}-0" for stream, worker_id in names.items()}
        async with asyncio.timeout(BLOCK_S + TIMEOUT_S):
            answer: Any = await self._redis.xread(positions, count=64, block=_ms(BLOCK_S))
        honour_cancellation()
        pairs = answer.items() if isinstance(answer, dict) else answer
        found = []
        for stream, entries in pairs:
            worker_id = names[stream.decode()]
            for entry_id, fields in entries:
                try:
                    number = int(entry_id.partition(b"-")[0])
                    entry = Entry(int(fields[b"epoch"], 16), number, decode_events(fields[b"events"]))
                except (ValueError, KeyError, TypeError) as error:
                    log.warning("prefix_entry_skipped", worker_id=worker_id, reason=str(error))
                    entry = Entry(0, 0)
                found.append((worker_id, entry))
        return found


def _redis_keys(namespace: str, worker_id: str) -> tuple[str, str]:
    """The names of a worker's stream and of its snapshot."""
    for name in (namespace, worker_id):
        if not WORKER_ID.fullmatch(name):
            raise ConfigError(f"{name[:80]!r} is not 1 to 63 of a-z, 0-9 and '-'; rename it.")
    stream = f"{namespace}:prefix:{worker_id}"
    return stream, f"{stream}:pages"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
