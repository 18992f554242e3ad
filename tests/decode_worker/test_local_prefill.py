"""Prompts that a decode worker computes itself: the same to the bit, beside those that decode, and given up cleanly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from decode_worker.preemption import restore, save
from decode_worker.scheduler import Cancel, DecodeCore, DecodeLimits, Emit, Restore, Restored, Save, Saved, Start
from engine.batch import Drawn, Sampled
from engine.cache.pools import PoolSizes
from engine.colocated import generate
from engine.config import KvLayout
from engine.loop import StepFailed
from engine.pace import Pace
from engine.runner import Runner
from tests.decode_worker.conftest import MakeRunner
from tests.decode_worker.test_scheduler import SECRET, A, Pools, emitted, failure, limits, request
from wire.types import (
    Admitted,
    AttemptId,
    Finished,
    PageClass,
    Progress,
    SamplingParams,
    StartRequest,
    TokenEvent,
    Tokens,
)

SIZES = PoolSizes(full=60, swa=24, slots=8)


@dataclass
class Worker:
    """A core and a real engine, one step after another in this thread."""

    runner: Runner
    core: DecodeCore
    said: dict[str, list[TokenEvent]] = field(default_factory=dict)
    ended: dict[str, object] = field(default_factory=dict)
    events: list[object] = field(default_factory=list)

    @classmethod
    def of(cls, runner: Runner, **changes: int) -> Worker:
        config = runner.model_config
        core = DecodeCore(
            runner.pools,
            DecodeLimits(
                max_context=8192,
                vocab_size=config.vocab_size,
                eos_token_id=config.eos_token_id,
                local_prefill=True,
                num_layers=config.num_layers,
                **changes,
            ),
        )
        return cls(runner, core)

    def start(
        self, name: str, prompt: tuple[int, ...], sampling: SamplingParams, emitted: tuple[int, ...] = ()
    ) -> None:
        start = StartRequest(request_id=name, attempt=1, prompt=prompt, sampling=sampling, source=None, emitted=emitted)
        self._carry_out(self.core.step(0.0, Start(start, SECRET)))

    def step(self) -> bool:
        batch = self.core.next_batch(0.0)
        if batch:
            self._carry_out(self.core.finish(0.0, self.runner.step(batch)))
        return bool(batch)

    def run(self) -> None:
        while self.step():
            pass

    def _carry_out(self, actions: list[object]) -> None:
        for action in actions:
            match action:
                case Emit(run, event):
                    self.events.append(event)
                    if isinstance(event, Tokens):
                        self.said.setdefault(run.request_id, []).extend(event.tokens)
                    elif not isinstance(event, Admitted | Progress):
                        self.ended[run.request_id] = event
                case Save(run, items):
                    self._carry_out(self.core.step(0.0, Saved(run, save(self.runner.pools, items))))
                case Restore(run, items, pages):
                    self._carry_out(self.core.step(0.0, Restored(run, restore(self.runner.pools, items, pages))))


def prompt_of(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(1000 * n + seed)
    return tuple(rng.randrange(3, 250) for _ in range(n))


def sampling_of(seed: int, max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=0.9,
        ignore_eos=True,
        repetition_penalty=1.2,
        logprobs=True,
        top_logprobs=2,
    )


def bits(tokens: Iterator[Sampled] | list[TokenEvent]) -> list[tuple[object, ...]]:
    return [(token.token_id, token.logprob, token.top) for token in tokens]


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_answers_to_prompts_computed_here_are_those_of_one_process_to_the_bit(
    make_runner: MakeRunner, layout: KvLayout
) -> None:
    """Every boundary there is, all at once, some while others decode already."""
    worker, alone = Worker.of(make_runner(layout, SIZES)), make_runner(layout, SIZES)
    lengths = (1, 127, 128, 129, 255, 256, 257, 384, 511, 513, 700, 1281)
    for i, n in enumerate(lengths):
        worker.start(f"r{n}", prompt_of(n), sampling_of(i))
        worker.step()
    worker.run()
    for i, n in enumerate(lengths):
        assert bits(worker.said[f"r{n}"]) == bits(generate(alone, prompt_of(n), sampling_of(i))), n
        assert worker.ended[f"r{n}"].completion_tokens == 6
    assert worker.core.load().running == 0


def test_behind_a_resident_prefix_its_window_is_computed_again_and_nothing_else(make_runner: MakeRunner) -> None:
    worker, alone = Worker.of(make_runner("v4", SIZES)), make_runner("v4", SIZES)
    first = prompt_of(2_000)
    worker.start("first", first, sampling_of(1))
    worker.run()
    for resident, more in ((1_792, 208), (256, 300)):
        prompt = (*first[:resident], *prompt_of(more, seed=resident))
        worker.events.clear()
        name = f"{resident}-{more}"
        worker.start(name, prompt, sampling_of(resident))
        worker.run()
        assert bits(worker.said[name]) == bits(generate(alone, prompt, sampling_of(resident))), name
        admitted, began, *_ = worker.events
        assert admitted == Admitted(resident_prefix=resident, secret=SECRET)
        # Four layers look 256 + 3 * 128 tokens back, in whole pages.
        assert began == Progress(done=max(0, resident - 768), total=len(prompt), cached=max(0, resident - 768))
        assert worker.ended[name].cached_tokens == max(0, resident - 768)
    # The first one's pages are as they were.
    worker.start("again", first, sampling_of(1))
    worker.run()
    assert bits(worker.said["again"]) == bits(worker.said["first"])


def test_an_answer_that_began_elsewhere_goes_on_here_without_any_prefill_worker(make_runner: MakeRunner) -> None:
    worker, alone = Worker.of(make_runner("v4", SIZES)), make_runner("v4", SIZES)
    prompt, sampling = prompt_of(700), sampling_of(3, max_tokens=20)
    reference = bits(generate(alone, prompt, sampling))
    ids = tuple(token for token, _, _ in reference)
    for k in (1, 2, 19):
        worker.start(f"from-{k}", prompt, sampling, emitted=ids[:k])
        worker.run()
        assert bits(worker.said[f"from-{k}"]) == reference[k:], k
        assert [token.index for token in worker.said[f"from-{k}"]] == list(range(k, 20))


def test_a_request_makes_room_for_one_whose_prompt_is_being_computed(make_runner: MakeRunner) -> None:
    """Three pages for two requests that need five: one outgrows its page while the other's prompt is computed."""
    worker = Worker.of(make_runner("v4", PoolSizes(full=4, swa=24, slots=8)), growth_tokens=0, prefix_cache=False)
    alone = make_runner("v4", SIZES)
    sampling = {name: sampling_of(seed, max_tokens=20) for seed, name in enumerate("ab")}
    prompts = {"a": prompt_of(250), "b": prompt_of(500)}
    for name in "ab":
        worker.start(name, prompts[name], sampling[name])
    worker.run()
    assert all(isinstance(end, Finished) for end in worker.ended.values()), worker.ended
    for name in "ab":
        assert bits(worker.said[name]) == bits(generate(alone, prompts[name], sampling[name])), name
    assert worker.core.load().preemptions_total > 0


# The core alone


def computing(num_tokens: int = 600, **more: object) -> StartRequest:
    return replace(request(num_tokens=num_tokens, **more), source=None)


def test_those_who_decode_take_part_in_every_step_and_prompts_take_turns() -> None:
    core = DecodeCore(Pools(), limits(local_prefill=True))
    core.step(0.0, Start(computing(10, max_tokens=50), SECRET))
    core.next_batch(0.0)
    core.finish(0.0, [Drawn((Sampled(token_id=5, logprob=-1.0),))])
    for name in ("b", "c"):
        core.step(0.0, Start(replace(computing(600), request_id=name), SECRET))
    seen = []
    for _ in range(6):
        decoding, *others, chunk = core.next_batch(0.0)
        assert (decoding.sequence.request_id, decoding.tokens) == ("a", [5])
        seen.append((chunk.sequence.request_id, chunk.start, len(chunk.tokens), chunk.sample))
        token = Drawn((Sampled(token_id=5, logprob=-1.0),))
        core.finish(0.0, [token] * (1 + len(others)) + [token if chunk.sample else Drawn()])
    assert seen == [
        *(("b", 0, 256, False), ("c", 0, 256, False), ("b", 256, 256, False), ("c", 256, 256, False)),
        *(("b", 512, 88, True), ("c", 512, 88, True)),
    ]
    assert len(core.next_batch(0.0)) == 3


def test_a_worker_that_computes_no_prompts_says_so() -> None:
    core = DecodeCore(Pools(), limits())
    failed = failure(core.step(0.0, Start(computing(), SECRET)))
    assert (failed.code, failed.retryable) == ("invalid_request", False)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("end", ["cancel", "overtaken", "step fails", "not a number"])
def test_however_it_ends_nothing_is_held(steps: int, end: str) -> None:
    pools = Pools()
    core = DecodeCore(pools, limits(local_prefill=True, prefix_cache=True))
    actions = core.step(0.0, Start(computing(600), SECRET))
    assert [type(event) for event in emitted(actions)] == [Admitted, Progress]
    for _ in range(steps):
        core.next_batch(0.0)
        core.finish(0.0, [Drawn()])
    assert core.load().computing_tokens == 600 - 256 * steps
    match end:
        case "cancel":
            core.step(0.0, Cancel(A))
        case "overtaken":
            actions = core.step(0.0, Start(replace(computing(600), attempt=2), SECRET))
            assert failure(actions).code == "stale_attempt"
            core.step(0.0, Cancel(AttemptId("a", 2)))
        case "step fails":
            core.next_batch(0.0)
            assert failure(core.step(0.0, StepFailed("it broke"))).retryable
        case _:
            for left in range(2 - steps, -1, -1):
                core.next_batch(0.0)
                bad = Drawn((Sampled(token_id=0, logprob=0.0, ok=False),))
                actions = core.finish(0.0, [Drawn() if left else bad])
            assert failure(actions).code == "numerical_error"
    assert pools.counts("used") == (0, 0, 0)
    assert core.next_batch(0.0) == []
    assert core.load().computing_tokens == 0


def test_what_was_computed_is_found_again_and_measured() -> None:
    pace = Pace()
    core = DecodeCore(Pools(), limits(local_prefill=True, prefix_cache=True), pace)
    core.step(0.0, Start(computing(600, max_tokens=1), SECRET))
    events: list[object] = []
    for now in (1.0, 2.0, 3.0):
        (chunk,) = core.next_batch(now)
        token = Drawn((Sampled(token_id=5, logprob=-1.0),)) if chunk.sample else Drawn()
        events += emitted(core.finish(now + 0.256, [token]))
    assert isinstance(events[-1], Finished)
    assert core.load().pages[PageClass.FULL].evictable == 2
    assert core.load().prefill_token_ns == pace.line()[0] >= 1_000_000
