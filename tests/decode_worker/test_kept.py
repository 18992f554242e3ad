"""Answers that outlive the call that started them: read again from the first token, and given up when nobody comes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import grpc
import pytest

from tests.decode_worker.oracle import OraclePair, answer, held, pair, until
from tests.decode_worker.test_service import prompt_of
from tests.decode_worker.test_service import start_request as ask
from wire import convert
from wire.rpc import error_from_rpc
from wire.types import (
    Admitted,
    Attached,
    AttachRequest,
    Finished,
    RunRequest,
    StartEvent,
    StartRequest,
    Tokens,
)
from wire.v1 import worker_pb2_grpc

names = (f"kept-{n}" for n in itertools.count())


async def start(workers: OraclePair, request: StartRequest, leave_at: int | None = None) -> list[int]:
    """Start the run as a router does, and leave after so many tokens; what was heard."""
    heard: list[int] = []
    async with contextlib.AsyncExitStack() as stack:
        events = await stack.enter_async_context(contextlib.aclosing(workers.start(request)))  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Admitted):
                run = RunRequest(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    prompt=request.prompt,
                    sampling=request.sampling,
                    skip=event.resident_prefix,
                    secret=event.secret,
                )
                stack.callback(workers.run(run).cancel)
            elif isinstance(event, Tokens):
                heard += [token.token_id for token in event.tokens]
                if leave_at is not None and len(heard) >= leave_at:
                    break
    return heard


async def attach(workers: OraclePair, request: StartRequest, **changes: int) -> list[StartEvent]:
    message = AttachRequest(request_id=request.request_id, attempt=request.attempt, epoch=22)
    stub = worker_pb2_grpc.DecodeStub(workers.decode_channel)
    call = stub.Attach(convert.attach_request_to_wire(replace(message, **changes)))
    try:
        return [convert.start_event_from_wire(event) async for event in call]
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from failure


def ids(events: list[StartEvent]) -> list[int]:
    return [token.token_id for event in events if isinstance(event, Tokens) for token in event.tokens]


async def test_whoever_attaches_reads_all_of_it_after_its_reader_has_left() -> None:
    async with pair(next(names)) as workers:
        request = replace(ask(workers, "a", prompt_of(300), 40), keep_s=60, context=b"what it was")
        workers.decode_runner.pause_after(4)
        heard = await start(workers, request, leave_at=2)
        workers.decode_runner.resume()
        for _ in range(2):  # as often as anybody likes, and at once
            first, *events, last = await attach(workers, request)
            assert first == Attached(context=b"what it was")
            assert ids(events) == answer(request.prompt, 40)
            assert ids(events)[: len(heard)] == heard
            assert isinstance(last, Finished)
            assert last.completion_tokens == 40
        await until(lambda: not held(workers.decode))


async def test_nobody_but_a_router_that_knows_the_run_of_this_life_reads_it() -> None:
    async with pair(next(names)) as workers:
        request = replace(ask(workers, "a", prompt_of(30), 4), keep_s=60)
        await start(workers, request)
        for changes in ({"epoch": 23}, {"attempt": 2}):
            with pytest.raises(Exception, match="no answer of run") as failure:
                await attach(workers, request, **changes)
            assert failure.value.code == "stream_gone"
        assert ids(await attach(workers, request)) == answer(request.prompt, 4)


async def test_without_being_asked_to_a_worker_keeps_nothing() -> None:
    async with pair(next(names)) as workers:
        request = ask(workers, "a", prompt_of(30), 4)
        await start(workers, request)
        with pytest.raises(Exception, match="no answer of run"):
            await attach(workers, request)


async def test_an_answer_that_nobody_comes_for_is_given_up_with_its_pages() -> None:
    async with pair(next(names)) as workers:
        request = replace(ask(workers, "a", prompt_of(300), 2_000), keep_s=1)
        heard = await start(workers, request, leave_at=2)
        assert heard == answer(request.prompt, len(heard))
        await until(lambda: not workers.decode._kept and not held(workers.decode))
        assert workers.decode.is_idle()


async def test_tokens_drawn_elsewhere_come_first() -> None:
    async with pair(next(names)) as workers:
        whole = answer(prompt_of(300), 12)
        base = ask(workers, "a", prompt_of(300), 12)
        request = replace(base, keep_s=60, emitted=tuple(whole[:5]))
        assert await start(workers, request) == whole[5:]
        assert ids(await attach(workers, request)) == whole
