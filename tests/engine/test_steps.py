"""Steps padded to the sizes graphs are captured for, run on a CPU without capturing: nothing of them changes a bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import structlog
import torch

from engine import steps
from engine.batch import Segment, Tables
from engine.config import KvLayout
from engine.kernels.sample import UNSURE, draw
from engine.runner import WARM_UP_TOKENS, Runner
from engine.steps import PAGE_SIZES, TOKEN_SIZES, StepGraphs, _Memory, _Part
from tests.engine.speculation import Speculator, drafting_model, half_right, runner_of
from tests.engine.test_mtp import PACKED, plain_answers, prompt_of
from wire.types import PageClass, SamplingParams

LENGTHS = (1, 5, 127, 255, 257, 383)
PADDED = [SamplingParams(max_tokens=20, seed=n, temperature=float(n % 2), ignore_eos=True) for n in LENGTHS]


class Counting(StepGraphs):
    taken = drawn = 0

    def step(self, batch, tables):
        step = super().step(batch, tables)
        self.taken += step is not None
        if step is not None:
            self.drawn += 1
            logits = step.logits

            def by_turns(wanted):
                self.drawn -= 1
                return logits(wanted)

            step.logits = by_turns
        return step


def with_graphs(runner: Runner) -> Runner:
    runner.graphs = Counting(runner.model, runner.draft, runner.pools, capture=False)
    return runner


def pages_of(runner: Runner) -> list[torch.Tensor]:
    """The bytes of everything but the sinks."""
    pools = runner.pools
    items = {PageClass.FULL: pools.full, PageClass.SWA: pools.swa, PageClass.STATE: None}
    return [
        pools.copy_out(cls, range(1 + (cls is PageClass.STATE), 2 * 8 if pool is None else pool.capacity + 1))
        for cls, pool in items.items()
    ]


@pytest.mark.parametrize("layout", ["exact", "v4"])
@pytest.mark.parametrize("depth", [0, 3])
def test_padded_steps_draw_and_guess_and_leave_what_single_ones_do(layout: KvLayout, depth: int) -> None:
    """Six requests that end at different times, prompts of one page and more, drafts kept and refused."""
    config, tensors = drafting_model(31, "flash", **(PACKED if layout == "v4" else {}))
    prompts = [prompt_of(config, n, n) for n in LENGTHS]
    params = [replace(p, max_tokens=12 + 2 * n) for n, p in enumerate(PADDED)]
    truth = plain_answers(runner_of(config, tensors, layout, draft=False), prompts, params)
    runs = []
    for graphs in (False, True):
        runner = runner_of(config, tensors, layout, draft=depth > 0)
        run = Speculator(
            with_graphs(runner) if graphs else runner, depth, guesser=half_right(truth, config.vocab_size, 7)
        )
        guesses = []
        for prompt, options in zip(prompts, params, strict=True):
            guesses.append(run.prefill(prompt, options).guesses)
        run.run()
        runs.append((runner, run, guesses))
    (single, first, guessed), (padded, second, guessed_padded) = runs
    assert isinstance(padded.graphs, Counting)
    assert padded.graphs.taken > 15
    assert padded.graphs.drawn > 10, "drawn and verified without the host"
    assert guessed_padded == guessed
    for one, other in zip(first.requests, second.requests, strict=True):
        assert other.drawn == one.drawn
        assert (other.guesses, other.tried, other.kept) == (one.guesses, one.tried, one.kept)
    assert all(one.answer == [s.token_id for s in said] for one, said in zip(first.requests, truth, strict=True))
    for one, other in zip(pages_of(single), pages_of(padded), strict=True):
        assert torch.equal(one, other)


def test_a_row_that_is_left_to_the_host_is_drawn_there_and_the_step_ends_for_its_request(monkeypatch) -> None:
    """Some draws are left, of tokens and of guesses: answers are the same, only fewer drafts are kept."""
    config, tensors = drafting_model(31, "flash")
    prompts = [prompt_of(config, n, n) for n in (5, 127)]
    truth = plain_answers(runner_of(config, tensors, "exact", draft=False), prompts, PADDED[:2])
    turn = itertools.count()

    def unsure_at_times(*arguments):
        drawn = draw(*arguments)
        drawn[next(turn) % 3 :: 3, 1] = UNSURE
        return drawn

    monkeypatch.setattr(steps, "draw", unsure_at_times)
    runner = with_graphs(runner_of(config, tensors, "exact", draft=True))
    run = Speculator(runner, 3, guesser=half_right(truth, config.vocab_size, 7))
    for prompt, options in zip(prompts, PADDED[:2], strict=True):
        run.prefill(prompt, options)
    run.run()
    assert [one.answer for one in run.requests] == [[s.token_id for s in said] for said in truth]
    assert runner.graphs.drawn > 10
    assert any(one.kept for one in run.requests)


def test_a_row_that_is_left_to_the_host_may_end_an_answer_that_is_long_enough(monkeypatch) -> None:
    """Its stop token is ruled out for the first two tokens, and drawn later."""
    config, tensors = drafting_model(31, "flash")
    plain, prompts = runner_of(config, tensors, "exact", draft=False), [prompt_of(config, 127, 127)]
    (said,) = ([s.token_id for s in one] for one in plain_answers(plain, prompts, [PADDED[1]]))
    last = next(i for i in range(4, len(said)) if said[i] not in said[:i])
    options = replace(PADDED[1], stop_token_ids=(said[last],), min_tokens=2)

    def unsure(*arguments):
        drawn = draw(*arguments)
        drawn[:, 1] = UNSURE
        return drawn

    monkeypatch.setattr(steps, "draw", unsure)
    runner = with_graphs(runner_of(config, tensors, "exact", draft=True))
    run = Speculator(runner, 3, ends=options.stop_token_ids)
    run.prefill(prompts[0], options)
    run.run()
    assert [one.answer for one in run.requests] == [said[: last + 1]]
    assert runner.graphs.drawn == last - 1, "all but the first two"


def test_steps_of_which_the_host_has_to_see_logits_go_by_turns() -> None:
    """One request of the batch wants log probabilities: then all are drawn on the host."""
    config, tensors = drafting_model(31, "flash")
    prompts = [prompt_of(config, n, n) for n in (5, 127)]
    params = [replace(PADDED[0], logprobs=True, top_logprobs=2), PADDED[1]]
    truth = plain_answers(runner_of(config, tensors, "exact", draft=False), prompts, params)
    runner = with_graphs(runner_of(config, tensors, "exact", draft=True))
    run = Speculator(runner, 3)
    for prompt, options in zip(prompts, params, strict=True):
        run.prefill(prompt, options)
    run.run()
    assert [one.answer for one in run.requests] == [[s.token_id for s in said] for said in truth]
    assert runner.graphs.taken > runner.graphs.drawn


def test_a_batch_of_every_size_fits_its_graph_and_a_longer_one_has_none() -> None:
    config, tensors = drafting_model(5, "flash")
    runner = runner_of(config, tensors, "exact", draft=False)
    graphs = StepGraphs(runner.model, None, runner.pools, capture=False)
    run = Speculator(runner, 0)
    sequence = run.prefill(prompt_of(config, 40), PADDED[0]).sequence

    def segment(tokens: int, **changes) -> Segment:
        return Segment(sequence=sequence, start=0, tokens=[3] * tokens, sample=True, **changes)

    for tokens in (1, 9, 40, 256):
        batch = [segment(tokens)]
        step = graphs.step(batch, Tables.of(batch))
        assert step is not None
        assert step.logits([tokens - 1]).shape == (1, config.vocab_size)
        assert len(step.streams()) == tokens
    for batch in ([segment(257)], [segment(1)] * 65, [segment(4, rebuild=True)], [segment(4, following=[1, 2])]):
        assert graphs.step(batch, Tables.of(batch)) is None
    wide = Tables.of([replace(segment(1), start=PAGE_SIZES[-1] * 256)])
    assert graphs.step([segment(1)], wide) is None
    assert list(TOKEN_SIZES) == sorted(TOKEN_SIZES)


def test_warming_up_takes_steps_at_both_ends_of_the_longest_context_and_gives_all_back() -> None:
    config, tensors = drafting_model(31, "flash")
    runner = with_graphs(runner_of(config, tensors, "exact"))
    pools, places = runner.pools, []
    step = runner.step
    runner.step = lambda batch: places.append((batch[0].start, len(batch[0].tokens))) or step(batch)  # type: ignore[method-assign,func-returns-value]
    every = (pools.full, pools.swa, pools.slots)
    free = [pool.free for pool in every]
    runner.warm_up()
    assert set(places) == {(start, n) for n in WARM_UP_TOKENS for start in (0, runner.max_context - n - 2)}
    assert len(places) == 2 * len(set(places)), "a graph is captured the second time"
    assert isinstance(runner.graphs, Counting)
    assert runner.graphs.taken == len([n for _, n in places if n <= TOKEN_SIZES[-1]])
    assert [pool.free for pool in every] == free


def test_a_part_that_can_not_be_captured_is_called_kernel_by_kernel_from_then_on() -> None:
    """Here there is no GPU to capture on; on one, memory may be short."""
    calls: list[int] = []

    def run() -> int:
        calls.append(len(calls))
        return len(calls)

    class Memory(_Memory):
        def renew(self) -> None:
            self.pool = object()

    memory = Memory()
    first = memory.pool
    part = _Part(run, memory)
    with structlog.testing.capture_logs() as told:
        assert [part() for _ in range(4)] == [1, 2, 3, 4]
    assert calls == [0, 1, 2, 3]
    assert [line["event"] for line in told] == ["part_of_a_step_not_captured"], "said once"
    assert memory.pool is not first, "torch goes on recording into the one"
