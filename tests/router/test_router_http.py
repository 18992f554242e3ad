"""A router without workers: every bad input gets its own clear refusal, and the next good request is served."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from router.config import RouterConfig
from router.process import serve
from tests.router.conftest import MAX_CONTEXT, MODEL, RouterStarter, byte_ids
from wire.door import adopt, listen
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


@pytest.mark.parametrize("name", ["model", "prompt"])
async def test_a_missing_field_is_named(client: httpx.AsyncClient, name: str):
    body = {key: value for key, value in GOOD.items() if key != name}
    check_error(await client.post(COMPLETIONS, json=body), 400, "missing_parameter", name)


async def test_without_workers_a_good_request_is_503_with_retry_after(client: httpx.AsyncClient):
    accepted = {"n": 1, "user": "u", "temperature": 1, "max_tokens": None, "frequency_penalty": 0, "logit_bias": {}}
    for path, good in ((COMPLETIONS, GOOD), (CHAT, GOOD_CHAT)):
        for stream in (False, True):
            answer = await client.post(path, json=good | accepted | {"stream": stream})
            message = check_error(answer, 503, "no_workers")
            assert "No prefill worker" in message
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["retry-after-ms"] == "1000"


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


async def test_a_router_serves_on_the_socket_it_is_given_and_on_nothing_else():
    with listen("127.0.0.1", 0) as listener, adopt(os.dup(listener.fileno())) as adopted:
        assert adopted.getsockname() == listener.getsockname()
        with socket.create_connection(listener.getsockname()), adopted.accept()[0]:
            pass
    with socket.socket() as deaf, pytest.raises(ConfigError, match="is no listening socket"):
        adopt(deaf.fileno())
    with pytest.raises(ConfigError, match="File descriptor 9999 is no listening socket"):
        adopt(9999)


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
