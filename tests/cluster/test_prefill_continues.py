"""A prefill worker dies in mid-prompt: pages that its decode worker has pulled and verified are not computed again."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from deploy.redis import EmbeddedRedis
from engine.batch import Drawn, Segment
from router.attempts import RelayRequest
from router.mirror import PrefixMirror
from router.placement import Placement
from router.relay import relay
from tests.cluster.test_dropped_messages import LIMITS, fleet_of
from tests.decode_worker.oracle import VOCAB, OraclePools, OracleRunner, answer, pair, until
from tests.decode_worker.test_service import prompt_of
from wire.errors import WorkerLost
from wire.rpc import Server
from wire.types import PAGE_TOKENS, PageClass, SamplingParams

names = (f"continuing-{n}" for n in itertools.count())
CHUNK, DIES_AT = 200, 1_200


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


class Dying(Server):
    """Its prefill service is gone once it has computed so much of a prompt, and the other side has pulled it."""

    def __init__(self, pulled: Counter[str]) -> None:
        super().__init__()
        self.pulled = pulled

    def add(self, register: Any, servicer: Any) -> None:
        if hasattr(servicer, "Run"):
            run = servicer.Run

            async def dies(request: Any, context: Any) -> AsyncIterator[Any]:
                async for event in run(request, context):
                    yield event
                    if event.progress.done >= DIES_AT:
                        await until(lambda: self.pulled["full"] >= DIES_AT // PAGE_TOKENS)
                        raise WorkerLost("it died in mid-prompt")

            servicer.Run = dies
        super().add(register, servicer)

    async def start(self) -> int:
        port = await super().start()
        await self.set_serving(True)
        return port


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Tokens that each engine has computed, by the id of its runner."""
    counts, execute = Counter[int](), OracleRunner.execute

    def counted(self: OracleRunner, batch: list[Segment]) -> list[Drawn]:
        counts[id(self)] += sum(len(segment.tokens) for segment in batch)
        return execute(self, batch)

    monkeypatch.setattr(OracleRunner, "execute", counted)
    return counts


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Pages that have been verified, by class."""
    counts, verify = Counter[str](), OraclePools.import_pages

    def counted(self: OraclePools, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]:
        bad = verify(self, page_class, items, checksums)
        counts[page_class] += len(items) - len(bad)
        return bad

    monkeypatch.setattr(OraclePools, "import_pages", counted)
    return counts


async def test_who_holds_verified_pages_of_a_prompt_goes_on_behind_them(
    redis_url: str, computed: Counter[int], pulled: Counter[str]
) -> None:
    name, prompt = next(names), prompt_of(2_000)
    request = RelayRequest(
        request_id="r", prompt=prompt, sampling=SamplingParams(max_tokens=10, seed=1), vocab_size=VOCAB
    )
    placements: list[Placement] = []
    async with pair(name, chunk_tokens=CHUNK, make_server=lambda: Dying(pulled), local_prefill=True) as workers:
        workers.prefill_runner.pause_after(DIES_AT // CHUNK)  # it gets no further, however late its death is
        # What they would have measured of themselves: decoding workers compute as fast as others.
        infos = [replace(info, prefill_token_ns=50_000) for info in (workers.prefill_info, workers.decode_info)]
        async with fleet_of(redis_url, name, *infos) as fleet, asyncio.timeout(60):
            ids: list[int] = []
            async with relay(fleet, request, LIMITS, PrefixMirror(), on_place=placements.append) as tokens:
                async for batch in tokens:
                    ids += [token.token_id for token in batch]
        workers.prefill_runner.resume()
        assert ids == answer(prompt, 10)
        assert [placement.decision for placement in placements] == ["disaggregated", "local"]
        # Of the prompt what is behind the last page that came whole, and the window in front of that once more.
        own = computed[id(workers.decode_runner)]
        assert 0 < own < len(prompt) - DIES_AT + 3 * PAGE_TOKENS
        await until(lambda: workers.prefill.is_idle() and workers.decode.is_idle())
