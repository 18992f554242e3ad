"""What a client hears while it waits for its first token, and what becomes of errors once it has heard something."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import anthropic
import httpx
import openai
import pytest

from router.timeline import PARTS
from tests.router.conftest import MODEL, byte_ids
from tests.router.scripted_worker import SECRET, for_ever
from tests.router.test_router_stream import BODY, cluster, finished, saying, sse, tokens, until
from wire.types import (
    Admitted,
    Failed,
    FinishReason,
    Progress,
    RunEvent,
    RunFinished,
    RunRequest,
    StartEvent,
    StartRequest,
)

KEEPALIVE = ": keep-alive"
SHORT = {"sse_keepalive_s": 0.05, "json_keepalive_s": 0.05}


class Gate:
    """A decode worker that admits, and answers `event` once the test has opened the gate."""

    def __init__(self, text: str = "done", failure: Failed | None = None) -> None:
        self._open = asyncio.Event()
        self._text, self._failure = text, failure
        self.open = self._open.set

    async def script(self, request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await self._open.wait()
        if self._failure is not None:
            yield self._failure
            return
        ids = byte_ids(self._text)
        yield tokens(request, *ids)
        yield finished(request, len(ids), FinishReason.STOP)


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """Each event or comment of a stream, as it comes."""
    rest = ""
    async for text in response.aiter_text():
        *whole, rest = (rest + text).split("\n\n")
        for event in whole:
            yield event


async def test_a_stream_that_waits_says_so_and_then_answers_as_ever(start_router, redis_url):
    gate = Gate()
    async with (
        cluster(start_router, redis_url, "waits", gate.script, **SHORT) as (client, _, _),
        client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        stream = events(response)
        assert [await anext(stream) for _ in range(3)] == [KEEPALIVE] * 3
        gate.open()
        rest = [event async for event in stream if event != KEEPALIVE]
    *chunks, done = sse("\n\n".join(rest))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "done"
    assert done == "[DONE]"


async def test_once_a_stream_is_kept_alive_an_error_is_its_last_event(start_router, redis_url):
    gate = Gate(failure=Failed(code="overloaded", message="no room after all", retryable=False))
    async with (
        cluster(start_router, redis_url, "waits-error", gate.script, **SHORT) as (client, _, _),
        client.stream("POST", "/v1/chat/completions", json=chat()) as response,
    ):
        stream = events(response)
        assert await anext(stream) == KEEPALIVE
        gate.open()
        rest = [event async for event in stream if event != KEEPALIVE]
    (error,) = sse("\n\n".join(rest))
    assert error["error"] | {"code": "overloaded", "message": "no room after all"} == error["error"]


@pytest.mark.parametrize("stream", [False, True])
async def test_before_anything_was_heard_an_error_has_a_status(start_router, redis_url, stream: bool):
    gate = Gate(failure=Failed(code="overloaded", message="no room after all", retryable=False))
    gate.open()
    name = f"status-{stream}".lower()
    async with cluster(start_router, redis_url, name, gate.script, sse_keepalive_s=60.0) as (client, _, _):
        answer = await client.post("/v1/completions", json=BODY | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


async def test_keepalives_can_be_turned_off(start_router, redis_url):
    gate = Gate()
    config = {"sse_keepalive_s": 0.0, "json_keepalive_s": 0.0}
    async with cluster(start_router, redis_url, "off", gate.script, **config) as (client, _, d0):
        calls = [
            asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": stream}))
            for stream in (False, True)
        ]
        await until(lambda: d0.running == 2)
        gate.open()
        whole, streamed = [await call for call in calls]
    assert whole.text.startswith("{")
    assert streamed.text.startswith("data: ")
    assert KEEPALIVE not in streamed.text


async def test_an_answer_that_is_not_streamed_says_that_it_is_on_its_way(start_router, redis_url):
    gate = Gate()
    async with (
        cluster(start_router, redis_url, "whole-waits", gate.script, **SHORT) as (client, _, _),
        client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        pieces = response.aiter_text()
        text = await anext(pieces) + await anext(pieces)
        assert set(text) == {"\n"}
        gate.open()
        text += "".join([piece async for piece in pieces])
    assert json.loads(text)["choices"][0]["text"] == "done"


async def test_an_error_behind_blank_lines_is_told_and_no_client_takes_it_for_an_answer(start_router, redis_url):
    gate = Gate(failure=Failed(code="overloaded", message="no room after all", retryable=False))
    async with cluster(start_router, redis_url, "whole-error", gate.script, **SHORT) as (client, _, _):
        text = ""

        async def read() -> None:
            nonlocal text
            async with client.stream("POST", "/v1/completions", json=BODY) as response:
                async for piece in response.aiter_text():
                    text += piece
                    gate.open()

        with pytest.raises(httpx.RemoteProtocolError):
            await read()
        assert text.startswith("\n")
        assert json.loads(text)["error"]["code"] == "overloaded"
        # The next request finds the router well.
        assert (await client.get("/health")).status_code == 200


async def test_a_client_that_leaves_while_it_is_kept_waiting_ends_the_work(start_router, redis_url):
    async def waiting(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await for_ever()

    async with cluster(start_router, redis_url, "waits-leaves", waiting, **SHORT) as (client, p0, d0):
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            assert await anext(events(response)) == KEEPALIVE
        await until(lambda: p0.running == d0.running == 0)


async def test_the_openai_package_reads_over_keepalives(start_router, redis_url):
    gate = Gate("hi")
    async with (
        cluster(start_router, redis_url, "waits-openai", gate.script, **SHORT) as (client, _, _),
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as api,
    ):
        # Its stream is there as soon as the router has opened it, which is long before the first token.
        stream = await api.chat.completions.create(**chat())
        gate.open()
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == "hi"


async def test_anthropics_streams_are_kept_alive_by_pings_which_its_package_reads_over(start_router, redis_url):
    gate = Gate("hi")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "yo"}], "max_tokens": 9}
    async with cluster(start_router, redis_url, "waits-ping", gate.script, **SHORT) as (client, _, _):
        async with client.stream("POST", "/v1/messages", json=body | {"stream": True}) as response:
            stream = events(response)
            assert [await anext(stream) for _ in range(2)] == ['event: ping\ndata: {"type":"ping"}'] * 2
        async with (
            anthropic.AsyncAnthropic(base_url=str(client.base_url), api_key="none", max_retries=0) as api,
            api.messages.stream(**body) as message,
        ):
            gate.open()
            assert "".join([text async for text in message.text_stream]) == "hi"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_shows_its_prompts_progress_up_to_the_end(start_router, redis_url, path: str):
    seen = [asyncio.Event() for _ in range(3)]
    total = 0

    async def steps(request: RunRequest) -> AsyncIterator[RunEvent]:
        nonlocal total
        total = len(request.prompt)
        for done, shown in enumerate(seen):
            yield Progress(done=done, total=total, cached=1)
            await shown.wait()
        yield RunFinished(prompt_tokens=total, cached_tokens=1)

    async def answers(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=SECRET)
        await seen[-1].wait()
        yield tokens(request, *byte_ids("ok"))
        yield finished(request, 2)

    body = (BODY if path == "/v1/completions" else chat()) | {"stream": True, "return_progress": True}
    name = f"progress-{len(path)}"
    async with (
        cluster(start_router, redis_url, name, answers, steps) as (client, _, _),
        client.stream("POST", path, json=body) as response,
    ):
        stream, chunks = events(response), []
        for shown in seen:
            chunks.append(json.loads((await anext(stream)).removeprefix("data: ")))
            shown.set()
        chunks += [event async for event in stream]
    progress = [chunk["prompt_progress"] for chunk in chunks[:3]]
    assert [(p["total"], p["cache"], p["processed"]) for p in progress] == [(total, 1, done) for done in range(3)]
    # One token computed tells how long the rest takes; none, or cached ones, do not.
    assert [p["eta_ms"] is None for p in progress] == [True, True, False]
    assert all(chunk["choices"] == [] and chunk["model"] == MODEL for chunk in chunks[:3])
    last = json.loads(chunks[3].removeprefix("data: "))["prompt_progress"]
    assert (last["processed"], last["eta_ms"]) == (total, 0.0)
    assert "prompt_progress" not in "".join(chunks[4:])
    assert chunks[-1] == "data: [DONE]"


async def test_progress_is_for_those_who_ask(start_router, redis_url):
    async with cluster(start_router, redis_url, "no-progress", saying("ok")) as (client, _, _):
        for body in (BODY | {"stream": True}, BODY | {"return_progress": True}):
            assert "prompt_progress" not in (await client.post("/v1/completions", json=body)).text


BODIES = {
    "/v1/completions": BODY,
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "yo"}]},
    "/v1/messages": {"model": MODEL, "messages": [{"role": "user", "content": "yo"}], "max_tokens": 9},
    "/v1/responses": {"model": MODEL, "input": "yo"},
}


@pytest.mark.parametrize("path", BODIES)
async def test_every_protocol_says_where_the_time_went_when_asked(start_router, redis_url, path: str):
    name = f"timeline{path.replace('/', '-')}"
    async with cluster(start_router, redis_url, name, saying("hello")) as (client, _, _):
        whole = (await client.post(path, json=BODIES[path] | {"return_timeline": True})).json()
        streamed = (await client.post(path, json=BODIES[path] | {"return_timeline": True, "stream": True})).text
    data = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    told = [chunk for chunk in map(json.loads, data) if "timeline" in json.dumps(chunk)]
    assert len(told) == 1
    for body in (whole, told[0]):
        timeline = (body.get("usage") or body["response"]["usage"])["timeline"]
        assert timeline["ttft_ms"] > 0
        assert abs(sum(timeline[f"{part}_ms"] for part in PARTS) - timeline["ttft_ms"]) < 0.01


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_says_where_the_time_went_when_asked(start_router, redis_url, stream: bool):
    async with cluster(start_router, redis_url, f"timeline-{stream}".lower(), saying("hello")) as (client, _, _):
        answer = await client.post("/v1/completions", json=BODY | {"stream": stream, "return_timeline": True})
        timeline = (sse(answer.text)[-2] if stream else answer.json())["usage"]["timeline"]
        assert abs(sum(timeline[f"{part}_ms"] for part in PARTS) - timeline["ttft_ms"]) < 0.01
        assert min(timeline[f"{part}_ms"] for part in ("receive", "tokenize", "route", "admit", "prefill")) > 0

        plain = await client.post("/v1/completions", json=BODY)
        assert "timeline" not in plain.json()["usage"]
        metrics = (await client.get("/metrics")).text
        assert 'penumbra_stage_duration_seconds_count{stage="prefill"} 2.0' in metrics
        assert 'penumbra_stage_duration_seconds_bucket{le="600.0",stage="first_decode"} 2.0' in metrics


def chat() -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "yo"}], "stream": True}
