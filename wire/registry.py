"""Who is alive, as Redis last heard it: workers keep a leased record, routers poll a snapshot.

The registry is a hint for placement and nothing else. Losing Redis therefore raises nothing: a heartbeat
goes on trying, a snapshot keeps its last answer and says since when it is stale. A Redis that comes back
empty is full again after one heartbeat.

Keys: `<namespace>:worker:<id>` holds one record with a TTL; the set `<namespace>:workers` lists the ids, so
nobody scans the keyspace. A record that lost its lease is dropped from the set by whoever reads it next.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType, TracebackType
from typing import Any, Self

import redis.asyncio as aioredis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from wire.convert import WORKER_ID
from wire.errors import ConfigError, Superseded
from wire.types import PROTOCOL_VERSION, Link, Role, WorkerInfo

LEASE_S = 3.0
HEARTBEAT_S = 1.0
SNAPSHOT_TIMEOUT_S = 0.2
HEARTBEAT_TIMEOUT_S = 1.0
MAX_RECORD_BYTES = 16_384
"""A record is about 1 kB; whatever is far larger was not written by a worker."""
MAX_LINKS = 8
"""Pairs that a worker's record tells of: a thousand workers make a quarter of a million, and each router reads them."""

_UINT64 = 1 << 64

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Workers as Redis last answered. `stale_since` is None when that was just now, else a monotonic time."""

    workers: Mapping[str, WorkerInfo] = field(default_factory=lambda: MappingProxyType({}))
    skipped: int = 0  # records of this answer that could not be used
    stale_since: float | None = None


def encode_record(info: WorkerInfo) -> bytes:
    return json.dumps(asdict(info), separators=(",", ":")).encode()


def decode_record(worker_id: str, record: bytes) -> WorkerInfo:
    """A record as a WorkerInfo. Unknown fields are ignored: a later version may have added them.

    Raises ValueError saying what is wrong with it.
    """
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"more than {MAX_RECORD_BYTES} bytes")
    try:
        values = json.loads(record)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if values.get("protocol") != PROTOCOL_VERSION:
        raise ValueError(f"protocol {values.get('protocol')!r}, we speak {PROTOCOL_VERSION}")
    if values.get("worker_id") != worker_id:
        raise ValueError(f"it names worker {values.get('worker_id')!r}")
    known = _checked(values, _FIELDS)
    if (links := values.get("links", [])) and not isinstance(links, list):
        raise ValueError(f"links is {type(links).__name__}, not list")
    if len(links) > MAX_LINKS or not all(isinstance(link, dict) for link in links):
        raise ValueError(f"links is not a list of at most {MAX_LINKS} objects")
    try:
        found = tuple(Link(**_checked(link, _LINK_FIELDS)) for link in links)
        return WorkerInfo(**known | {"role": Role(known.get("role", "")), "links": found})
    except TypeError as error:
        raise ValueError(str(error)) from error


def _checked(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Those of `values` that are known, of their types and in range. Raises ValueError."""
    known: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in values:
            continue
        value = values[name]
        if type(value) is not kind:
            raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
        if isinstance(value, int) and not 0 <= value < _UINT64:
            raise ValueError(f"{name}={value} is out of range")
        known[name] = value
    return known


# JSON has no enums: a role travels as its text.
_KINDS = {"str": str, "int": int, "bool": bool, "Role": str}
_FIELDS: dict[str, type] = {f.name: _KINDS[str(f.type)] for f in fields(WorkerInfo) if f.name != "links"}
_LINK_FIELDS: dict[str, type] = {f.name: _KINDS[str(f.type)] for f in fields(Link)}


class Registry:
    """One process's view of the registry. Use it as `async with`; it owns its connections."""

    def __init__(self, redis_url: str, namespace: str = "penumbra") -> None:
        """Connects lazily. Raises ConfigError for a URL redis-py does not understand."""
        if not WORKER_ID.fullmatch(namespace):
            raise ConfigError(f"registry namespace {namespace!r} must match {WORKER_ID.pattern}.")
        self._prefix = namespace
        self._index = f"{namespace}:workers"
        # A heartbeat may wait and retry, but never past the lease it renews. A snapshot is asked for again
        # in a moment anyway: it fails fast and is not retried.
        patient = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3)
        self._writer = connect(redis_url, HEARTBEAT_TIMEOUT_S, patient)
        self._reader = connect(redis_url, SNAPSHOT_TIMEOUT_S, Retry(NoBackoff(), retries=0))
        self._last = Snapshot(stale_since=time.monotonic())
        self._unusable: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._writer.aclose()
        await self._reader.aclose()

    def _key(self, worker_id: str) -> str:
        return f"{self._prefix}:worker:{worker_id}"

    async def run_heartbeat(self, get_info: Callable[[], WorkerInfo]) -> None:
        """Keep this worker's record alive until cancelled, then remove it.

        `get_info` is asked before every beat. Raises ConfigError at once when its worker id can not be a key, and
        Superseded when another life of the worker has taken the record over: the one that began last keeps it.
        """
        worker_id = get_info().worker_id
        if not WORKER_ID.fullmatch(worker_id):
            raise ConfigError(f"worker id {worker_id[:80]!r} is not 1 to 63 of a-z, 0-9 and '-'; rename it.")
        lost = began = superseded = False
        try:
            while True:
                try:
                    if began and (other := await self._other_life(get_info())):
                        superseded = True
                        raise Superseded(
                            f"worker {worker_id} has begun another life (epoch {other:016x}); this one ends. Give each "
                            "worker an id of its own."
                        )
                    async with asyncio.timeout(LEASE_S), self._writer.pipeline(transaction=True) as beat:
                        beat.set(self._key(worker_id), encode_record(get_info()), px=int(LEASE_S * 1000))
                        beat.sadd(self._index, worker_id)
                        await beat.execute()
                    if lost:
                        log.info("registry_back", worker_id=worker_id)
                    lost, began = False, True
                except (RedisError, OSError, TimeoutError) as error:
                    if not lost:
                        log.warning("registry_lost", worker_id=worker_id, error=str(error))
                    lost = True
                honour_cancellation()
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            if not superseded:
                await self._forget(worker_id)

    async def _other_life(self, info: WorkerInfo) -> int:
        """The epoch under which somebody else keeps this worker's record, or 0."""
        record = await self._writer.get(self._key(info.worker_id))
        if not isinstance(record, bytes):
            return 0
        try:
            epoch = decode_record(info.worker_id, record).epoch
        except ValueError:
            return 0  # not a worker's: it is overwritten
        return 0 if epoch == info.epoch else epoch

    async def _forget(self, worker_id: str) -> None:
        try:
            async with asyncio.timeout(HEARTBEAT_TIMEOUT_S), self._writer.pipeline(transaction=True) as farewell:
                farewell.delete(self._key(worker_id))
                farewell.srem(self._index, worker_id)
                await farewell.execute()
        except (RedisError, OSError, TimeoutError) as error:
            log.info("registry_farewell_failed", worker_id=worker_id, error=str(error), lease_s=LEASE_S)

    async def snapshot(self) -> Snapshot:
        """The workers whose lease is alive; within 200 ms, and without ever raising because of Redis.

        When Redis does not answer, the last snapshot comes back with `stale_since` set.
        """
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                self._last = await self._read()
        except (RedisError, OSError, TimeoutError) as error:
            if self._last.stale_since is None:
                log.warning("registry_stale", error=str(error) or type(error).__name__)
                self._last = Snapshot(
                    workers=self._last.workers, skipped=self._last.skipped, stale_since=time.monotonic()
                )
        honour_cancellation()
        return self._last

    async def _read(self) -> Snapshot:
        listed = sorted(
            name
            for raw in await _await(self._reader.smembers(self._index))
            if WORKER_ID.fullmatch(name := raw.decode("ascii", "replace"))
        )
        # Not MGET: a key of the wrong type spoils its own answer only, and a huge one is not fetched whole.
        pipeline = self._reader.pipeline(transaction=False)
        for worker_id in listed:
            pipeline.getrange(self._key(worker_id), 0, MAX_RECORD_BYTES)
        records = await pipeline.execute(raise_on_error=False) if listed else []
        workers: dict[str, WorkerInfo] = {}
        unusable: dict[str, str] = {}
        expired = []
        for worker_id, record in zip(listed, records, strict=True):
            if record == b"":  # GETRANGE of a key that is gone
                expired.append(worker_id)
                continue
            try:
                if isinstance(record, Exception):
                    raise ValueError(str(record))
                workers[worker_id] = decode_record(worker_id, record)
            except ValueError as error:
                unusable[worker_id] = str(error)
        for worker_id in unusable.keys() - self._unusable.keys():
            log.warning("registry_record_skipped", worker_id=worker_id, reason=unusable[worker_id])
        self._unusable = unusable
        if expired:
            # A worker that beats in between adds itself again a second later.
            await _await(self._reader.srem(self._index, *expired))
        return Snapshot(workers=MappingProxyType(workers), skipped=len(unusable))


def honour_cancellation() -> None:
    """Raise the CancelledError that redis-py may have lost.

    It sends through asyncio.wait_for, which before Python 3.12 returns normally when a cancellation arrives as the
    send completes. A loop around such a call would then run for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _await(answer: Any) -> Any:
    """redis-py types one command for its blocking and its asyncio client together."""
    return await answer


def connect(url: str, timeout_s: float, retry: Retry, *, max_connections: int = 2) -> aioredis.Redis:
    """A client that connects when first used, and whose callers wait for one of `max_connections`.

    Raises ConfigError for a URL redis-py does not understand.
    """
    try:
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=retry,
            max_connections=max_connections,
        )
    except ValueError as error:
        # Not with the URL itself, which may hold a password.
        raise ConfigError(f"The redis URL makes no sense: {error}") from error
    pool.connection_class = type("Connection", (_Told, pool.connection_class), {})
    return aioredis.Redis.from_pool(pool)


class _Told:
    """A connection whose end is told as redis-py tells it, whatever the event loop says.

    uvloop answers a write to a connection that the other side has reset with a RuntimeError, which is nobody's idea of
    Redis being away.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisConnectionError(f"The connection to Redis is gone: {error}") from error
