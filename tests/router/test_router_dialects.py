"""What each family of clients is told when things go wrong, before and after a stream began, and what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from router.dialects import ANTHROPIC, OPENAI, RESPONSES, MethodNotAllowed, NotFound, dialect_of
from tests.router.conftest import MODEL, byte_ids
from tests.router.test_router_stream import SECRET, cluster, prefilled, prefills, saying, sse, tokens, until
from wire.errors import BodyTooLarge, DeadlineExceeded, InvalidRequest, NoWorkers, Overloaded, PenumbraError
from wire.types import Admitted, Failed, Finished, Progress, RunEvent, RunRequest, StartEvent, StartRequest

CALL: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi" * 150}],
    "max_tokens": 50,
    "thinking": {"type": "disabled"},
}
MESSAGES = CALL | {"seed": 1}
COUNT = {key: MESSAGES[key] for key in ("model", "messages", "thinking")}
RESPONSE: dict[str, Any] = {
    "model": MODEL,
    "seed": 1,
    "input": "hi" * 150,
    "max_output_tokens": 50,
    "reasoning": {"effort": "none"},
}


async def breaks(request: StartRequest) -> AsyncIterator[StartEvent]:
    yield Admitted(resident_prefix=0, secret=SECRET)
    await prefilled(request)
    yield tokens(request, *byte_ids("half"))
    yield Failed(code="numerical_error", message="The logits are not numbers.", retryable=False)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("No.", param="x"), 400, "invalid_request_error"),
        (NotFound("No."), 404, "not_found_error"),
        (MethodNotAllowed("No."), 405, "invalid_request_error"),
        (BodyTooLarge("No."), 413, "request_too_large"),
        (PenumbraError("No."), 500, "api_error"),
        (NoWorkers("No."), 503, "api_error"),
        (DeadlineExceeded("No."), 504, "timeout_error"),
        (Overloaded("No."), 529, "overloaded_error"),
    ],
)
def test_anthropics_clients_get_their_own_statuses_and_types(error: PenumbraError, status: int, kind: str) -> None:
    assert ANTHROPIC.refusal(error).status_code == status
    assert ANTHROPIC.error_body(error) == {"type": "error", "error": {"type": kind, "message": "No."}}
    assert ("retry-after" in ANTHROPIC.refusal(error).headers) == (status in (503, 529))


def test_the_path_decides_the_dialect_also_where_there_is_nothing() -> None:
    assert dialect_of("/v1/messages") is dialect_of("/v1/messages/count_tokens") is ANTHROPIC
    assert dialect_of("/v1/messages/nothing") is ANTHROPIC
    assert dialect_of("/v1/responses") is RESPONSES
    assert dialect_of("/v1/messagesx") is dialect_of("/v1/chat/completions") is OPENAI


async def test_after_messages_began_a_failure_is_one_event_named_error(start_router, redis_url):
    async with (
        cluster(start_router, redis_url, "messages-error", breaks) as (client, p0, d0),
        anthropic.AsyncAnthropic(base_url=str(client.base_url), api_key="none", max_retries=0) as claude,
    ):
        answer = await client.post("/v1/messages", json=MESSAGES | {"stream": True})
        assert answer.status_code == 200
        *_, last, rest = answer.text.split("\n\n")
        assert rest == ""
        assert last.startswith("event: error\ndata: ")
        assert answer.text.count("event: error") == 1
        assert "message_stop" not in answer.text
        async with claude.messages.stream(**CALL) as stream:
            with pytest.raises(anthropic.APIError, match="not numbers"):
                await stream.until_done()
        await until(lambda: p0.running == d0.running == 0)
        whole = await client.post("/v1/messages", json=MESSAGES)
        assert whole.status_code == 500
        assert whole.json() == {
            "type": "error",
            "error": {"type": "api_error", "message": "The logits are not numbers."},
        }


async def test_after_a_response_began_a_failure_is_one_numbered_error_event(start_router, redis_url):
    async with (
        cluster(start_router, redis_url, "responses-error", breaks) as (client, _, _),
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as api,
    ):
        answer = await client.post("/v1/responses", json=RESPONSE | {"stream": True})
        events = [block.partition("\ndata: ") for block in answer.text.split("\n\n") if block]
        assert [name for name, _, _ in events][-1] == "event: error"
        assert "response.completed" not in answer.text
        chunks = sse("\n\n".join(f"data: {data}" for _, _, data in events))
        assert [chunk["sequence_number"] for chunk in chunks] == list(range(len(chunks)))
        assert chunks[-1] | {"type": "error", "code": "numerical_error", "param": None} == chunks[-1]
        stream = await api.responses.create(model=MODEL, input="hi", stream=True, reasoning={"effort": "none"})
        with pytest.raises(openai.APIError, match="not numbers"):
            async for _ in stream:
                pass


async def test_what_came_from_the_cache_is_told_as_each_protocol_tells_it(start_router, redis_url):
    async def resident(request: StartRequest) -> AsyncIterator[StartEvent]:
        async for event in saying("ok")(request):
            match event:
                case Admitted():
                    yield replace(event, resident_prefix=256)
                case Finished():
                    yield replace(event, cached_tokens=256)
                case _:
                    yield event

    async def prefills_the_rest(request: RunRequest) -> AsyncIterator[RunEvent]:
        async for event in prefills(request):
            yield replace(event, cached=256) if isinstance(event, Progress) else event

    async with cluster(start_router, redis_url, "cached", resident, prefills_the_rest) as (client, _, _):
        usage = (await client.post("/v1/messages", json=MESSAGES)).json()["usage"]
        total = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert usage["cache_read_input_tokens"] == 256
        counted = (await client.post("/v1/messages/count_tokens", json=COUNT)).json()
        assert counted == {"input_tokens": total}
        assert usage["output_tokens"] == 3

        usage = (await client.post("/v1/responses", json=RESPONSE)).json()["usage"]
        assert usage["input_tokens"] == total
        assert usage["input_tokens_details"] == {"cached_tokens": 256}
        assert (usage["output_tokens"], usage["total_tokens"]) == (3, total + 3)

        streamed = await client.post("/v1/messages", json=MESSAGES | {"stream": True})
        closing = next(block for block in streamed.text.split("\n\n") if block.startswith("event: message_delta"))
        assert f'"input_tokens":{total - 256}' in closing
        assert '"cache_read_input_tokens":256' in closing


async def test_a_request_is_named_by_the_first_header_that_names_it_well(start_router):
    async with start_router(namespace="names") as client:
        for headers, expected in (
            ({"x-correlation-id": "c-1"}, "c-1"),
            ({"request-id": "r_1", "x-trace-id": "t_1"}, "t_1"),
            ({"x-request-id": "not good", "x-trace-id": "t_2"}, "t_2"),
        ):
            assert (await client.get("/health", headers=headers)).headers["x-request-id"] == expected
        answer = await client.post("/v1/messages", json={}, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == answer.headers["request-id"] == "mine"
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_every_name_the_model_has_is_served_and_echoed(start_router, redis_url):
    names = ("deepseek-v4-flash", "claude-x", "org/v4")
    async with cluster(start_router, redis_url, "aliases", saying("ok"), served_model_names=names) as (client, _, _):
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == list(names)
        for name in names:
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            for path, body in (("/v1/messages", MESSAGES), ("/v1/responses", RESPONSE)):
                assert (await client.post(path, json=body | {"model": name})).json()["model"] == name
        assert (await client.post("/v1/messages", json=MESSAGES)).status_code == 404
