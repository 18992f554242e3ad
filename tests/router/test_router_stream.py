"""Whole requests through a router between a real HTTP client and workers that follow a script over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.router.conftest import BOS, EOS, MODEL, RouterStarter, byte_ids
from tests.router.scripted_worker import SECRET, ScriptedWorker, for_ever, scripted
from wire.types import (
    Admitted,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    Progress,
    RunEvent,
    RunFinished,
    RunRequest,
    StartEvent,
    StartRequest,
    TokenEvent,
    Tokens,
)

PREFILLED: set[tuple[str, int]] = set()
"""(request, attempt) whose prefill ran: no decode worker has a token before."""

BODY = {"model": MODEL, "prompt": "ab", "max_tokens": 50, "seed": 7}


def saying(text: str, *, eos: bool = True, per_message: int = 3) -> Callable[[StartRequest], AsyncIterator[StartEvent]]:
    """A decode worker that answers with `text`, a few tokens to a message, and ends as a real one would."""

    async def script(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        yield Fetching(pages=3)
        await prefilled(request)
        ids = (byte_ids(text) + ([EOS] if eos else []))[: request.sampling.max_tokens]
        events = [
            TokenEvent(index=i, token_id=token, logprob=-0.5, top=((token, -0.5),) * request.sampling.top_logprobs)
            for i, token in enumerate(ids)
        ]
        for at in range(0, len(events), per_message):
            yield Tokens(attempt=request.attempt, tokens=tuple(events[at : at + per_message]))
        reason = FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH
        yield finished(request, len(ids), reason)

    return script


def finished(request: StartRequest, count: int, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(reason=reason, prompt_tokens=len(request.prompt), cached_tokens=0, completion_tokens=count)


def tokens(request: StartRequest, *ids: int, first: int = 0) -> Tokens:
    events = tuple(TokenEvent(index=first + i, token_id=token) for i, token in enumerate(ids))
    return Tokens(attempt=request.attempt, tokens=events)


async def prefills(request: RunRequest) -> AsyncIterator[RunEvent]:
    PREFILLED.add((request.request_id, request.attempt))
    total = len(request.prompt)
    yield Progress(done=total, total=total, cached=0)
    yield RunFinished(prompt_tokens=total, cached_tokens=0)


async def prefilled(request: StartRequest) -> None:
    await until(lambda: (request.request_id, request.attempt) in PREFILLED)


@contextlib.asynccontextmanager
async def cluster(
    start_router: RouterStarter,
    redis_url: str,
    namespace: str,
    decode: Any,
    prefill: Any = prefills,
    **config: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedWorker, ScriptedWorker]]:
    """A router that is ready to use one prefill and one decode worker."""
    async with (
        scripted(redis_url, namespace, "p0", prefill=prefill) as p0,
        scripted(redis_url, namespace, "d0", decode=decode) as d0,
        start_router(namespace=namespace, **config) as client,
    ):
        await until_ready(client, 2)
        yield client, p0, d0


async def until_ready(client: httpx.AsyncClient, num_workers: int) -> None:
    async with asyncio.timeout(10):
        while True:
            workers = (await client.get("/workers")).json()["workers"]
            if [worker["state"] for worker in workers] == ["serving"] * num_workers:
                return
            await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it waits for is another process's state in real life
            await asyncio.sleep(0.01)


def sse(body: str) -> list[Any]:
    """The data of each event; `[DONE]` stays text."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_completion_is_the_text_of_the_tokens_and_the_workers_got_the_request(start_router, redis_url):
    async with cluster(start_router, redis_url, "whole", saying("héllo")) as (client, p0, d0):
        answer = (await client.post("/v1/completions", json=BODY | {"return_token_ids": True})).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("héllo", "stop")
        assert choice["prompt_token_ids"] == [BOS, *byte_ids("ab")]
        assert choice["token_ids"] == [*byte_ids("héllo"), EOS]
        assert answer["usage"] | {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10} == answer["usage"]

        (start,), (run,) = d0.requests, p0.requests
        assert start.prompt == run.prompt == (BOS, *byte_ids("ab"))
        assert start.source == p0.info.ref
        assert (start.sampling.seed, start.sampling.max_tokens, start.attempt) == (7, 50, 1)
        assert (run.secret, run.skip, run.request_id) == (SECRET, 0, start.request_id)
        assert (await client.get("/readiness")).json()["status"] == "ready"


async def test_a_stream_adds_up_to_the_whole_answer_and_ends_with_done(start_router, redis_url):
    async with cluster(start_router, redis_url, "stream", saying("one two three")) as (client, _, _):
        answer = await client.post("/v1/completions", json=BODY | {"stream": True})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *chunks, done = sse(answer.text)
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two three"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
        assert all("usage" not in chunk for chunk in chunks)

        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, usage, done = sse((await client.post("/v1/completions", json=BODY | options)).text)
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 14


async def test_the_openai_package_reads_chat_and_completions(start_router, redis_url):
    async with (
        cluster(start_router, redis_url, "openai", saying("hi there")) as (client, _, _),
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as api,
    ):
        whole = await api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "yo"}], logprobs=True, top_logprobs=1
        )
        assert whole.choices[0].message.content == "hi there"
        assert [entry.token for entry in whole.choices[0].logprobs.content] == list("hi there")
        assert whole.usage.completion_tokens == 9

        stream = await api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "yo"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hi there"
        assert chunks[-1].usage.completion_tokens == 9

        stream = await api.completions.create(model=MODEL, prompt="x", max_tokens=4, logprobs=0, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "hi t"
        assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_stop_string_ends_the_request_on_both_workers(start_router, redis_url):
    async def endless(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        yield tokens(request, *byte_ids("go STOP on"))
        await for_ever()

    async with cluster(start_router, redis_url, "stop", endless) as (client, p0, d0):
        answer = (await client.post("/v1/completions", json=BODY | {"stop": "STOP"})).json()
        assert answer["choices"][0]["text"] == "go "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 7
        await until(lambda: p0.running == d0.running == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_work_on_both_workers(start_router, redis_url, stream: bool):
    async def silent(request: RunRequest) -> AsyncIterator[RunEvent]:
        yield Progress(done=0, total=len(request.prompt), cached=0)
        await for_ever()

    async def waiting(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await for_ever()

    async with cluster(start_router, redis_url, f"leave-{stream}".lower(), waiting, silent) as (client, p0, d0):
        call = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": stream}))
        await until(lambda: p0.running == d0.running == 1)
        call.cancel()
        await until(lambda: p0.running == d0.running == 0)
        metrics = (await client.get("/metrics")).text
        assert 'penumbra_http_requests_total{route="/v1/completions",status="499"} 1.0' in metrics
        assert "penumbra_num_requests_running 0.0" in metrics


@pytest.mark.parametrize("way", ["failed", "closed", "aborted", "gap"])
async def test_a_decode_worker_that_fails_before_the_first_token_is_replaced(start_router, redis_url, way: str):
    async def broken(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await prefilled(request)
        match way:
            case "failed":
                yield Failed(code="transfer_failed", message="3 pages differ", retryable=True)
            case "gap":
                yield tokens(request, 5, first=1)
            case "aborted":
                raise grpc.aio.UsageError("crash")

    namespace = f"replace-{way}"
    async with (
        cluster(start_router, redis_url, namespace, broken) as (client, p0, d0),
        scripted(redis_url, namespace, "d1", decode=saying("fine")) as d1,
    ):
        await until_ready(client, 3)
        answer = await client.post("/v1/completions", json=BODY)
        if way == "aborted":  # a crash of unknown cause is not carried to the next worker
            assert (answer.status_code, d1.requests) == (500, [])
            return
        assert answer.json()["choices"][0]["text"] == "fine"
        assert [request.attempt for request in (*d0.requests, *d1.requests)] == [1, 2]
        assert [request.attempt for request in p0.requests] == [1, 2]
        assert "penumbra_request_retries_total{error_code=" in (await client.get("/metrics")).text


async def test_a_worker_that_dies_and_was_the_only_one_gives_503_and_not_a_hang(start_router, redis_url):
    async def doomed(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await for_ever()

    async with cluster(start_router, redis_url, "death", doomed) as (client, p0, d0):
        call = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await until(lambda: d0.running == 1)
        await d0.server.drain(0)
        answer = await call
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] in ("no_workers", "worker_lost")
        assert answer.headers["retry-after"] == "1"
        await until(lambda: p0.running == 0)


async def test_a_refusal_by_a_worker_keeps_its_status_and_words(start_router, redis_url):
    async def refuses(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Failed(code="invalid_request", message="The pool holds 12 pages, the request needs 13.", retryable=False)

    async with cluster(start_router, redis_url, "refuse", refuses) as (client, _, d0):
        answer = await client.post("/v1/completions", json=BODY)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "The pool holds 12 pages, the request needs 13."
        assert len(d0.requests) == 1


async def test_after_the_first_token_a_failure_is_one_error_event_and_no_done(start_router, redis_url):
    async def breaks(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        yield tokens(request, *byte_ids("half"))
        yield Failed(code="worker_lost", message="gone", retryable=True)

    async with cluster(start_router, redis_url, "half", breaks) as (client, _, d0):
        answer = await client.post("/v1/completions", json=BODY | {"stream": True})
        assert answer.status_code == 200
        *chunks, last = sse(answer.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "half"
        assert last["error"]["code"] == "worker_lost"
        assert "[DONE]" not in answer.text
        assert len(d0.requests) == 4  # it moved as often as it may, here always to the same worker
        # Without a stream nothing was promised yet, so the status says it.
        assert (await client.post("/v1/completions", json=BODY)).status_code == 503


async def test_a_silent_decode_worker_is_given_up_by_its_deadline(start_router, redis_url):
    async def silent(request: StartRequest) -> AsyncIterator[StartEvent]:
        await for_ever()
        yield Fetching(pages=0)

    config = {"admission_timeout_s": 0.5, "max_attempts": 2}
    async with cluster(start_router, redis_url, "silent", silent, **config) as (client, _, d0):
        answer = await client.post("/v1/completions", json=BODY)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert len(d0.requests) == 2
        await until(lambda: d0.running == 0)


async def test_many_requests_at_once_spread_over_the_workers(start_router, redis_url):
    gate = asyncio.Event()

    async def waits(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await gate.wait()
        yield tokens(request, *byte_ids("x"))
        yield finished(request, 1)

    async with (
        cluster(start_router, redis_url, "spread", waits) as (client, _, d0),
        scripted(redis_url, "spread", "d1", decode=waits) as d1,
    ):
        await until_ready(client, 3)
        calls = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(8)]
        await until(lambda: d0.running + d1.running == 8)
        assert (d0.running, d1.running) == (4, 4)
        gate.set()
        texts = [(await call).json()["choices"][0]["text"] for call in calls]
        assert texts == ["x"] * 8
        assert len({request.request_id for request in (*d0.requests, *d1.requests)}) == 8


async def test_above_the_limit_of_running_requests_the_next_one_is_told_to_come_back(start_router, redis_url):
    gate = asyncio.Event()

    async def waits(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await gate.wait()
        yield tokens(request, *byte_ids("x"))
        yield finished(request, 1)

    async with cluster(start_router, redis_url, "limit", waits, max_concurrent_requests=1) as (client, _, d0):
        first = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await until(lambda: d0.running == 1)
        refused = await client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        gate.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_pool_smaller_than_the_models_context_limits_requests_by_name_of_both_numbers(start_router, redis_url):
    async with (
        scripted(redis_url, "small", "p0", prefill=prefills),
        scripted(redis_url, "small", "d0", decode=saying("x"), total_tokens=512, free_tokens=512),
        start_router(namespace="small") as client,
    ):
        await until_ready(client, 2)
        answer = await client.post("/v1/completions", json=BODY | {"prompt": [5] * 500})
        assert answer.status_code == 400
        assert "512 tokens" in answer.json()["error"]["message"]
        assert "550" in answer.json()["error"]["message"]
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 512


def saying_its_choice() -> Callable[[StartRequest], AsyncIterator[StartEvent]]:
    """Choice i answers with its number i + 1 times, a token to a message, each waiting for the slowest."""
    began: set[int] = set()

    async def script(request: StartRequest) -> AsyncIterator[StartEvent]:
        choice = request.sampling.choice
        # The first brings the prompt; the others, which share it, start when it has said something.
        assert began or choice == 0
        began.add(choice)
        async for event in saying(str(choice) * (choice + 1), per_message=1)(request):
            yield event
            if isinstance(event, Tokens):
                await until(lambda: began == {0, 1, 2})

    return script


ALL_OPTIONS: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "stop_token_ids": [9, 10],
    "ignore_eos": True,
    "seed": 2**62 + 1,
}


async def test_every_sampling_option_reaches_both_workers_as_it_was_sent(start_router, redis_url):
    async with cluster(start_router, redis_url, "options", saying("ok")) as (client, p0, d0):
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", chat)):
            answer = await client.post(path, json=body | ALL_OPTIONS | {"logit_bias": {"5": -1.5, "319": 100}})
            assert answer.status_code == 200
            for worker in (p0, d0):
                sampling = worker.requests[-1].sampling
                assert sampling.logit_bias == ((5, -1.5), (319, 100.0))
                for name, value in ALL_OPTIONS.items():
                    assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value), name


async def test_top_k_of_minus_one_is_none_as_elsewhere(start_router, redis_url):
    async with cluster(start_router, redis_url, "no-top-k", saying("ok")) as (client, _, d0):
        assert (await client.post("/v1/completions", json=BODY | {"top_k": -1})).status_code == 200
        assert d0.requests[0].sampling.top_k == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_n_choices_share_prompt_and_seed_and_come_in_one_body(start_router, redis_url, path: str):
    async with cluster(start_router, redis_url, f"n{len(path)}", saying_its_choice()) as (client, _, d0):
        body = BODY | {"n": 3, "return_token_ids": True}
        if path == "/v1/chat/completions":
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": "hi"}]
        answer = (await client.post(path, json=body)).json()
        texts = [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
        assert texts == ["0", "11", "222"]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
        assert [len(choice["token_ids"]) for choice in answer["choices"]] == [2, 3, 4]
        usage = answer["usage"]
        prompt = len(d0.requests[0].prompt)
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, 9, prompt + 9)
        assert len({request.request_id for request in d0.requests}) == 3
        assert len({(request.prompt, request.sampling.seed) for request in d0.requests}) == 1
        assert sorted(request.sampling.choice for request in d0.requests) == [0, 1, 2]


async def test_n_choices_stream_side_by_side_and_each_ends_once(start_router, redis_url):
    async with cluster(start_router, redis_url, "n-stream", saying_its_choice()) as (client, _, d0):
        body = BODY | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage, done = sse((await client.post("/v1/completions", json=body)).text)
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
        said, ends = {0: "", 1: "", 2: ""}, []
        for chunk in chunks:
            (choice,) = chunk["choices"]
            said[choice["index"]] += choice["text"]
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert said == {0: "0", 1: "11", 2: "222"}
        assert sorted(ends) == [0, 1, 2]
        assert len({chunk["id"] for chunk in chunks}) == 1
        await until(lambda: d0.running == 0)


async def test_when_one_choice_fails_the_request_fails_and_the_others_are_dropped(start_router, redis_url):
    async def script(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await prefilled(request)
        if request.sampling.choice == 0:
            yield tokens(request, *byte_ids("a"))
        if request.sampling.choice == 1:
            yield Failed(code="numerical_error", message="not finite", retryable=False)
        await for_ever()

    async with cluster(start_router, redis_url, "n-fails", script) as (client, _, d0):
        answer = await client.post("/v1/completions", json=BODY | {"n": 3})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "numerical_error"
        await until(lambda: d0.running == 0)


async def test_a_client_that_leaves_ends_every_choice(start_router, redis_url):
    async def script(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await prefilled(request)
        yield tokens(request, *byte_ids("a"))
        await for_ever()

    async with cluster(start_router, redis_url, "n-leaves", script) as (client, _, d0):
        async with client.stream("POST", "/v1/completions", json=BODY | {"n": 8, "stream": True}) as answer:
            assert answer.status_code == 200
            await until(lambda: d0.running == 8)
        await until(lambda: d0.running == 0)
