"""A router without workers: every bad input gets its own clear refusal, and the next good request is served."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from router.config import RouterConfig
from router.process import listen, serve
from tests.router.conftest import MAX_CONTEXT, MODEL, VOCAB_SIZE, RouterStarter, byte_ids
from wire.errors import ConfigError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = {"model": MODEL, "prompt": "hi"}
GOOD_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


# One router for the whole table: each row also shows that the ones before it did no harm.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(start_router: RouterStarter) -> AsyncIterator[httpx.AsyncClient]:
    async with start_router(namespace="empty", max_body_bytes=64 << 10, body_silence_s=0.3) as client:
        yield client


def check_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The whole shape of a refusal; returns its message."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param
    assert error["message"].endswith((".", "'"))
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    return error["message"]


async def still_serves(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False})
    assert answer.json()["tokens"] == byte_ids("hi")


RAW_ROWS: dict[str, tuple[bytes, str]] = {
    "empty body": (b"", "invalid_json"),
    "truncated": (b'{"model":', "invalid_json"),
    "trailing comma": (b'{"model":"nano",}', "invalid_json"),
    "array": (b"[]", "invalid_type"),
    "string": (b'"hi"', "invalid_type"),
    "number": (b"5", "invalid_type"),
    "null": (b"null", "invalid_type"),
    "very deep": (b"[" * 50_000, "json_too_deep"),
    "deep but legal": (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "json_too_deep"),
    "NaN": (b'{"temperature": NaN}', "invalid_number"),
    "Infinity": (b'{"temperature": -Infinity}', "invalid_number"),
    "1e999": (b'{"temperature": 1e999}', "invalid_number"),
    "10,000 digits": (b'{"seed": ' + b"1" * 10_000 + b"}", "invalid_number"),
    "duplicate key": (b'{"max_tokens": 1, "max_tokens": 2}', "duplicate_key"),
    "not UTF-8": (b'{"model": "\xff"}', "invalid_encoding"),
    "lone surrogate": (b'{"model": "nano", "prompt": "\\ud800"}', "invalid_unicode"),
}


@pytest.mark.parametrize("name", RAW_ROWS)
async def test_a_body_that_is_not_a_json_object_is_refused(client: httpx.AsyncClient, name: str):
    body, code = RAW_ROWS[name]
    for path in (COMPLETIONS, CHAT):
        check_error(await client.post(path, content=body, headers=JSON), 400, code)
    await still_serves(client)


# (changed fields, code, param); None removes a field
ROWS: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "unknown field": (COMPLETIONS, {"prefill_worker": "p0"}, "unknown_parameter", "prefill_worker"),
    "internal field": (COMPLETIONS, {"kv_transfer_params": {}}, "unknown_parameter", "kv_transfer_params"),
    "template": (CHAT, {"chat_template": "x"}, "unknown_parameter", "chat_template"),
    "no model": (COMPLETIONS, {"model": None}, "invalid_request", "model"),
    "empty model": (COMPLETIONS, {"model": ""}, "invalid_request", "model"),
    "model a number": (COMPLETIONS, {"model": 5}, "invalid_request", "model"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "empty_prompt", "prompt"),
    "no ids": (COMPLETIONS, {"prompt": []}, "empty_prompt", "prompt"),
    "no ids, nested": (COMPLETIONS, {"prompt": [[]]}, "empty_prompt", "prompt"),
    "two prompts": (COMPLETIONS, {"prompt": ["a", "b"]}, "unsupported_parameter", "prompt"),
    "two id prompts": (COMPLETIONS, {"prompt": [[1], [2]]}, "unsupported_parameter", "prompt"),
    "prompt a number": (COMPLETIONS, {"prompt": 5}, "invalid_request", "prompt"),
    "prompt null": (COMPLETIONS, {"prompt": None}, "invalid_request", "prompt"),
    "id too large": (COMPLETIONS, {"prompt": [1, VOCAB_SIZE]}, "invalid_request", "prompt[1]"),
    "id huge": (COMPLETIONS, {"prompt": [2**70]}, "invalid_request", "prompt[0]"),
    "id negative": (COMPLETIONS, {"prompt": [-1]}, "invalid_request", "prompt[0]"),
    "id a float": (COMPLETIONS, {"prompt": [1, 2.0]}, "invalid_request", "prompt[1]"),
    "id a bool": (COMPLETIONS, {"prompt": [1, True]}, "invalid_request", "prompt[1]"),
    "id mixed with text": (COMPLETIONS, {"prompt": [1, "a"]}, "invalid_request", "prompt[1]"),
    "max_tokens 0": (COMPLETIONS, {"max_tokens": 0}, "invalid_request", "max_tokens"),
    "max_tokens -1": (COMPLETIONS, {"max_tokens": -1}, "invalid_request", "max_tokens"),
    "max_tokens 1.5": (COMPLETIONS, {"max_tokens": 1.5}, "invalid_request", "max_tokens"),
    "max_tokens text": (COMPLETIONS, {"max_tokens": "10"}, "invalid_request", "max_tokens"),
    "max_tokens bool": (COMPLETIONS, {"max_tokens": True}, "invalid_request", "max_tokens"),
    "max_tokens 2^63": (COMPLETIONS, {"max_tokens": 2**63}, "invalid_request", "max_tokens"),
    "n 0": (COMPLETIONS, {"n": 0}, "invalid_request", "n"),
    "n -1": (CHAT, {"n": -1}, "invalid_request", "n"),
    "n 9": (COMPLETIONS, {"n": 9}, "invalid_request", "n"),
    "n 129": (CHAT, {"n": 129}, "invalid_request", "n"),
    "n 2^31": (COMPLETIONS, {"n": 2**31}, "invalid_request", "n"),
    "n text": (CHAT, {"n": "2"}, "invalid_request", "n"),
    "n bool": (COMPLETIONS, {"n": True}, "invalid_request", "n"),
    "best_of": (COMPLETIONS, {"best_of": 10**6}, "unsupported_parameter", "best_of"),
    "echo": (COMPLETIONS, {"echo": True}, "unsupported_parameter", "echo"),
    "presence 2.1": (CHAT, {"presence_penalty": 2.1}, "invalid_request", "presence_penalty"),
    "presence -2.1": (COMPLETIONS, {"presence_penalty": -2.1}, "invalid_request", "presence_penalty"),
    "frequency 2.1": (COMPLETIONS, {"frequency_penalty": 2.1}, "invalid_request", "frequency_penalty"),
    "frequency -2.1": (CHAT, {"frequency_penalty": -2.1}, "invalid_request", "frequency_penalty"),
    "repetition 0": (COMPLETIONS, {"repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
    "repetition 2.1": (CHAT, {"repetition_penalty": 2.1}, "invalid_request", "repetition_penalty"),
    "top_k -2": (COMPLETIONS, {"top_k": -2}, "invalid_request", "top_k"),
    "top_k 1.5": (CHAT, {"top_k": 1.5}, "invalid_request", "top_k"),
    "top_k 2^31": (CHAT, {"top_k": 2**31}, "invalid_request", "top_k"),
    "min_p 2": (COMPLETIONS, {"min_p": 2}, "invalid_request", "min_p"),
    "min_p -0.1": (CHAT, {"min_p": -0.1}, "invalid_request", "min_p"),
    "bias of a word": (CHAT, {"logit_bias": {"the": 1}}, "invalid_request", "logit_bias"),
    "bias of a signed id": (CHAT, {"logit_bias": {"+5": 1}}, "invalid_request", "logit_bias"),
    "bias of one id twice": (COMPLETIONS, {"logit_bias": {"5": 1, "05": 2}}, "invalid_request", "logit_bias"),
    "bias outside the vocabulary": (
        COMPLETIONS,
        {"logit_bias": {str(VOCAB_SIZE): 1}},
        "invalid_request",
        "logit_bias",
    ),
    "bias negative id": (COMPLETIONS, {"logit_bias": {"-1": 1}}, "invalid_request", "logit_bias"),
    "bias 1000": (CHAT, {"logit_bias": {"5": 1000}}, "invalid_request", "logit_bias.5"),
    "bias text": (CHAT, {"logit_bias": {"5": "1"}}, "invalid_request", "logit_bias.5"),
    "bias a list": (CHAT, {"logit_bias": [5]}, "invalid_request", "logit_bias"),
    "2,000 biases": (
        COMPLETIONS,
        {"logit_bias": dict.fromkeys(map(str, range(2_000)), 1)},
        "invalid_request",
        "logit_bias",
    ),
    "min_tokens -1": (COMPLETIONS, {"min_tokens": -1}, "invalid_request", "min_tokens"),
    "min_tokens over max_tokens": (CHAT, {"min_tokens": 6, "max_tokens": 5}, "invalid_request", "min_tokens"),
    "stop id outside": (COMPLETIONS, {"stop_token_ids": [3, VOCAB_SIZE]}, "invalid_request", "stop_token_ids[1]"),
    "stop id negative": (CHAT, {"stop_token_ids": [-1]}, "invalid_request", "stop_token_ids[0]"),
    "stop ids a number": (COMPLETIONS, {"stop_token_ids": 3}, "invalid_request", "stop_token_ids"),
    "65 stop ids": (CHAT, {"stop_token_ids": [3] * 65}, "invalid_request", "stop_token_ids"),
    "temperature 2.1": (COMPLETIONS, {"temperature": 2.1}, "invalid_request", "temperature"),
    "temperature -0.1": (CHAT, {"temperature": -0.1}, "invalid_request", "temperature"),
    "temperature text": (COMPLETIONS, {"temperature": "hot"}, "invalid_request", "temperature"),
    "top_p 0": (COMPLETIONS, {"top_p": 0}, "invalid_request", "top_p"),
    "top_p 1.1": (CHAT, {"top_p": 1.1}, "invalid_request", "top_p"),
    "seed float": (COMPLETIONS, {"seed": 1.5}, "invalid_request", "seed"),
    "seed 2^65": (CHAT, {"seed": 2**65}, "invalid_request", "seed"),
    "10^4 stops": (COMPLETIONS, {"stop": ["a"] * 10**4}, "invalid_request", "stop"),
    "stop of 50 kB": (CHAT, {"stop": "x" * 50_000}, "invalid_request", "stop"),
    "5 stops": (COMPLETIONS, {"stop": list("abcde")}, "invalid_request", "stop"),
    "empty stop": (CHAT, {"stop": [""]}, "invalid_request", "stop"),
    "long stop": (COMPLETIONS, {"stop": "x" * 257}, "invalid_request", "stop"),
    "stop a number": (COMPLETIONS, {"stop": [5]}, "invalid_request", "stop"),
    "empty salt": (COMPLETIONS, {"cache_salt": ""}, "invalid_request", "cache_salt"),
    "long salt": (CHAT, {"cache_salt": "x" * 257}, "invalid_request", "cache_salt"),
    "salt of 20 kB": (COMPLETIONS, {"cache_salt": "é" * 10_000}, "invalid_request", "cache_salt"),
    "salt a number": (COMPLETIONS, {"cache_salt": 5}, "invalid_request", "cache_salt"),
    "salt a list": (CHAT, {"cache_salt": ["x"]}, "invalid_request", "cache_salt"),
    "salt of 129 two-byte characters": (CHAT, {"cache_salt": "é" * 129}, "invalid_request", "cache_salt"),
    "logprobs 21": (COMPLETIONS, {"logprobs": 21}, "invalid_request", "logprobs"),
    "logprobs bool": (COMPLETIONS, {"logprobs": True}, "invalid_request", "logprobs"),
    "chat logprobs a number": (CHAT, {"logprobs": 5}, "invalid_request", "logprobs"),
    "logprobs 100": (COMPLETIONS, {"logprobs": 100}, "invalid_request", "logprobs"),
    "logprobs -1": (COMPLETIONS, {"logprobs": -1}, "invalid_request", "logprobs"),
    "top_logprobs 21": (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs"),
    "top_logprobs alone": (CHAT, {"top_logprobs": 5}, "invalid_request", "top_logprobs"),
    "stream text": (COMPLETIONS, {"stream": "yes"}, "invalid_request", "stream"),
    "options without stream": (COMPLETIONS, {"stream_options": {}}, "invalid_request", "stream_options"),
    "options bool": (
        COMPLETIONS,
        {"stream": True, "stream_options": {"include_usage": 1}},
        "invalid_request",
        "stream_options.include_usage",
    ),
    "context by one": (
        COMPLETIONS,
        {"prompt": [5] * (MAX_CONTEXT - 9), "max_tokens": 10},
        "context_length_exceeded",
        "prompt",
    ),
    "context": (COMPLETIONS, {"prompt": "a" * 5000}, "context_length_exceeded", "prompt"),
    "chat context": (CHAT, {"max_tokens": MAX_CONTEXT}, "context_length_exceeded", "prompt"),
    "no messages": (CHAT, {"messages": []}, "invalid_request", "messages"),
    "messages null": (CHAT, {"messages": None}, "invalid_request", "messages"),
    "message text": (CHAT, {"messages": ["hi"]}, "invalid_request", "messages[0]"),
    "role": (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "invalid_request", "messages[0].role"),
    "no role": (CHAT, {"messages": [{"content": "x"}]}, "invalid_request", "messages[0].role"),
    "role a list": (CHAT, {"messages": [{"role": [], "content": "x"}]}, "invalid_request", "messages[0].role"),
    "content null": (CHAT, {"messages": [{"role": "user", "content": None}]}, "invalid_request", "messages[0].content"),
    "content 5": (CHAT, {"messages": [{"role": "user", "content": 5}]}, "invalid_request", "messages[0].content"),
    "image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        "invalid_request",
        "messages[0].content[0]",
    ),
    "tools": (CHAT, {"tools": [{"type": "teapot"}]}, "invalid_request", None),
    "thinking": (CHAT, {"thinking": {"type": "sometimes"}}, "invalid_request", None),
}


@pytest.mark.parametrize("name", ROWS)
async def test_a_body_with_a_bad_field_is_refused_by_the_fields_name(client: httpx.AsyncClient, name: str):
    path, change, code, param = ROWS[name]
    good = GOOD if path == COMPLETIONS else GOOD_CHAT
    check_error(await client.post(path, json=good | change), 400, code, param)
    await still_serves(client)


@pytest.mark.parametrize("name", ["model", "prompt"])
async def test_a_missing_field_is_named(client: httpx.AsyncClient, name: str):
    body = {key: value for key, value in GOOD.items() if key != name}
    check_error(await client.post(COMPLETIONS, json=body), 400, "missing_parameter", name)


async def test_context_refusals_carry_both_numbers(client: httpx.AsyncClient):
    answer = await client.post(COMPLETIONS, json=GOOD | {"prompt": [5] * 4000, "max_tokens": 200})
    message = check_error(answer, 400, "context_length_exceeded", "prompt")
    assert "4096" in message
    assert "4200" in message


async def test_an_unknown_model_is_404_on_every_route(client: httpx.AsyncClient):
    for path, good in ((COMPLETIONS, GOOD), (CHAT, GOOD_CHAT)):
        check_error(await client.post(path, json=good | {"model": "../../etc/passwd"}), 404, "model_not_found")
    check_error(await client.get("/v1/models/nope"), 404, "model_not_found")
    check_error(await client.post("/tokenize", json={"model": "x", "prompt": "a"}), 404, "model_not_found")


async def test_without_workers_a_good_request_is_503_with_retry_after(client: httpx.AsyncClient):
    accepted = {"n": 1, "user": "u", "temperature": 1, "max_tokens": None, "frequency_penalty": 0, "logit_bias": {}}
    for path, good in ((COMPLETIONS, GOOD), (CHAT, GOOD_CHAT)):
        for stream in (False, True):
            answer = await client.post(path, json=good | accepted | {"stream": stream})
            message = check_error(answer, 503, "no_workers")
            assert "No prefill worker" in message
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["retry-after-ms"] == "1000"


async def test_exactly_the_whole_context_is_accepted(client: httpx.AsyncClient):
    body = GOOD | {"prompt": [5] * (MAX_CONTEXT - 10), "max_tokens": 10}
    check_error(await client.post(COMPLETIONS, json=body), 503, "no_workers")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_other_content_types_are_415(client: httpx.AsyncClient, headers: dict[str, str]):
    check_error(await client.post(COMPLETIONS, content=b"{}", headers=headers), 415, "unsupported_media_type")
    await still_serves(client)


async def test_a_body_over_the_limit_is_413_with_and_without_its_length(client: httpx.AsyncClient):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (8 << 10)

    check_error(await client.post(COMPLETIONS, content=b" " * 200_000, headers=JSON), 413, "body_too_large")
    check_error(await client.post(COMPLETIONS, content=pieces(), headers=JSON), 413, "body_too_large")
    await still_serves(client)


async def test_a_body_that_stops_arriving_is_408(client: httpx.AsyncClient):
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    )
    status = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    await writer.wait_closed()
    assert status.startswith(b"HTTP/1.1 408 ")
    await still_serves(client)


async def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(client: httpx.AsyncClient):
    _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await still_serves(client)


async def test_unknown_paths_and_verbs_are_refused_in_the_same_shape(client: httpx.AsyncClient):
    check_error(await client.get("/v1/nothing"), 404, "not_found")
    check_error(await client.get("/docs"), 404, "not_found")
    check_error(await client.get("/openapi.json"), 404, "not_found")
    answer = await client.get(COMPLETIONS)
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_a_valid_request_id_comes_back_and_any_other_is_replaced(client: httpx.AsyncClient):
    answer = await client.get("/health", headers={"x-request-id": "Abc-1_2"})
    assert answer.headers["x-request-id"] == "Abc-1_2"
    for bad in (b"a b", b"x" * 65, b"", b"\xc3\xa9"):
        answer = await client.get("/health", headers={b"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32


async def test_health_says_the_process_lives_and_readiness_that_nobody_can_be_served(client: httpx.AsyncClient):
    for path in ("/health", "/healthz", "/liveness", "/livez", "/live"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    for path in ("/readiness", "/readyz"):
        answer = await client.get(path)
        assert answer.status_code == 503
        assert answer.json()["prefill"] == answer.json()["decode"] == 0


async def test_models_workers_version_and_metrics_are_shown(client: httpx.AsyncClient):
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", MAX_CONTEXT)
    assert (await client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    assert (await client.get("/workers")).json()["workers"] == []
    assert set((await client.get("/version")).json()) == {"version"}


async def test_a_refused_request_is_counted_by_route_status_and_code(start_router: RouterStarter):
    async with start_router(namespace="empty") as client:
        await client.post(COMPLETIONS, json=GOOD)
        await client.get("/no/such/path")
        metrics = (await client.get("/metrics")).text
    assert 'penumbra_http_requests_total{route="/v1/completions",status="503"} 1.0' in metrics
    assert 'penumbra_http_requests_total{route="other",status="404"} 1.0' in metrics
    assert 'penumbra_request_errors_total{error_code="no_workers"} 1.0' in metrics
    assert 'penumbra_workers{role="decode"} 0.0' in metrics
    assert "penumbra_num_requests_running 0.0" in metrics
    assert 'penumbra_time_to_first_token_seconds_bucket{le="600.0"}' in metrics


async def test_text_and_conversations_are_tokenized_and_ids_come_back_as_text(client: httpx.AsyncClient):
    answer = (await client.post("/tokenize", json={"prompt": "hé"})).json()
    assert answer == {"count": 4, "max_model_len": MAX_CONTEXT, "tokens": [0, *byte_ids("hé")]}
    answer = (await client.post("/tokenize", json={"messages": GOOD_CHAT["messages"]})).json()
    text = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert text == {"prompt": "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"}
    skipped = await client.post("/detokenize", json={"tokens": [0, *byte_ids("hi")], "skip_special_tokens": True})
    assert skipped.json() == {"prompt": "hi"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    check_error(await client.post("/detokenize", json={"tokens": [9999]}), 400, "invalid_request", "tokens[0]")
    check_error(await client.post("/tokenize", json={}), 400, "invalid_request")


async def test_a_long_prompt_does_not_hold_up_the_event_loop(start_router: RouterStarter):
    """Short requests are answered while a body of many megabytes is parsed and tokenized."""
    body = json.dumps(GOOD | {"prompt": "all work and no play " * 200_000}).encode()
    async with start_router(namespace="empty") as client:
        long = asyncio.create_task(client.post(COMPLETIONS, content=body, headers=JSON))
        short = 0
        while not long.done():
            await still_serves(client)
            short += 1
        check_error(await long, 400, "context_length_exceeded", "prompt")
        assert short >= 2


async def test_the_router_serves_while_its_registry_is_unreachable(start_router: RouterStarter):
    async with start_router(redis_url="redis://127.0.0.1:1/0") as client:
        await still_serves(client)
        check_error(await client.post(COMPLETIONS, json=GOOD), 503, "no_workers")
        assert (await client.get("/readiness")).json()["registry_stale_s"] >= 0


async def test_a_taken_port_and_a_bad_redis_url_are_refused_at_start(model_dir: Any, redis_url: str):
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}"):
            await serve(RouterConfig(model=model_dir, redis_url=redis_url, port=port))
    with pytest.raises(ConfigError, match="redis URL"):
        await serve(RouterConfig(model=model_dir, redis_url="teapot://x", port=0))
    with pytest.raises(ConfigError, match=r"config\.json can not be read"):
        await serve(RouterConfig(model=model_dir / "nothing", redis_url=redis_url, port=0))


async def test_answers_are_sent_without_waiting_for_acknowledgements(model_dir: Any, redis_url: str):
    """asyncio sets TCP_NODELAY on connections accepted from a socket whose protocol is spelled out, and no other."""
    with listen("127.0.0.1", 0) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            _, writer = await asyncio.open_connection(sock=accepted)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            writer.close()
            await writer.wait_closed()
