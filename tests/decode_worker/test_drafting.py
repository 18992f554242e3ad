"""Drafts between scheduler and engine: several tokens a step, never another answer, and only as many as pay."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from decode_worker.drafting import MAX_DRAFTS, DraftDepth
from decode_worker.scheduler import DecodeLimits
from engine.batch import Drawn, Sampled, Segment
from engine.cache.pools import PoolSizes
from engine.colocated import generate
from engine.runner import Plan, Runner
from engine.steps import Step
from prefill_worker.scheduler import PrefillLimits
from tests.books import CheckedDecode as DecodeCore
from tests.decode_worker.oracle import Pair, pair_of, until
from tests.decode_worker.test_preemption import OnceTogether, said
from tests.decode_worker.test_scheduler import Pools, emitted, limits, make_running
from tests.decode_worker.test_scheduler import request as start_request
from tests.decode_worker.test_service import drain, request
from tests.decode_worker.test_service import start_request as start_message
from tests.engine.speculation import drafting_model, echoing, runner_of
from wire.types import Admitted, Failed, Finished, FinishReason, RunRequest, SamplingParams, TokenEvent, Tokens

names = (f"drafting-{n}" for n in itertools.count())


def core_with(draft_tokens: int, **sampling: object) -> DecodeCore:
    core = DecodeCore(Pools(), limits(draft_tokens=draft_tokens))
    make_running(core, start_request("a", 300, **{"max_tokens": 20, **sampling}))
    return core


def answered(core: DecodeCore, *ids: int, guesses: tuple[int, ...] = (), drafts: int = 0, last_ok: bool = True) -> list:
    """The only request's step drew these tokens."""
    tokens = [Sampled(token_id=token, logprob=-1.0) for token in ids]
    if not last_ok:
        tokens.append(Sampled(token_id=0, logprob=0.0, ok=False))
    return emitted(core.finish(0.0, [Drawn(tuple(tokens), guesses, drafts)]))


def shape(segment: Segment) -> tuple[int, list[int], int, int, int]:
    return segment.start, segment.tokens, segment.index, segment.drafts, segment.guesses


def test_guesses_are_verified_by_the_next_step_and_what_it_drew_travels_in_one_message() -> None:
    core = core_with(2)
    (segment,) = core.next_batch(0.0)
    assert shape(segment) == (300, [50], 1, 0, 2)
    answered(core, 60, guesses=(61, 62))
    (segment,) = core.next_batch(0.0)
    assert shape(segment) == (301, [60, 61, 62], 2, 2, 2)
    assert segment.sequence.swa_pages[1], "every place that is written is mapped"
    (event,) = answered(core, 61, 63, guesses=(64, 65), drafts=2)
    assert isinstance(event, Tokens)
    assert [(token.index, token.token_id) for token in event.tokens] == [(2, 61), (3, 63)]
    (segment,) = core.next_batch(0.0)
    assert shape(segment) == (303, [63, 64, 65], 4, 2, 2)
    load = core.load()
    assert (load.drafted_steps_total, load.drafts_total, load.drafts_kept_total) == (1, 2, 1)


def test_tokens_drawn_behind_the_end_are_void() -> None:
    core = core_with(3)
    core.next_batch(0.0)
    answered(core, 60, guesses=(61, 1, 62))
    core.next_batch(0.0)
    tokens, finished = answered(core, 61, 1, 62, 63)
    assert isinstance(tokens, Tokens)
    assert [token.token_id for token in tokens.tokens] == [61, 1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.completion_tokens) == (FinishReason.STOP, 4)
    assert core.next_batch(0.0) == []


def test_no_draft_goes_beyond_max_tokens_or_the_pages_there_are() -> None:
    core = core_with(3, max_tokens=4)
    (segment,) = core.next_batch(0.0)
    assert segment.guesses == 1, "of three more tokens this step brings one, and the last is drawn, not drafted"
    answered(core, 60, guesses=(61, 62))
    (segment,) = core.next_batch(0.0)
    assert (segment.drafts, segment.guesses) == (1, 0)

    core = DecodeCore(Pools(), limits(draft_tokens=3))
    make_running(core, start_request("a", 509, max_tokens=20))
    core.next_batch(0.0)
    answered(core, 60, guesses=(61, 62, 63))
    (segment,) = core.next_batch(0.0)
    assert (segment.start, segment.drafts) == (510, 1)


def test_what_was_drawn_before_a_number_that_is_not_finite_is_still_said() -> None:
    core = core_with(2)
    core.next_batch(0.0)
    answered(core, 60, guesses=(61, 62))
    core.next_batch(0.0)
    tokens, failed = answered(core, 61, last_ok=False)
    assert isinstance(tokens, Tokens)
    assert [token.token_id for token in tokens.tokens] == [61]
    assert isinstance(failed, Failed)
    assert failed.message.startswith("the model's output for token 3 of a")


@pytest.mark.parametrize(("share", "draft_cost", "best"), [(0.9, 0.1, 3), (0.6, 0.3, 1), (0.05, 0.2, 0), (0.5, 1.0, 0)])
def test_the_depth_that_pays_is_found_and_kept(share: float, draft_cost: float, best: int) -> None:
    """A step costs 1 and `draft_cost` more for each draft; a draft is kept with probability `share`."""
    depth, rng = DraftDepth(None), random.Random(1)
    chosen = []
    for _ in range(4000):
        drafts = depth.choose(4)
        chosen.append(drafts)
        requests = []
        for _ in range(4):
            kept = next((i for i in range(drafts) if rng.random() >= share), drafts)
            requests.append((drafts, kept))
        depth.measured(requests, 1 + draft_cost * drafts)
    assert chosen[2000:].count(best) > 0.9 * 2000
    assert set(chosen) == set(range(MAX_DRAFTS + 1)), "every depth was tried"


@pytest.mark.parametrize("draft_tokens", [2, None])
@pytest.mark.parametrize("prefill_drafts", [True, False])
async def test_two_workers_with_drafts_say_what_one_says_without(
    draft_tokens: int | None, prefill_drafts: bool
) -> None:
    """Greedy and sampled, several at once, some made to wait in host memory; the draft layer is right."""
    config, tensors = drafting_model(91, "flash", vocab_size=128)
    echoing(config, tensors)
    sizes = PoolSizes(full=40, swa=24, slots=8)
    alone = runner_of(config, tensors, "exact", draft=False)
    prefill = runner_of(config, tensors, "exact", draft=prefill_drafts, sizes=sizes)
    decode = runner_of(config, tensors, "exact", sizes=PoolSizes(full=8, swa=12, slots=5))
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(3, 128) for _ in range(n)) for n in (500, 490, 384, 250)]
    ways = [
        SamplingParams(max_tokens=30, seed=5, temperature=0.9 * (n % 2), ignore_eos=True, logprobs=True)
        for n in range(4)
    ]
    context = 4096
    async with pair_of(
        next(names),
        (prefill.pools, prefill),
        # However slow prefill is, all four come to need pages at once.
        (decode.pools, OnceTogether(decode, len(prompts))),
        PrefillLimits(chunk_tokens=256, max_batch_tokens=512, max_context=context, vocab_size=128),
        DecodeLimits(max_context=context, vocab_size=128, eos_token_id=1, draft_tokens=draft_tokens, growth_tokens=0),
    ) as workers:
        answers = await asyncio.gather(
            *(request(workers, f"r{i}", p, sampling=w) for i, (p, w) in enumerate(zip(prompts, ways, strict=True)))
        )
        await workers.settle()
        await until(lambda: workers.metric("penumbra_spec_draft_tokens_total") > 20)
        await until(lambda: workers.metric("penumbra_spec_accepted_tokens_total") > 20)
        assert workers.metric("penumbra_spec_accept_length") > 1.2
        await until(lambda: workers.metric("penumbra_num_preemptions_total") > 0)
    for prompt, way, (_, events) in zip(prompts, ways, answers, strict=True):
        reference = list(generate(alone, prompt, way))
        assert [(t.token_id, t.logprob) for t in said(events)] == [(s.token_id, s.logprob) for s in reference]


class HalfRight(Runner):
    """A runner whose guesses are, more often than not, what will be drawn: its draft layer of random weights is refused
    nearly always, and drafts that are kept have to be seen too.
    """

    truth: dict[str, list[int]]
    rng: random.Random

    def _guess(self, step: Step, batch: list[Segment], tokens: Any, *args: Any) -> list[tuple[int, ...]]:
        guessed = super()._guess(step, batch, tokens, *args)
        found = []
        for segment, drawn, guesses in zip(batch, tokens, guessed, strict=True):
            done = segment.index + len(drawn)
            known = self.truth[segment.sequence.request_id][done : done + len(guesses)]
            known += guesses[len(known) :]
            found.append(tuple(t if self.rng.random() < 0.75 else (t + 1) % 128 for t in known))
        return found


CROWD = (1, 2, 3, 4)
"""Requests that fill 8 of 11 pages together and need 12 before they end."""


class Unhurried:
    """A runner that dawdles until `crowded`, so that a slow prefill does not keep the crowd apart."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.crowded: Callable[[], bool] = lambda: False

    def prepare(self, batch: list[Segment]) -> Plan:
        return self._runner.prepare(batch)

    def execute(self, plan: Plan) -> list[Drawn]:
        if not self.crowded():
            time.sleep(0.3)
        return self._runner.execute(plan)


async def leave_after(workers: Pair[Any, Any], name: str, prompt: tuple[int, ...], way: SamplingParams, n: int) -> Any:
    """A client that has heard enough after `n` tokens; what it heard."""
    heard: list[TokenEvent] = []
    start = start_message(workers, name, prompt, 0, sampling=way)
    async with contextlib.aclosing(workers.start(start)) as stream:
        async for event in stream:
            if isinstance(event, Admitted):
                run = RunRequest(
                    request_id=name,
                    attempt=1,
                    prompt=prompt,
                    sampling=way,
                    skip=event.resident_prefix,
                    secret=event.secret,
                )
                prefill = asyncio.create_task(drain(workers, run))
            elif isinstance(event, Tokens):
                heard += event.tokens
                if len(heard) >= n:
                    break
            assert not isinstance(event, Failed), event
    prefill.cancel()
    return heard


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num", "depth"), [(50, 3), *(pytest.param(200, depth, marks=pytest.mark.long) for depth in (1, 2, 3))]
)
async def test_random_requests_say_token_for_token_and_logprob_for_logprob_what_they_say_without_drafts(
    num: int, depth: int, record_property: Callable[[str, object], None]
) -> None:
    """Lengths around every border, prompts that begin alike, too few pages for all, and clients that leave."""
    config, tensors = drafting_model(92, "flash", vocab_size=128)
    alone = runner_of(config, tensors, "exact", draft=False)
    prefill = runner_of(config, tensors, "exact", sizes=PoolSizes(full=40, swa=40, slots=12))
    plain = runner_of(config, tensors, "exact", sizes=PoolSizes(full=11, swa=14, slots=7))
    decode = HalfRight(plain.config, plain.model, plain.pools, "test", plain.draft)
    decode.rng, rng = random.Random(depth), random.Random(6)
    texts = [tuple(rng.randrange(3, 128) for _ in range(640)) for _ in range(5)]
    prompts, ways = [], []
    for i in range(num):
        n = rng.choice([rng.randrange(1, 600), *(k + rng.randrange(-9, 3) for k in (128, 256, 384, 512))])
        fork = rng.choice([0, n, 256, 300])
        if i in CROWD:
            n, fork = 512 - CROWD.index(i), 0
        prompts.append(texts[i % 5][:fork][:n] + tuple(rng.randrange(3, 128) for _ in range(n - fork)))
        ways.append(
            SamplingParams(
                max_tokens=23 if i in CROWD else rng.randrange(2, 24),
                seed=i,
                temperature=0,
                ignore_eos=True,
                logprobs=True,
                top_logprobs=2,
            )
        )
    want = [list(generate(alone, p, way)) for p, way in zip(prompts, ways, strict=True)]
    decode.truth = {f"r{i}": [sampled.token_id for sampled in answer] for i, answer in enumerate(want)}
    leaving = {i: rng.randrange(1, ways[i].max_tokens) for i in range(0, num, 7)}
    turns = asyncio.Semaphore(8)

    async def ask(i: int) -> list[TokenEvent]:
        async with turns:
            if i in leaving:
                return list(await leave_after(workers, f"r{i}", prompts[i], ways[i], leaving[i]))
            _, events = await request(workers, f"r{i}", prompts[i], sampling=ways[i])
            return said(events)

    unhurried = Unhurried(decode)
    async with pair_of(
        next(names),
        (prefill.pools, prefill),
        (decode.pools, unhurried),
        PrefillLimits(chunk_tokens=256, max_batch_tokens=512, max_context=4096, vocab_size=128),
        DecodeLimits(max_context=4096, vocab_size=128, eos_token_id=1, draft_tokens=depth, growth_tokens=0),
    ) as workers:
        unhurried.crowded = lambda: workers.metric("penumbra_num_preemptions_total") > 0
        crowd = await asyncio.gather(*(ask(i) for i in CROWD))
        others = [i for i in range(num) if i not in CROWD]
        answers = dict(zip((*CROWD, *others), [*crowd, *await asyncio.gather(*map(ask, others))], strict=True))
        await workers.settle()
        await until(lambda: workers.metric("penumbra_num_preemptions_total") > 0)
        seen = {
            name: workers.metric(f"penumbra_{name}_total")
            for name in ("num_preemptions", "prefix_cache_hits", "spec_draft_tokens", "spec_accepted_tokens")
        }
    for name, count in seen.items():
        record_property(name, int(count))
    for i, reference in enumerate(want):
        answer = answers[i]
        expected = [(s.token_id, s.logprob, s.top) for s in reference]
        assert [(t.token_id, t.logprob, t.top) for t in answer] == expected[: len(answer)], f"request {i}"
        assert len(answer) == len(expected) or (i in leaving and len(answer) >= leaving[i])
    assert seen["prefix_cache_hits"] > 0
    assert seen["spec_accepted_tokens"] > seen["spec_draft_tokens"] / 3
    assert seen["spec_draft_tokens"] > seen["spec_accepted_tokens"], "drafts were refused too"
