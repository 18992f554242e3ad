"""The router's relay, a prefill and a decode worker over real gRPC, and one message of each kind that never arrives.

Whatever is lost, the client gets its whole answer: every wait ends, and what follows it is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from deploy.redis import EmbeddedRedis
from router.fleet import Fleet
from router.mirror import PrefixMirror
from router.relay import RelayLimits, RelayRequest, relay
from tests.decode_worker.oracle import VOCAB, OraclePair, answer, pair, until
from tests.decode_worker.test_service import prompt_of
from wire.registry import Registry
from wire.rpc import Server
from wire.types import SamplingParams

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
MESSAGES = (
    *(("Start", kind) for kind in ("request", "admitted", "fetching", "tokens", "finished")),
    *(("Run", kind) for kind in ("request", "progress", "finished")),
    *(("Claim", kind) for kind in ("request", "owner", "groups", "tail")),
    ("Release", "request"),
)


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
    def __init__(self, losing: Losing) -> None:
        super().__init__()
        self._losing = losing

    def add(self, register: Callable[[Any, Any], None], servicer: object) -> None:
        super().add(register, _Lossy(servicer, self._losing))

    async def start(self) -> int:
        port = await super().start()
        await self.set_serving(True)
        return port


class _Lossy:
    """A servicer whose messages pass through `losing`."""

    def __init__(self, servicer: Any, losing: Losing) -> None:
        def stream(name: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                if losing.takes(name, {"request"}):
                    await asyncio.Event().wait()  # it never came, and the caller does not know
                async with contextlib.aclosing(getattr(servicer, name)(request, context)) as replies:
                    async for reply in replies:
                        if not losing.takes(name, {field.name for field, _ in reply.ListFields()}):
                            yield reply

            return call

        async def release(request: Any, context: Any) -> Any:
            if losing.takes("Release", {"request"}):
                await asyncio.Event().wait()
            return await servicer.Release(request, context)

        self._servicer = servicer
        for name in ("Start", "Run", "Claim"):
            if hasattr(servicer, name):
                setattr(self, name, stream(name))
        if hasattr(servicer, "Release"):
            self.Release = release

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servicer, name)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@contextlib.asynccontextmanager
async def fleet_of(workers: OraclePair, redis_url: str, namespace: str) -> AsyncIterator[Fleet]:
    """The router's view of the two, over a real registry."""
    async with Registry(redis_url, namespace) as registry, asyncio.TaskGroup() as tasks:
        fleet = Fleet(registry, poll_s=0.05)
        running = [tasks.create_task(fleet.run())]
        for info in (workers.prefill_info, workers.decode_info):
            running.append(tasks.create_task(registry.run_heartbeat(lambda info=info: info)))  # type: ignore[misc]
        try:
            await until(lambda: [v.usable for v in (*fleet.snapshot().prefill, *fleet.snapshot().decode)] == [True] * 2)
            yield fleet
        finally:
            for task in running:
                task.cancel()


@pytest.mark.parametrize(("method", "kind"), MESSAGES, ids=lambda word: word)
async def test_a_message_that_is_lost_costs_time_and_nothing_else(redis_url: str, method: str, kind: str) -> None:
    losing, name = Losing(method, kind), next(names)
    prompt = prompt_of(700)
    request = RelayRequest(
        request_id="r", prompt=prompt, sampling=SamplingParams(max_tokens=30, seed=1), vocab_size=VOCAB
    )
    async with pair(name, make_server=lambda: LosingServer(losing)) as workers:
        async with fleet_of(workers, redis_url, name) as fleet, asyncio.timeout(60):
            ids: list[int] = []
            async with relay(fleet, request, LIMITS, PrefixMirror()) as tokens:
                async for batch in tokens:
                    ids += [token.token_id for token in batch]
        assert ids == answer(prompt, 30)
        assert losing.lost == 1, "the message was never sent"
        await until(lambda: workers.prefill.is_idle() and workers.decode.is_idle())
