"""A worker that says over real gRPC exactly what a script tells it to, so that every order of failure can be had.

It registers and answers health checks like any worker; it has no model and no pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from wire import convert
from wire.errors import StreamGone
from wire.registry import Registry
from wire.rpc import Server
from wire.types import Admitted, Attached, Fetching, Role, RunEvent, RunRequest, StartEvent, StartRequest, WorkerInfo
from wire.v1 import worker_pb2_grpc

SECRET = b"0123456789abcdef"
_epochs = itertools.count(1)

DecodeScript = Callable[[StartRequest], AsyncIterator[StartEvent]]
PrefillScript = Callable[[RunRequest], AsyncIterator[RunEvent]]


@dataclass
class ScriptedWorker:
    info: WorkerInfo
    server: Server
    requests: list[Any] = field(default_factory=list)  # what it was asked, in order
    running: int = 0  # streams open right now

    @contextlib.contextmanager
    def _counted(self, request: Any):
        self.requests.append(request)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class _Decode(worker_pb2_grpc.DecodeServicer):
    def __init__(self, worker: ScriptedWorker, script: DecodeScript) -> None:
        self._worker, self._script = worker, script

    async def Start(self, request: Any, context: Any) -> AsyncIterator[Any]:
        asked = convert.start_request_from_wire(request)
        with self._worker._counted(asked):
            async for event in self._script(asked):
                yield convert.start_event_to_wire(event)

    async def Attach(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """What the last request was, and what the script says of it from its first token on."""
        asked = convert.attach_request_from_wire(request)
        started = [start for start in self._worker.requests if start.request_id == asked.request_id]
        if not started or not started[-1].keep_s:
            raise StreamGone("nothing is kept")
        yield convert.start_event_to_wire(Attached(context=started[-1].context))
        async for event in self._script(started[-1]):
            if not isinstance(event, Admitted | Fetching):
                yield convert.start_event_to_wire(event)


class _Prefill(worker_pb2_grpc.PrefillServicer):
    def __init__(self, worker: ScriptedWorker, script: PrefillScript) -> None:
        self._worker, self._script = worker, script

    async def Run(self, request: Any, context: Any) -> AsyncIterator[Any]:
        asked = convert.run_request_from_wire(request)
        with self._worker._counted(asked):
            async for event in self._script(asked):
                yield convert.run_event_to_wire(event)


@contextlib.asynccontextmanager
async def scripted(
    redis_url: str,
    namespace: str,
    worker_id: str,
    *,
    decode: DecodeScript | None = None,
    prefill: PrefillScript | None = None,
    **info: Any,
) -> AsyncIterator[ScriptedWorker]:
    """A serving, registered worker for the length of the block; it plays `decode` or `prefill`."""
    server = Server()
    defaults = {"model": "m", "signature": "v4", "free_tokens": 8192, "total_tokens": 8192}
    worker = ScriptedWorker(
        WorkerInfo(
            worker_id=worker_id,
            role=Role.DECODE if decode else Role.PREFILL,
            address="",
            epoch=next(_epochs),
            **(defaults | info),
        ),
        server,
    )
    if decode:
        server.add(worker_pb2_grpc.add_DecodeServicer_to_server, _Decode(worker, decode))
    if prefill:
        server.add(worker_pb2_grpc.add_PrefillServicer_to_server, _Prefill(worker, prefill))
    port = await server.start()
    worker.info = replace(worker.info, address=f"127.0.0.1:{port}")
    await server.set_serving(True)
    async with Registry(redis_url, namespace) as registry, asyncio.TaskGroup() as tasks:
        beat = tasks.create_task(registry.run_heartbeat(lambda: worker.info))
        try:
            yield worker
        finally:
            beat.cancel()
            await server.drain(0)


async def admit() -> AsyncIterator[StartEvent]:
    yield Admitted(resident_prefix=0, secret=SECRET)


async def for_ever() -> None:
    await asyncio.Event().wait()
