"""Router, prefill and decode worker over real gRPC, and one message of each kind there is that never arrives.

Whatever is lost, every wait ends, and what follows it is right: an answer comes whole, and who only reads or measures
is told, and may ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from decode_worker import probe
from deploy.redis import EmbeddedRedis
from router.attempts import RelayLimits, RelayRequest
from router.fleet import Fleet, WorkerView
from router.mirror import PrefixMirror
from router.placement import PlacementRules
from router.relay import relay
from router.streams import Context, StreamId, attach
from tests.decode_worker.oracle import VOCAB, OracleRunner, answer, pair, until
from tests.decode_worker.test_kept import start
from tests.decode_worker.test_service import prompt_of, start_request
from wire import convert
from wire.errors import WorkerLost
from wire.registry import Registry
from wire.rpc import Server
from wire.types import Failed, Finished, SamplingParams, Tokens, WorkerInfo
from wire.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

names = (f"dropping-{n}" for n in itertools.count())
LIMITS = RelayLimits(
    max_attempts=3,
    migration_limit=3,
    migration_patience_s=5,
    admission_s=2,
    prefill_queue_s=2,
    prefill_silence_s=2,
    token_silence_s=2,
    token_silence_factor=10,
)
NEVER = {
    # An Attach gives the answer from its first token, and how it ended; a lent page is nobody's answer.
    *(("Attach", kind) for kind in ("admitted", "fetching", "progress", "replaying")),
    ("Lend", "tail"),
    ("Start", "attached"),
}
"""What a message could carry there, and no worker ever says."""


def messages() -> list[tuple[str, str]]:
    """Every message of every method in proto/, by its method and the part that makes it what it is."""
    found = []
    for file in (worker_pb2.DESCRIPTOR, kv_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                parts = [field.name for field in method.output_type.fields if field.message_type is not None]
                found += [(method.name, kind) for kind in ("request", *(parts or ["reply"]))]
    return [message for message in found if message not in NEVER]


def of(*methods: str) -> list[tuple[str, str]]:
    return [message for message in messages() if message[0] in methods]


class Losing:
    """Loses the first message of one kind, for all servers together."""

    def __init__(self, method: str, kind: str) -> None:
        self.method, self.kind, self.lost = method, kind, 0

    def takes(self, method: str, kinds: set[str]) -> bool:
        if self.lost or method != self.method or self.kind not in kinds:
            return False
        self.lost += 1
        return True


class LosingServer(Server):
    def __init__(self, losing: Losing, breaks_at: int | None) -> None:
        super().__init__()
        self._losing, self._breaks_at = losing, breaks_at

    def add(self, register: Callable[[Any, Any], None], servicer: object) -> None:
        super().add(register, _Lossy(servicer, self._losing, self._breaks_at))

    async def start(self) -> int:
        port = await super().start()
        await self.set_serving(True)
        return port


class _Lossy:
    """A servicer whose messages pass through `losing`. The first attempt's answer breaks off at token `breaks_at`."""

    def __init__(self, servicer: Any, losing: Losing, breaks_at: int | None) -> None:
        def stream(name: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                if losing.takes(name, {"request"}):
                    await asyncio.Event().wait()  # it never came, and the caller does not know
                async with contextlib.aclosing(getattr(servicer, name)(request, context)) as replies:
                    async for reply in replies:
                        if losing.takes(name, {field.name for field, _ in reply.ListFields()}):
                            continue
                        yield reply
                        if name == "Start" and breaks_at in [token.index for token in reply.tokens.tokens]:
                            raise WorkerLost("it broke off")

            return call

        def unary(name: str) -> Callable[[Any, Any], Awaitable[Any]]:
            async def call(request: Any, context: Any) -> Any:
                if losing.takes(name, {"request"}):
                    await asyncio.Event().wait()
                reply = await getattr(servicer, name)(request, context)
                if losing.takes(name, {"reply"}):
                    await asyncio.Event().wait()
                return reply

            return call

        self._servicer = servicer
        for file in (worker_pb2.DESCRIPTOR, kv_pb2.DESCRIPTOR):
            for service in file.services_by_name.values():
                for method in service.methods:
                    if hasattr(servicer, method.name):
                        setattr(self, method.name, (stream if method.server_streaming else unary)(method.name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servicer, name)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@contextlib.asynccontextmanager
async def fleet_of(redis_url: str, namespace: str, *infos: WorkerInfo) -> AsyncIterator[Fleet]:
    """The router's view of these, over a real registry."""
    async with Registry(redis_url, namespace) as registry, asyncio.TaskGroup() as tasks:
        fleet = Fleet(registry, poll_s=0.05)
        running = [tasks.create_task(fleet.run())]
        for info in infos:
            running.append(tasks.create_task(registry.run_heartbeat(lambda info=info: info)))  # type: ignore[misc]
        try:
            await until(lambda: [view.usable for view in _views(fleet)] == [True] * len(infos))
            yield fleet
        finally:
            for task in running:
                task.cancel()


def _views(fleet: Fleet) -> list[WorkerView]:
    seen = fleet.snapshot()
    return [*seen.prefill, *seen.decode]


def test_every_message_of_every_method_is_lost_in_one_of_these_tests() -> None:
    walked = [*of("Start", "Run", "Claim", "Release"), *of("Probe", "Lend"), *of("Attach")]
    assert sorted(walked) == sorted(messages())
    assert len(messages()) == 28


@pytest.mark.parametrize(("method", "kind"), of("Start", "Run", "Claim", "Release"), ids=lambda word: word)
async def test_a_message_that_is_lost_costs_time_and_nothing_else(redis_url: str, method: str, kind: str) -> None:
    """Its answer moves once where that makes the message be sent; what a worker fails at, it fails at once."""
    losing, name = Losing(method, kind), next(names)
    prompt = prompt_of(700)
    request = RelayRequest(
        request_id="r", prompt=prompt, sampling=SamplingParams(max_tokens=30, seed=1), vocab_size=VOCAB
    )
    local = (method, kind) == ("Start", "progress")
    breaks_at = 5 if kind == "replaying" else None
    limits = replace(LIMITS, placement=PlacementRules(on_no_prefill="local"))
    async with pair(name, make_server=lambda: LosingServer(losing, breaks_at), local_prefill=local) as workers:
        sick = {"Start": workers.decode_runner, "Run": workers.prefill_runner}[method] if kind == "failed" else None
        infos = (workers.decode_info,) if local else (workers.prefill_info, workers.decode_info)
        async with fleet_of(redis_url, name, *infos) as fleet, asyncio.timeout(60), _sick_until_lost(sick, losing):
            ids: list[int] = []
            async with relay(fleet, request, limits, PrefixMirror()) as tokens:
                async for batch in tokens:
                    ids += [token.token_id for token in batch]
        assert ids == answer(prompt, 30)
        await until(lambda: losing.lost == 1)  # a release is sent after the last token
        await until(lambda: workers.prefill.is_idle() and workers.decode.is_idle())


@contextlib.asynccontextmanager
async def _sick_until_lost(runner: OracleRunner | None, losing: Losing) -> AsyncIterator[None]:
    """The engine's numbers are none until a worker's word about that has been lost."""

    async def heal() -> None:
        await until(lambda: losing.lost)
        assert runner is not None
        runner.is_sick.clear()

    async with asyncio.TaskGroup() as tasks:
        if runner is not None:
            runner.is_sick.set()
            tasks.create_task(heal())
        yield


@pytest.mark.parametrize(("method", "kind"), of("Probe", "Lend"), ids=lambda word: word)
async def test_a_measurement_that_loses_a_message_fails_in_time_and_gives_its_pages_back(
    monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 1.0)
    losing = Losing(method, kind)
    async with pair(next(names), make_server=lambda: LosingServer(losing, None)) as workers:

        def free() -> tuple[int, int]:
            return workers.prefill_pools.full.free, workers.decode_pools.full.free

        before = free()
        stub = worker_pb2_grpc.DecodeStub(workers.decode_channel)  # type: ignore[no-untyped-call]
        ask = worker_pb2.ProbeRequest(source=convert.worker_ref_to_wire(workers.prefill_info.ref), num_bytes=1 << 16)
        async with asyncio.timeout(60):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Probe(ask, timeout=3.0)
            assert losing.lost == 1
            await until(lambda: free() == before)
            assert convert.probe_reply_from_wire(await stub.Probe(ask, timeout=30.0)).num_bytes > 0


@pytest.mark.parametrize(
    ("method", "kind", "ended"),
    [*((*message, False) for message in of("Attach")), ("Attach", "tokens", True)],
    ids=lambda word: str(word),
)
async def test_who_reads_a_kept_answer_and_loses_a_message_hears_of_it_and_may_read_again(
    redis_url: str, method: str, kind: str, ended: bool
) -> None:
    """Of an answer that has `ended` all tokens are in one message, and none behind it shows a gap."""
    losing, name = Losing(method, kind), next(names)
    context = Context(path="/v1/completions", tenant="t", request_id="r", created=1, raw=b"{}")
    async with pair(name, make_server=lambda: LosingServer(losing, None)) as workers:
        request = replace(start_request(workers, "r", prompt_of(300), 20), keep_s=60, context=context.pack())
        async with fleet_of(redis_url, name, workers.prefill_info, workers.decode_info) as fleet, asyncio.timeout(60):
            if kind == "failed":
                workers.decode_runner.pause_after(3)
            heard = await start(workers, request, leave_at=2)
            if kind == "failed":
                workers.decode_runner.fail_next.set()
                workers.decode_runner.resume()
            if ended:
                await until(workers.decode.is_idle)
            stream = StreamId(
                request_id="r", worker_id="decode-0", epoch=workers.decode_info.epoch, attempt=request.attempt, index=0
            )
            with pytest.raises(WorkerLost):
                await read(fleet, stream)
            assert losing.lost == 1
            again = await read(fleet, stream)
            assert isinstance(again[-1], Failed if kind == "failed" else Finished)
            ids = [token.token_id for event in again if isinstance(event, Tokens) for token in event.tokens]
            expected = answer(request.prompt, 20)
            assert ids == expected[: len(ids)]
            assert len(ids) >= len(heard) if kind == "failed" else ids == expected


async def read(fleet: Fleet, stream: StreamId) -> list[Tokens | Finished | Failed]:
    """All of a kept answer. Raises WorkerLost for one with a gap, as whoever counts its tokens does."""
    events = []
    async with attach(fleet, stream, "t", silence_s=(2.0, 2.0)) as kept:
        async for event in kept.events:
            events.append(event)
            if isinstance(event, Finished | Failed):
                return events
    raise WorkerLost("it ended early")
