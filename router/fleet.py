"""Who can take work: the registry says who exists, each worker's own health stream says whether it serves.

FleetCore decides and is pure; Fleet carries out: one poll of the registry, one health watch per worker, and the
channels, which stay open as long as a request is on the worker, whatever the registry says meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from wire.registry import Registry
from wire.rpc import open_channel
from wire.types import Role, WorkerInfo, WorkerRef

UNLISTED_GRACE_S = 5.0
"""A worker that serves but is not listed stays in placement this long: a registry that came back empty lists
everyone again within a lease (3 s), and a worker that means to leave says so on its health stream."""

FIND_AGAIN_S = 0.05
WATCH_BACKOFF_S = (0.1, 2.0)  # first and longest pause between two attempts to watch a worker

log = structlog.get_logger()


# What placement sees


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as this router sees it. `assigned_*` is this router's own work on it, ahead of its next report."""

    info: WorkerInfo
    serving: bool
    assigned_requests: int = 0
    assigned_tokens: int = 0  # prompt tokens still to prefill, or decode's prompt and answer tokens
    assigned_at_report: int = 0  # requests, when the worker's record came

    @property
    def usable(self) -> bool:
        return self.serving and not self.info.draining

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens in front of a new request on a prefill worker."""
        return max(self.info.queued_tokens, self.assigned_tokens)

    @property
    def num_requests(self) -> int:
        return max(self.info.running + self.info.waiting, self.assigned_requests)

    @property
    def free_places(self) -> int | None:
        """Requests that can run beside those there are; None where the worker does not say how many it takes."""
        if not self.info.max_requests:
            return None
        of_others = max(0, self.info.running + self.info.waiting - self.assigned_at_report)
        return self.info.max_requests - self.assigned_requests - of_others

    @property
    def free_tokens(self) -> int:
        return min(self.info.free_tokens, max(0, self.info.total_tokens - self.assigned_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSnapshot:
    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()
    registry_stale_s: float = 0.0


# The core


@dataclass(frozen=True, slots=True)
class Listed:
    """The registry answered with these workers."""

    workers: Mapping[str, WorkerInfo]


@dataclass(frozen=True, slots=True)
class RegistrySilent:
    """The registry did not answer."""


@dataclass(frozen=True, slots=True)
class HealthChanged:
    ref: WorkerRef
    serving: bool


@dataclass(frozen=True, slots=True)
class Assigned:
    """A request was placed on the worker (or left it, with negative numbers)."""

    worker_id: str
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StartWatch:
    ref: WorkerRef


@dataclass(frozen=True, slots=True)
class StopWatch:
    ref: WorkerRef


FleetEvent = Listed | RegistrySilent | HealthChanged | Assigned
FleetAction = StartWatch | StopWatch


@dataclass(slots=True)
class _Known:
    info: WorkerInfo
    serving: bool = False
    assigned_at_report: int = 0
    unlisted_since: float | None = None


@dataclass(slots=True)
class _Load:
    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class FleetCore:
    """Workers by id, decided from events alone. Times are monotonic seconds."""

    _known: dict[str, _Known] = field(default_factory=dict)
    _loads: dict[str, _Load] = field(default_factory=dict)
    _silent_since: float | None = None

    def step(self, now: float, event: FleetEvent) -> list[FleetAction]:
        match event:
            case Listed(workers):
                self._silent_since = None
                return self._listed(now, workers)
            case RegistrySilent():
                # Nobody is forgotten: what was known holds as long as each worker's own health does.
                if self._silent_since is None:
                    self._silent_since = now
            case HealthChanged(ref, serving):
                known = self._known.get(ref.worker_id)
                if known is not None and known.info.ref == ref:
                    known.serving = serving
            case Assigned(worker_id, requests, tokens):
                load = self._loads.setdefault(worker_id, _Load())
                load.requests += requests
                load.tokens += tokens
                if load.requests == 0:
                    del self._loads[worker_id]
        return []

    def _listed(self, now: float, workers: Mapping[str, WorkerInfo]) -> list[FleetAction]:
        actions: list[FleetAction] = []
        for worker_id, info in workers.items():
            known = self._known.get(worker_id)
            if known is not None and known.info.ref == info.ref:
                if known.info != info:
                    known.assigned_at_report = self._loads.get(worker_id, _Load()).requests
                known.info, known.unlisted_since = info, None
                continue
            if known is not None:  # the same id in a new life: nothing known of the old one holds
                actions.append(StopWatch(known.info.ref))
            self._known[worker_id] = _Known(info)
            actions.append(StartWatch(info.ref))
        for worker_id in self._known.keys() - workers.keys():
            known = self._known[worker_id]
            if known.unlisted_since is None:
                known.unlisted_since = now
            if not known.serving or now - known.unlisted_since >= UNLISTED_GRACE_S:
                del self._known[worker_id]
                actions.append(StopWatch(known.info.ref))
        return actions

    def snapshot(self, now: float) -> FleetSnapshot:
        views: dict[Role, list[WorkerView]] = {Role.PREFILL: [], Role.DECODE: []}
        for worker_id, known in sorted(self._known.items()):
            load = self._loads.get(worker_id, _Load())
            views[known.info.role].append(
                WorkerView(
                    info=known.info,
                    serving=known.serving,
                    assigned_requests=load.requests,
                    assigned_tokens=load.tokens,
                    assigned_at_report=known.assigned_at_report,
                )
            )
        return FleetSnapshot(
            prefill=tuple(views[Role.PREFILL]),
            decode=tuple(views[Role.DECODE]),
            registry_stale_s=0.0 if self._silent_since is None else now - self._silent_since,
        )


# The shell


@dataclass(slots=True)
class _Connection:
    channel: grpc.aio.Channel
    users: int = 0


class Fleet:
    """The running view. `run` is its one task; everything it starts ends with it."""

    def __init__(self, registry: Registry, *, poll_s: float) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self._core = FleetCore()
        self._models: frozenset[str] = frozenset()
        self._watches: dict[WorkerRef, asyncio.Task[None]] = {}
        self._connections: dict[WorkerRef, _Connection] = {}
        self._turns = itertools.count()
        self._on_leaving: dict[WorkerRef, dict[int, Callable[[], None]]] = {}

    def next_turn(self) -> int:
        """Counts placements."""
        return next(self._turns)

    def snapshot(self) -> FleetSnapshot:
        return self._core.snapshot(time.monotonic())

    async def found(self) -> None:
        """Returns once there is a worker of each role that serves."""
        while True:
            fleet = self.snapshot()
            if any(view.usable for view in fleet.prefill) and any(view.usable for view in fleet.decode):
                return
            await asyncio.sleep(FIND_AGAIN_S)

    def epochs(self) -> dict[str, int]:
        """Which life of each known worker is the current one."""
        fleet = self.snapshot()
        return {view.info.worker_id: view.info.epoch for view in (*fleet.prefill, *fleet.decode)}

    def models(self) -> frozenset[str]:
        """Fingerprints of the models that workers serve right now. From any thread."""
        return self._models

    async def run(self) -> None:
        """Poll and watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                listed = await self._registry.snapshot()
                event = Listed(listed.workers) if listed.stale_since is None else RegistrySilent()
                for action in self._core.step(time.monotonic(), event):
                    match action:
                        case StartWatch(ref):
                            log.info("worker_found", worker_id=ref.worker_id, address=ref.address)
                            self._watches[ref] = tasks.create_task(self._watch(ref), name=f"watch {ref.worker_id}")
                        case StopWatch(ref):
                            log.info("worker_gone", worker_id=ref.worker_id, address=ref.address)
                            self._watches.pop(ref).cancel()
                fleet = self.snapshot()
                self._models = frozenset(view.info.model for view in (*fleet.prefill, *fleet.decode))
                await asyncio.sleep(self._poll_s)

    async def _watch(self, ref: WorkerRef) -> None:
        """Follow one worker's health for as long as it is known."""
        first, longest = WATCH_BACKOFF_S
        pause = first
        try:
            async with self.channel(ref) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while True:
                    try:
                        served = False
                        async for status in stub.Watch(health_pb2.HealthCheckRequest(service="")):
                            serving = status.status == health_pb2.HealthCheckResponse.SERVING
                            self._health(ref, serving)
                            pause = first
                            if served and not serving:
                                self._leaving(ref)
                            served = serving
                    except grpc.aio.AioRpcError as error:
                        log.debug("watch_broken", worker_id=ref.worker_id, status=error.code().name)
                    self._health(ref, False)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, longest)
        finally:
            self._health(ref, False)

    def _health(self, ref: WorkerRef, serving: bool) -> None:
        self._core.step(time.monotonic(), HealthChanged(ref, serving))

    def _leaving(self, ref: WorkerRef) -> None:
        """The worker says itself that it takes no more; whoever has work there may want to move it."""
        for call in list(self._on_leaving.get(ref, {}).values()):
            call()

    @contextlib.contextmanager
    def told_of_leaving(self, ref: WorkerRef, call: Callable[[], None]) -> Iterator[None]:
        """While inside, `call` is called when the worker begins to drain."""
        calls, key = self._on_leaving.setdefault(ref, {}), next(self._turns)
        calls[key] = call
        try:
            yield
        finally:
            del calls[key]
            if not calls:
                self._on_leaving.pop(ref, None)

    @contextlib.contextmanager
    def assigned(self, ref: WorkerRef, tokens: int) -> Iterator[None]:
        """Count one request of `tokens` against the worker while inside, ahead of the worker's own reports."""
        self._core.step(time.monotonic(), Assigned(ref.worker_id, 1, tokens))
        try:
            yield
        finally:
            self._core.step(time.monotonic(), Assigned(ref.worker_id, -1, -tokens))

    @contextlib.asynccontextmanager
    async def channel(self, ref: WorkerRef) -> AsyncIterator[grpc.aio.Channel]:
        """The one channel to this life of the worker; closed when its last user leaves."""
        connection = self._connections.get(ref)
        if connection is None:
            connection = self._connections[ref] = _Connection(open_channel(ref.address))
        connection.users += 1
        try:
            yield connection.channel
        finally:
            connection.users -= 1
            if connection.users == 0:
                del self._connections[ref]
                await connection.channel.close(None)
