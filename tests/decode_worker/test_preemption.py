"""Requests that leave the pools for host memory and come back, with a real model: nobody can tell from the answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Sequence

import pytest
import torch

from decode_worker.preemption import restore, save
from decode_worker.scheduler import DecodeLimits
from engine.batch import Drawn, Segment
from engine.cache.pools import PoolSizes
from engine.colocated import generate
from engine.config import KvLayout
from engine.runner import Plan, Runner
from prefill_worker.scheduler import PrefillLimits
from tests.decode_worker.conftest import MakeRunner
from tests.decode_worker.oracle import pair_of, until
from tests.decode_worker.test_service import request
from wire.types import Failed, PageClass, SamplingParams, StartEvent, TokenEvent, Tokens

names = (f"preempted-{n}" for n in itertools.count())
SIZES = PoolSizes(full=40, swa=24, slots=8)


def prompt_of(n: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 250) for _ in range(n))


def limits(runner: Runner, **changes: int) -> tuple[PrefillLimits, DecodeLimits]:
    config, context = runner.model_config, 4096
    prefill = PrefillLimits(chunk_tokens=256, max_batch_tokens=512, max_context=context, vocab_size=config.vocab_size)
    decode = DecodeLimits(
        max_context=context, vocab_size=config.vocab_size, eos_token_id=config.eos_token_id, **changes
    )
    return prefill, decode


class OnceTogether:
    """A runner that dawdles until `size` requests have shared a batch, however slow the prefill before it is."""

    def __init__(self, runner: Runner, size: int) -> None:
        self._runner, self._size = runner, size
        self.met = threading.Event()

    def prepare(self, batch: list[Segment]) -> Plan:
        return self._runner.prepare(batch)

    def execute(self, plan: Plan) -> list[Drawn]:
        if len(plan.batch) >= self._size:
            self.met.set()
        self.met.wait(0.3)
        return self._runner.execute(plan)


def said(events: Sequence[StartEvent]) -> list[TokenEvent]:
    assert not isinstance(events[-1], Failed), events[-1]
    return [token for event in events if isinstance(event, Tokens) for token in event.tokens]


@pytest.mark.parametrize("layout", ["v4", "exact"])
async def test_preempted_requests_say_what_they_would_have_said_undisturbed(
    make_runner: MakeRunner, layout: KvLayout
) -> None:
    prefill, alone = make_runner(layout, SIZES), make_runner(layout, SIZES)
    decode = make_runner(layout, PoolSizes(full=8, swa=12, slots=5))
    prompts = [prompt_of(n, seed=n) for n in (500, 490, 384, 250)]  # 7 pages now; 2 + 2 + 1 + 1 more before they end
    sampling = SamplingParams(max_tokens=30, seed=5, temperature=0.9, ignore_eos=True)
    together = OnceTogether(decode, len(prompts))
    async with pair_of(
        next(names),
        (prefill.pools, prefill),
        (decode.pools, together),
        *limits(alone, growth_tokens=0),
    ) as workers:
        answers = await asyncio.gather(
            *(request(workers, f"r{i}", prompt, sampling=sampling) for i, prompt in enumerate(prompts))
        )
        await workers.settle()
        assert together.met.is_set(), "they never decoded together: nothing had to make room"
        await until(lambda: workers.metric("penumbra_num_preemptions_total") > 0)
        await until(lambda: workers.metric("penumbra_preempted_host_bytes") == 0)
    for prompt, (_, events) in zip(prompts, answers, strict=True):
        reference = list(generate(alone, prompt, sampling))
        assert [(t.token_id, t.logprob) for t in said(events)] == [(s.token_id, s.logprob) for s in reference]


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_a_copy_brings_every_byte_to_other_items_and_knows_when_one_has_changed(
    make_runner: MakeRunner, layout: KvLayout
) -> None:
    pools = make_runner(layout, PoolSizes(full=9, swa=5, slots=3)).pools
    bytes_of = {cls.name: cls.regions for cls in pools.classes}
    generator = torch.Generator().manual_seed(1)
    for cls in PageClass:
        rows = pools.copy_out(cls, [1, 2])
        assert rows.shape == (2, sum(region.item_bytes for region in bytes_of[cls]))
        pools.copy_in(cls, [1, 2], torch.randint(256, rows.shape, generator=generator, dtype=torch.uint8))
    items = {PageClass.FULL: [2, 1], PageClass.SWA: [1], PageClass.STATE: [2]}
    kept = save(pools, items)
    elsewhere = {PageClass.FULL: [7, 5], PageClass.SWA: [4], PageClass.STATE: [5]}
    assert restore(pools, elsewhere, kept) == 0
    for cls in PageClass:
        assert torch.equal(pools.copy_out(cls, elsewhere[cls]), pools.copy_out(cls, items[cls]))
    assert restore(pools, {PageClass.FULL: [6]}, kept) == 0  # the last of two
    assert torch.equal(pools.copy_out(PageClass.FULL, [6]), pools.copy_out(PageClass.FULL, [1]))
    kept.rows[PageClass.SWA][0, 100] ^= 1
    assert restore(pools, elsewhere, kept) == 1
