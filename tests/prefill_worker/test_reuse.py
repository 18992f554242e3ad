"""The prefill core over a real model: whatever the cache holds, lost or was asked, the answers are a cold run's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.batch import Sampled
from engine.cache.pools import KvPools, PoolSizes
from engine.config import EngineConfig, KvLayout
from engine.model.deepseek_v4 import DeepseekV4
from engine.runner import Runner
from prefill_worker.scheduler import Drop, Ended, Offered, PrefillAction, PrefillLimits, Submit
from tests.books import CheckedPrefill as PrefillCore
from tests.engine.geometries import random_tensors, tiny_config
from wire.types import AttemptId, PageClass, RunFinished, RunRequest, SamplingParams, TokenEvent

PATTERN = "all"
CONFIG = tiny_config(41, PATTERN, head_dim=512, rope_dim=64, index_head_dim=128, index_topk=32)
MODEL = DeepseekV4(CONFIG, random_tensors(CONFIG, 41))
SAMPLING = SamplingParams(max_tokens=1, seed=7, temperature=0.8)


class Worker:
    """A prefill worker without its thread: prompts in, first tokens out, books checked after every step."""

    def __init__(self, layout: KvLayout, full: int, swa: int = 16, prefix_cache: bool = True) -> None:
        self.pools = KvPools(CONFIG, layout, PoolSizes(full=full + 1, swa=swa + 1, slots=5), "test", "cpu")
        self.runner = Runner(EngineConfig(model=Path("test")), MODEL, self.pools, "test")
        self.core = PrefillCore(
            self.pools,
            PrefillLimits(
                chunk_tokens=512,
                max_batch_tokens=700,
                max_context=1 << 20,
                vocab_size=CONFIG.vocab_size,
                num_layers=CONFIG.num_layers,
                prefix_cache=prefix_cache,
                retained_windows=4,
            ),
        )
        self.now = 0.0
        self.first: dict[AttemptId, TokenEvent] = {}
        self.cached: dict[AttemptId, int] = {}
        self.attempt = 0

    def submit(self, prompt: tuple[int, ...]) -> AttemptId:
        self.attempt += 1
        request = RunRequest(
            request_id="r", attempt=self.attempt, prompt=prompt, sampling=SAMPLING, skip=0, secret=b"s" * 16
        )
        self.see(self.core.step(self.now, Submit(request)))
        return AttemptId("r", self.attempt)

    def drop(self, run: AttemptId) -> None:
        self.see(self.core.step(self.now, Drop(run)))

    def turn(self) -> bool:
        batch = self.core.next_batch(self.now)
        if not batch:
            return False
        results: list[Sampled | None] = self.runner.run(batch)
        self.now += 0.01
        self.see(self.core.finish(self.now, results))
        return True

    def see(self, actions: list[PrefillAction]) -> None:
        for action in actions:
            if isinstance(action, Offered) and action.tail is not None:
                self.first[action.run] = action.tail.first
            if isinstance(action, Ended):
                assert isinstance(action.outcome, RunFinished), action.outcome
                self.cached[action.run] = action.outcome.cached_tokens
        self.check()

    def check(self) -> None:
        """free + evictable + protected + private + quarantined = capacity, each item with one owner."""
        private: dict[PageClass, list[int]] = {PageClass.FULL: [], PageClass.SWA: []}
        for run in self.core._runs.values():
            if run.sequence is not None and run.lease is not None:
                private[PageClass.FULL] += run.sequence.pages[run.lease.pages :]
                private[PageClass.SWA] += [run.sequence.swa_pages[j] for j in self.core._window.mapped(run.sequence)]
        self.core.cache.check(private)
        for page_class in private:
            counts = self.core.load().pages[page_class]
            capacity = {PageClass.FULL: self.pools.full, PageClass.SWA: self.pools.swa}[page_class].capacity
            owned = counts.evictable + counts.protected + len(private[page_class])
            assert counts.free + owned + counts.quarantined == capacity

    def answer(self, prompt: tuple[int, ...]) -> TokenEvent:
        run = self.submit(prompt)
        while self.turn():
            pass
        self.drop(run)
        return self.first[run]


def tokens(rng: random.Random, n: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, CONFIG.vocab_size) for _ in range(n))


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_hits_rebuilds_and_followers_answer_what_a_cold_run_answers(layout: KvLayout) -> None:
    rng = random.Random(1)
    base = tokens(rng, 2100)
    prompts = [base, base[:1400] + tokens(rng, 300), base[:513], base + tokens(rng, 200), base[:1793]]
    cold = Worker(layout, full=16, prefix_cache=False)
    want = [cold.answer(prompt) for prompt in prompts]
    warm = Worker(layout, full=40)
    assert [warm.answer(prompt) for prompt in prompts] == want
    assert [warm.cached[AttemptId("r", n)] > 0 for n in range(1, 6)] == [False, True, True, True, True]
    warm.core.cache.evict(PageClass.SWA, 16)
    assert [warm.answer(prompt) for prompt in prompts] == want, "windows computed again"
    assert warm.cached[AttemptId("r", 6)] == 2048 - 1024, "six layers: the last 1,024 of 2,048 tokens again"
    together = [warm.submit(prompt) for prompt in prompts[:4]]
    while warm.turn():
        pass
    assert [warm.first[run] for run in together] == want[:4]


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_random_conversations_on_a_third_of_the_pages_they_need_answer_as_without_a_cache(layout: KvLayout) -> None:
    converse(layout, seed=3, num_prompts=14)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_random_conversations_answer_as_without_a_cache(layout: KvLayout, seed: int) -> None:
    converse(layout, seed, num_prompts=40)


def converse(layout: KvLayout, seed: int, num_prompts: int) -> None:
    """Prompts that continue, cut and fork others, some cancelled, windows evicted in between."""
    rng = random.Random(seed)
    conversations = [tokens(rng, rng.randrange(1, 500))]
    cold, warm = Worker(layout, full=12, prefix_cache=False), Worker(layout, full=12, swa=12)
    open_runs: list[tuple[AttemptId, tuple[int, ...]]] = []
    for _ in range(num_prompts):
        old = rng.choice(conversations)
        cut = rng.choice([len(old), len(old), rng.randrange(len(old))])
        prompt = (old[:cut] + tokens(rng, rng.randrange(1, 600)))[-2600:]
        conversations.append(prompt)
        open_runs.append((warm.submit(prompt), prompt))
        for _ in range(rng.randrange(4)):
            warm.turn()
        if rng.random() < 0.2:
            warm.drop(open_runs.pop(rng.randrange(len(open_runs)))[0])
        while len(open_runs) > 2:
            if open_runs[0][0] not in warm.first and warm.turn():
                continue
            # Whoever waits for pages may wait for those of a later one, which is done and still held.
            run, prompt = next(one for one in open_runs if one[0] in warm.first)
            open_runs.remove((run, prompt))
            warm.drop(run)
            assert warm.first[run] == cold.answer(prompt)
        if rng.random() < 0.1:
            warm.core.cache.evict(PageClass.SWA, rng.randrange(1, 5))
            warm.check()
    for run, _ in open_runs:
        warm.drop(run)
    full, swa = (warm.core.cache.counts(cls) for cls in (PageClass.FULL, PageClass.SWA))
    assert (full.free + full.evictable, swa.free + swa.evictable) == (12, 12), "everything is free or can be"
