"""A prefill and a decode worker over real gRPC, with an engine that notices every wrong byte."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvtransfer.loopback import Flow
from tests.decode_worker.oracle import OraclePair, OraclePools, Pair, answer, pair, until
from wire import convert
from wire.rpc import error_from_rpc
from wire.types import (
    Admitted,
    ClaimRequest,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    RunFinished,
    RunRequest,
    SamplingParams,
    StartEvent,
    StartRequest,
    Tokens,
)
from wire.v1 import kv_pb2, kv_pb2_grpc

names = (f"pair-{n}" for n in itertools.count())


@pytest.fixture
async def workers() -> AsyncIterator[OraclePair]:
    async with pair(next(names)) as workers:
        yield workers


def prompt_of(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed * 100_003 + n)
    return tuple(rng.randrange(2, 1000) for _ in range(n))


def start_request(
    workers: Pair[Any, Any],
    request_id: str,
    prompt: tuple[int, ...],
    max_tokens: int,
    attempt: int = 1,
    sampling: SamplingParams | None = None,
) -> StartRequest:
    return StartRequest(
        request_id=request_id,
        attempt=attempt,
        prompt=prompt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, seed=0),
        source=workers.prefill_info.ref,
    )


async def request(
    workers: Pair[Any, Any],
    request_id: str,
    prompt: tuple[int, ...],
    max_tokens: int = 0,
    attempt: int = 1,
    sampling: SamplingParams | None = None,
) -> tuple[list[int], list[StartEvent]]:
    """One request as the router drives it: start, prefill once admitted. (token ids, all events)"""
    start = start_request(workers, request_id, prompt, max_tokens, attempt, sampling)
    events: list[StartEvent] = []
    ids: list[int] = []
    async with asyncio.TaskGroup() as tasks, contextlib.aclosing(workers.start(start)) as stream:
        async for event in stream:
            events.append(event)
            if isinstance(event, Admitted):
                run = RunRequest(
                    request_id=request_id,
                    attempt=attempt,
                    prompt=prompt,
                    sampling=start.sampling,
                    skip=event.resident_prefix,
                    secret=event.secret,
                )
                prefill = tasks.create_task(drain(workers, run))
            elif isinstance(event, Tokens):
                indices = [token.index for token in event.tokens]
                assert indices == list(range(len(ids), len(ids) + len(indices)))
                ids += [token.token_id for token in event.tokens]
            elif isinstance(event, Failed):
                prefill.cancel()
    return ids, events


async def drain(workers: Pair[Any, Any], run: RunRequest) -> None:
    call = workers.run(run)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass  # the decode side tells what became of the request
    finally:
        call.cancel()


@pytest.mark.parametrize("n", [1, 127, 128, 129, 255, 256, 257, 383, 384, 1100])
async def test_an_answer_is_the_reference_whatever_the_prompts_length(workers: OraclePair, n: int) -> None:
    prompt = prompt_of(n)
    ids, events = await request(workers, "r", prompt, 40)
    assert ids == answer(prompt, 40)
    assert [type(event) for event in events[:2]] == [Admitted, Fetching]
    assert events[-1] == Finished(reason=FinishReason.LENGTH, prompt_tokens=n, cached_tokens=0, completion_tokens=40)
    await workers.settle()


async def test_many_requests_at_once_each_get_their_own_answer(workers: OraclePair) -> None:
    prompts = [prompt_of(n, seed=1) for n in (3, 900, 256, 31, 1500, 128, 640, 77, 2000, 5)]
    results = await asyncio.gather(*(request(workers, f"r{i}", prompt, 30 + i) for i, prompt in enumerate(prompts)))
    for i, (prompt, (ids, _)) in enumerate(zip(prompts, results, strict=True)):
        assert ids == answer(prompt, 30 + i)
    await workers.settle()


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(workers: OraclePair) -> None:
    rng = random.Random(3)

    async def leave_early(i: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice([0.0, 0.002, 0.005, 0.01, 0.03, 0.1])):
                await request(workers, f"r{i}", prompt_of(rng.choice([1, 300, 2000, 4000])), 2000)

    for batch in range(4):
        await asyncio.gather(*(leave_early(100 * batch + i) for i in range(10)))
    await workers.settle()
    ids, _ = await request(workers, "after", prompt_of(300), 5)
    assert ids == answer(prompt_of(300), 5)


async def test_a_bit_that_flips_between_workers_is_caught_and_fails_the_attempt_alone(workers: OraclePair) -> None:
    workers.gate.flow = Flow.HELD
    prompt = prompt_of(300)
    attempt = asyncio.create_task(request(workers, "r", prompt, 5))
    await until(lambda: workers.prefill_pools.full.counts().used and not workers.prefill.info("").running)
    for memory in workers.prefill_pools.memory.values():
        memory[1:] ^= 1  # after the checksums were taken
    workers.gate.flow = Flow.OPEN
    ids, events = await attempt
    assert ids == []
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].retryable) == ("transfer_failed", True)
    assert "checksum" in events[-1].message
    await workers.settle()
    # The owner's cached pages are still the changed ones: it must notice, and compute them anew.
    ids, _ = await request(workers, "r", prompt, 5, attempt=2)
    assert ids == answer(prompt, 5)


async def test_a_frozen_owner_fails_the_attempt_and_its_pages_wait_in_quarantine_until_quiet(
    workers: OraclePair,
) -> None:
    workers.gate.flow = Flow.HELD
    ids, events = await request(workers, "r", prompt_of(300), 5)
    assert ids == []
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].retryable) == ("transfer_failed", True)
    counts = workers.decode_pools.full.counts()
    assert counts.quarantined > 0
    assert counts.used == 0
    workers.gate.flow = Flow.OPEN
    await workers.settle()


async def test_a_prefill_worker_that_goes_away_in_mid_prompt_fails_the_attempt_at_once(workers: OraclePair) -> None:
    workers.prefill_runner.pause_after(3)
    attempt = asyncio.create_task(request(workers, "r", prompt_of(2000), 5))
    await until(lambda: 0 < workers.prefill.info("").queued_tokens < 2000 - 400)
    await workers.stop_prefill()
    ids, events = await attempt
    workers.prefill_runner.resume()
    assert ids == []
    assert isinstance(events[-1], Failed)
    assert events[-1].retryable
    await workers.settle()


async def test_a_prefill_step_that_raises_fails_the_request_and_marks_the_worker(workers: OraclePair) -> None:
    workers.prefill_runner.fail_next.set()
    ids, events = await request(workers, "r", prompt_of(300), 5)
    assert ids == []
    assert isinstance(events[-1], Failed)
    # Not this worker was lost, the pages were.
    assert (events[-1].code, events[-1].retryable) == ("transfer_failed", True)
    assert workers.prefill.broken is not None
    await workers.settle()


async def test_a_decode_step_that_raises_fails_the_request_and_marks_the_worker(workers: OraclePair) -> None:
    workers.decode_runner.fail_next.set()
    ids, events = await request(workers, "r", prompt_of(300), 5)
    assert ids == answer(prompt_of(300), 1)
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].retryable) == ("worker_lost", True)
    assert workers.decode.broken is not None
    await workers.settle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_whose_numbers_are_none_fails_its_requests_and_then_leaves(
    workers: OraclePair, role: str
) -> None:
    runner, service = getattr(workers, f"{role}_runner"), getattr(workers, role)
    ids, _ = await request(workers, "good", prompt_of(300), 5)
    assert ids == answer(prompt_of(300), 5)
    runner.is_sick.set()
    for i in range(3):
        assert service.broken is None
        _, events = await request(workers, f"r{i}", prompt_of(300 + i), 5)
        assert isinstance(events[-1], Failed)
        assert (events[-1].code, events[-1].retryable) == ("numerical_error", True)
    assert "computes no numbers" in service.broken
    await workers.settle()


async def test_one_request_whose_numbers_are_none_now_and_then_is_no_reason_to_leave(workers: OraclePair) -> None:
    for i in range(4):
        workers.decode_runner.is_sick.set()
        _, events = await request(workers, f"bad{i}", prompt_of(300 + i), 5)
        assert isinstance(events[-1], Failed)
        workers.decode_runner.is_sick.clear()
        ids, _ = await request(workers, f"good{i}", prompt_of(400 + i), 5)
        assert ids == answer(prompt_of(400 + i), 5)
    assert workers.decode.broken is None


async def test_a_request_larger_than_the_worker_is_refused_with_its_numbers() -> None:
    async with pair(next(names), decode_pools=OraclePools(full=4)) as workers:
        _, events = await request_refused(workers, prompt_of(1000), 300)
        assert isinstance(events[0], Failed)
        assert (events[0].code, events[0].retryable) == ("invalid_request", False)
        assert "1000 prompt tokens and max_tokens=300 need 6 pages and this worker has 4" in events[0].message


async def request_refused(
    workers: OraclePair, prompt: tuple[int, ...], max_tokens: int
) -> tuple[None, list[StartEvent]]:
    stream = workers.start(start_request(workers, "r", prompt, max_tokens))
    return None, [event async for event in stream]


async def test_more_requests_than_fit_take_turns_and_all_are_answered() -> None:
    small = {
        "decode_pools": OraclePools(full=6, swa=4, slots=2),
        "prefill_pools": OraclePools(full=6, swa=8, slots=2),
    }
    async with pair(next(names), **small) as workers:
        prompts = [prompt_of(400 + i) for i in range(8)]
        results = await asyncio.gather(*(request(workers, f"r{i}", p, 20) for i, p in enumerate(prompts)))
        for prompt, (ids, _) in zip(prompts, results, strict=True):
            assert ids == answer(prompt, 20)
        await workers.settle()


async def test_the_same_attempt_twice_is_stale(workers: OraclePair) -> None:
    first = workers.start(start_request(workers, "r", prompt_of(10), 5))
    assert isinstance(await anext(first), Admitted)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(workers.start(start_request(workers, "r", prompt_of(10), 5)))
    assert error_from_rpc(refused.value).code == "stale_attempt"
    await first.aclose()  # type: ignore[attr-defined]
    await workers.settle()


async def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has(workers: OraclePair) -> None:
    prompt = prompt_of(300)
    workers.decode_runner.pause_after(1)
    old = asyncio.create_task(request(workers, "old", prompt, 30))
    await until(lambda: not workers.decode.is_idle())
    workers.decode.draining = True
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(workers.start(start_request(workers, "new", prompt, 5)))
    assert error_from_rpc(refused.value).code == "draining"
    workers.decode_runner.resume()
    ids, _ = await old
    assert ids == answer(prompt, 30)
    assert workers.decode.is_idle()


async def test_pages_are_shown_to_nobody_without_the_secret(workers: OraclePair) -> None:
    run = RunRequest(
        request_id="r",
        attempt=1,
        prompt=prompt_of(300),
        sampling=SamplingParams(max_tokens=5, seed=0),
        skip=0,
        secret=b"a" * 16,
    )
    call = workers.run(run)
    events = [convert.run_event_from_wire(message) async for message in call]
    assert events[-1] == RunFinished(prompt_tokens=300, cached_tokens=0)
    pages = kv_pb2_grpc.PagesStub(workers.prefill_channel)
    claim = ClaimRequest(
        request_id="r",
        attempt=1,
        from_token=0,
        secret=b"b" * 16,
        reader_id="decode-9",
        reader_epoch=1,
        signature="oracle",
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(pages.Claim(convert.claim_request_to_wire(claim))))
    assert error_from_rpc(refused.value).code == "claim_refused"

    good = kv_pb2.ClaimRequest()
    good.CopyFrom(convert.claim_request_to_wire(claim))
    good.secret = b"a" * 16
    offers = []
    async for message in pages.Claim(good):
        offers.append(convert.page_offer_from_wire(message))
        if offers[-1].tail is not None:
            break
    assert [offer.seq for offer in offers] == list(range(len(offers)))
    assert offers[-1].tail is not None
    assert offers[-1].tail.first.token_id == answer(prompt_of(300), 1)[0]
    release = kv_pb2.ReleaseRequest(claim_id=offers[0].claim_id, secret=b"b" * 16)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pages.Release(release)
    assert error_from_rpc(refused.value).code == "claim_refused"
    release.secret = b"a" * 16
    assert (await pages.Release(release)).valid
    assert (await pages.Release(release)).valid  # idempotent
    await workers.settle()


async def test_wherever_a_request_is_when_its_client_leaves_it_is_given_up_and_that_is_measured() -> None:
    """In line, while its prompt is computed, while its pages travel, and while it streams."""
    small = {"decode_pools": OraclePools(full=8, swa=24, slots=8)}
    async with pair(next(names), **small) as workers:

        def given_up() -> float:
            return workers.metric("penumbra_cancel_seconds_count")

        async def leave(
            name: str, until_event: type[object] | None, prompt: tuple[int, ...], skip_prefill: bool
        ) -> None:
            async with contextlib.AsyncExitStack() as stack:
                stream = workers.start(start_request(workers, name, prompt, 400))
                events = await stack.enter_async_context(contextlib.aclosing(stream))  # type: ignore[type-var]
                waiting = asyncio.ensure_future(anext(events))
                if until_event is None:  # in line: it hears nothing at all
                    await until(lambda: workers.decode._engine.load.waiting == 1)
                    waiting.cancel()
                    await asyncio.wait({waiting})
                    return
                event: object = await waiting
                while True:
                    if isinstance(event, Admitted) and not skip_prefill:
                        run = RunRequest(
                            request_id=name,
                            attempt=1,
                            prompt=prompt,
                            sampling=start_request(workers, name, prompt, 400).sampling,
                            skip=event.resident_prefix,
                            secret=event.secret,
                        )
                        stack.callback(workers.run(run).cancel)
                    if isinstance(event, until_event):
                        return
                    event = await anext(events)

        async with contextlib.AsyncExitStack() as held:
            # Somebody who has all the room, so that the next has to wait.
            first = workers.start(start_request(workers, "full", prompt_of(1_200), 600))
            events = await held.enter_async_context(contextlib.aclosing(first))  # type: ignore[type-var]
            assert isinstance(await anext(events), Admitted)
            await leave("queued", None, prompt_of(900), skip_prefill=True)
            await until(lambda: given_up() == 1)
        await until(lambda: given_up() == 2)
        await leave("prefill", Fetching, prompt_of(900), skip_prefill=True)
        await until(lambda: given_up() == 3)
        workers.gate.flow = Flow.HELD
        await leave("transfer", Fetching, prompt_of(900, 1), skip_prefill=False)
        await until(lambda: given_up() == 4)
        workers.gate.flow = Flow.OPEN
        await leave("stream", Tokens, prompt_of(900, 2), skip_prefill=False)
        await until(lambda: given_up() == 5)
        await workers.settle()
        assert workers.decode._engine.load.running == workers.decode._engine.load.waiting == 0
