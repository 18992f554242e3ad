"""Answers that go on at another worker, with a real model: from the prompt's pages and tokens, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest

from decode_worker.scheduler import DecodeLimits
from engine.cache.pools import PoolSizes
from engine.colocated import generate
from engine.config import KvLayout
from engine.runner import Runner
from prefill_worker.scheduler import PrefillLimits
from tests.decode_worker.conftest import MakeRunner
from tests.decode_worker.oracle import Pair, pair_of, until
from wire import convert
from wire.types import (
    Admitted,
    Failed,
    Finished,
    FinishReason,
    Replaying,
    RunFinished,
    RunRequest,
    SamplingParams,
    StartRequest,
    TokenEvent,
    Tokens,
)

names = (f"resumed-{n}" for n in itertools.count())
SIZES = PoolSizes(full=40, swa=24, slots=8)


def prompt_of(n: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 250) for _ in range(n))


def limits(runner: Runner) -> tuple[PrefillLimits, DecodeLimits]:
    config, context = runner.model_config, 4096
    prefill = PrefillLimits(chunk_tokens=256, max_batch_tokens=512, max_context=context, vocab_size=config.vocab_size)
    decode = DecodeLimits(max_context=context, vocab_size=config.vocab_size, eos_token_id=config.eos_token_id)
    return prefill, decode


async def attempt(
    workers: Pair[object, object],
    stack: contextlib.AsyncExitStack,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    number: int,
    emitted: tuple[int, ...],
    leave_at: int | None = None,
) -> tuple[list[TokenEvent], list[object], RunFinished | None]:
    """One attempt as the router drives it: the prefill call lives until `stack` is left, and with it the pages.
    (tokens, all decode events, how prefill ended)
    """
    start = StartRequest(
        request_id="r",
        attempt=number,
        prompt=prompt,
        sampling=sampling,
        source=workers.prefill_info.ref,
        emitted=emitted,
    )
    events: list[object] = []
    said: list[TokenEvent] = []
    ended: asyncio.Future[RunFinished] = asyncio.get_running_loop().create_future()

    async def prefill(run: RunRequest) -> None:
        call = workers.run(run)
        try:
            async for message in call:
                event = convert.run_event_from_wire(message)
                if isinstance(event, RunFinished):
                    ended.set_result(event)
        finally:
            call.cancel()

    async with contextlib.aclosing(workers.start(start)) as stream:  # type: ignore[type-var]
        async for event in stream:
            events.append(event)
            assert not isinstance(event, Failed), event
            if isinstance(event, Admitted):
                run = RunRequest(
                    request_id="r",
                    attempt=number,
                    prompt=prompt,
                    sampling=sampling,
                    skip=event.resident_prefix,
                    secret=event.secret,
                    hold=True,
                )
                task = asyncio.create_task(prefill(run))
                stack.push_async_callback(_end, task)
            if isinstance(event, Tokens):
                said += event.tokens
                if leave_at is not None and len(said) >= leave_at:
                    break
    return said, events, await ended if ended.done() else None


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("layout", ["v4", "exact"])
async def test_an_answer_goes_on_anywhere_with_the_bits_it_would_have_had(
    make_runner: MakeRunner, layout: KvLayout
) -> None:
    """Left after its first token, on both sides of a page's end, and before its last one; penalties look back too."""
    prefill, decode, alone = make_runner(layout, SIZES), make_runner(layout, SIZES), make_runner(layout, SIZES)
    prompt = prompt_of(500, seed=1)
    sampling = SamplingParams(
        max_tokens=40,
        seed=5,
        temperature=0.9,
        ignore_eos=True,
        presence_penalty=0.7,
        repetition_penalty=1.3,
        logprobs=True,
        top_logprobs=2,
    )
    reference = [(s.token_id, s.logprob, s.top) for s in generate(alone, prompt, sampling)]
    ids = tuple(token for token, _, _ in reference)
    async with pair_of(next(names), (prefill.pools, prefill), (decode.pools, decode), *limits(alone)) as workers:
        async with contextlib.AsyncExitStack() as stack:
            said, _, _ = await attempt(workers, stack, prompt, sampling, 1, (), leave_at=3)
            assert [t.token_id for t in said] == list(ids[: len(said)])
            computed = workers.prefill._metrics.prompt_tokens._value.get()
            for number, k in enumerate((1, 11, 12, 13, 39), start=2):
                said, events, end = await attempt(workers, stack, prompt, sampling, number, ids[:k])
                assert [(t.token_id, t.logprob, t.top) for t in said] == reference[k:], f"from token {k} on"
                assert [t.index for t in said] == list(range(k, 40))
                assert Replaying(done=0, total=k) in events
                assert events[-1] == Finished(
                    reason=FinishReason.LENGTH, prompt_tokens=500, cached_tokens=500, completion_tokens=40
                )
                assert end == RunFinished(prompt_tokens=500, cached_tokens=500)
            # The prompt was computed once, for the first attempt.
            assert workers.prefill._metrics.prompt_tokens._value.get() == computed == 500
            await until(lambda: workers.decode.is_idle())
            # What is only held keeps nobody from going, once the last reader's release has come.
            await until(lambda: workers.prefill.is_idle())
        await workers.settle()


async def test_pages_are_held_for_as_long_as_the_caller_stays_and_while_there_is_room(make_runner: MakeRunner) -> None:
    prefill, decode = make_runner("exact", PoolSizes(full=5, swa=12, slots=3)), make_runner("exact", SIZES)
    prompt, sampling = prompt_of(700, seed=2), SamplingParams(max_tokens=3, seed=5, ignore_eos=True)
    async with pair_of(next(names), (prefill.pools, prefill), (decode.pools, decode), *limits(prefill)) as workers:
        async with contextlib.AsyncExitStack() as stack:
            await attempt(workers, stack, prompt, sampling, 1, ())
            await until(lambda: workers.prefill._table.counts().held == 1)
            assert workers.held()
        await workers.settle()
        async with contextlib.AsyncExitStack() as stack:
            await attempt(workers, stack, prompt, sampling, 2, ())
            await until(lambda: workers.prefill._table.counts().held == 1)
            # Another prompt needs four pages of five: what nobody reads gives way.
            other = RunRequest(
                request_id="other",
                attempt=1,
                prompt=prompt_of(1000, seed=3),
                sampling=sampling,
                skip=0,
                secret=b"s" * 16,
            )
            call = workers.run(other)
            events = [convert.run_event_from_wire(message) async for message in call]
            assert isinstance(events[-1], RunFinished)
            assert workers.prefill._table.counts().held == 0
