"""The frame every worker process runs in: its doors, its place in the registry, its signals and its orderly
end.

What the worker does is the service's business; this file opens the ports, says when the worker takes
requests, and closes everything again within a bound, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry

from wire.door import StatusDoor
from wire.registry import Registry
from wire.rpc import Server
from wire.tracing import tracer
from wire.types import WorkerInfo

log = structlog.get_logger()

POLL_S = 0.05
HEARTBEAT_STOP_S = 2.0
CLOSE_GRACE_S = 1.0
"""After draining, what is left of open calls gets this long to hear that it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    """Where a worker listens and how it is found. Port 0 takes a free one."""

    worker_id: str
    redis_url: str
    host: str = "127.0.0.1"
    port: int = 0
    http_port: int = 0
    advertise_host: str = ""  # what others dial; empty: `host`, or this machine's name when that is a wildcard
    drain_s: float = 30.0  # a stopping worker finishes what it has for at most this long
    otlp_traces_endpoint: str = ""  # see `wire.tracing.tracer`


class WorkerService(Protocol):
    """What the frame needs of a prefill or decode service."""

    draining: bool
    """Set by the frame: take no new requests."""

    def add_to(self, server: Server) -> None:
        """Register the gRPC services."""

    async def run(self) -> None:
        """Work until cancelled, then let go of everything. Returning or raising ends the process."""

    def info(self, address: str) -> WorkerInfo: ...

    def is_idle(self) -> bool:
        """Nobody waits for anything here."""

    @property
    def broken(self) -> str | None:
        """Why this worker should not go on, if so."""


async def serve(service: WorkerService, door: DoorConfig, metrics: CollectorRegistry) -> int:
    """Run the worker until SIGTERM, SIGINT or a fault. Returns the exit code: 0 when it was asked to end,
    else 1.

    The first signal drains: no new requests, the old ones finish, `drain_s` at most. A second one ends at
    once. Raises ConfigError when a port can not be bound or a URL makes no sense.
    """
    spans = tracer(door.otlp_traces_endpoint, service=service.info("").role, instance=door.worker_id)
    Registry(door.redis_url)  # a URL that makes no sense is refused now
    async with contextlib.aclosing(spans):
        server = Server(f"{door.host}:{door.port}", spans)
        service.add_to(server)
        status = StatusDoor(metrics, ready=lambda: not service.draining and service.broken is None)
        try:
            host = _advertised(door)
            address = f"{host}:{await server.start()}"
            http_address = f"{host}:{await status.start(door.host, door.http_port)}"
            return await _work(service, door, server, address, http_address)
        finally:
            await server.drain(CLOSE_GRACE_S)
            await status.stop()


async def _work(service: WorkerService, door: DoorConfig, server: Server, address: str, http_address: str) -> int:
    def info() -> WorkerInfo:
        return replace(service.info(address), http_address=http_address)

    with _signals() as signals:
        work = asyncio.create_task(service.run(), name="service")
        latest = [info()]
        beat = asyncio.create_task(_beat(door.redis_url, lambda: latest[0]), name="heartbeat")
        try:
            await server.set_serving(True)
            log.info("worker_ready", address=address, http_address=http_address, epoch=info().epoch)
            while not signals.asked and service.broken is None and not work.done() and not beat.done():
                await signals.wait(POLL_S)
                latest[0] = info()
            service.draining = True
            latest[0] = info()
            await server.set_serving(False)
            log.info("worker_draining", reason=service.broken or "asked", limit_s=door.drain_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(door.drain_s):
                    while not service.is_idle() and signals.asked < 2 and not work.done():
                        await signals.wait(POLL_S)
            # Open calls end before the service does, so that each hears of its end from a service that still
            # works.
            await server.drain(CLOSE_GRACE_S)
        finally:
            for task in (beat, work):
                task.cancel()
            ends = await asyncio.gather(beat, work, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    log.info("worker_stopped", clean=service.broken is None)
    return 0 if service.broken is None else 1


async def _beat(redis_url: str, info: Callable[[], WorkerInfo]) -> None:
    """Keep the worker's record until cancelled, from a thread of its own: no work on this one may cost the lease.

    Raises what `run_heartbeat` raises.
    """

    async def beat() -> None:
        async with Registry(redis_url) as registry:
            await registry.run_heartbeat(info)

    loop = asyncio.new_event_loop()
    task = loop.create_task(beat())
    here = asyncio.get_running_loop()
    done: asyncio.Future[None] = here.create_future()

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait({task}))
        finally:
            loop.close()
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                here.call_soon_threadsafe(_set, done)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        await asyncio.shield(done)
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(task.cancel)
        await asyncio.to_thread(thread.join, HEARTBEAT_STOP_S)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class _Signals:
    """How often SIGTERM and SIGINT have come."""

    def __init__(self) -> None:
        self.asked = 0
        self._event = asyncio.Event()

    def count(self) -> None:
        self.asked += 1
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Until the next signal, `timeout_s` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
                self._event.clear()


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals, loop = _Signals(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.count)
    try:
        yield signals
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _advertised(door: DoorConfig) -> str:
    if door.advertise_host:
        return door.advertise_host
    return socket.gethostname() if door.host in ("0.0.0.0", "::") else door.host
