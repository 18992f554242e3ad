"""The names of streams, and what an Idempotency-Key stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.redis import EmbeddedRedis
from router.replicas import Replicas
from router.streams import Context, Idempotency, Signer, StreamId, resume_s
from router.tenants import ANYONE, Tenant
from tests.router.conftest import MODEL
from tests.router.test_router_http import check_error
from tests.router.test_router_stream import BODY, cluster, saying
from wire.errors import ConfigError, IdempotencyMismatch, InvalidRequest, StreamGone

STREAM = StreamId(request_id="r" * 32, worker_id="decode-0", epoch=(1 << 64) - 1, attempt=2, index=17)


def test_a_stream_id_says_where_the_answer_is_to_every_router_with_the_key(tmp_path: Path):
    (tmp_path / "key").write_bytes(b"k" * 32)
    one, other = Signer(tmp_path / "key"), Signer(tmp_path / "key")
    signed = one.sign(STREAM, "acme")
    assert other.read(signed, "acme") == STREAM
    assert len(signed) < 160
    assert signed.replace(".", "").replace("-", "").replace("_", "").isalnum()


def test_nobody_else_makes_one_and_no_tenant_reads_anothers(tmp_path: Path):
    signer = Signer(None)
    signed = signer.sign(STREAM, "acme")
    text, _, mac = signed.partition(".")
    forged = [Signer(None).sign(STREAM, "acme"), text, f"{text}.", f"{text}.{mac[:-1]}", f"A{text[1:]}.{mac}"]
    for wrong in (*forged, "", ".", "x" * 5_000, "é.é", signed + "=", f"{text}..{mac}"):
        with pytest.raises(StreamGone):
            signer.read(wrong, "acme")
    with pytest.raises(StreamGone):
        signer.read(signed, "other")
    (tmp_path / "short").write_bytes(b"k" * 31)
    for path in (tmp_path / "short", tmp_path / "none"):
        with pytest.raises(ConfigError, match="stream key file"):
            Signer(path)


def test_what_a_request_was_survives_whatever_its_body_holds():
    context = Context(path="/v1/completions", tenant="a", request_id="r", created=5, raw=b'{"a":"\n\xff"}\n\n')
    assert Context.unpack(context.pack()) == context


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "601", "60s", "", "\u0666", "9" * 50])
def test_a_resume_that_is_no_number_of_seconds_is_refused(asked: str):
    with pytest.raises(InvalidRequest, match="x-penumbra-resume"):
        resume_s(asked, "key")


def test_a_request_outlives_its_client_only_with_a_key():
    assert resume_s("60", "key") == 60
    assert resume_s(None, "key") == resume_s(None, None) == 0
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        resume_s("60", None)
    for bad in ("", "k" * 257, "a\tb", "é"):
        with pytest.raises(InvalidRequest, match="1 to 256 printable"):
            resume_s(None, bad)


async def check_keys(here: Idempotency, there: Idempotency) -> None:
    path, acme = "/v1/completions", Tenant(tenant_id="acme")
    assert await here.claim(ANYONE, "k", path, b"body") == ""
    assert await there.claim(ANYONE, "k", path, b"body") == ""
    for other in ((path, b"another body"), ("/v1/chat/completions", b"body")):
        with pytest.raises(IdempotencyMismatch):
            await there.claim(ANYONE, "k", *other)
    # One tenant's key says nothing to another's.
    assert await there.claim(acme, "k", path, b"another body") == ""
    await here.answered_in(ANYONE, "k", path, b"body", "stream-1")
    assert await there.claim(ANYONE, "k", path, b"body") == "stream-1"


async def test_a_key_stands_for_one_request_on_every_router(redis_url: str):
    replicas = [Replicas(redis_url, "idempotency") for _ in range(2)]
    await check_keys(*(Idempotency(each) for each in replicas))
    stored = [await replicas[0].redis.get(name) async for name in replicas[0].redis.scan_iter("idempotency:*")]
    assert stored
    assert all(b"body" not in value for value in stored)  # digests alone
    for each in replicas:
        await each.aclose()


async def test_without_redis_a_router_remembers_by_itself():
    with EmbeddedRedis() as server:
        replicas = Replicas(server.url, "alone")
    alone = Idempotency(replicas)
    await check_keys(alone, alone)
    await replicas.aclose()


async def test_the_same_key_with_another_request_is_refused_and_with_the_same_is_answered_again(
    start_router, redis_url
):
    async with cluster(start_router, redis_url, "same-key", saying("ok")) as (client, _, _):
        headers = {"idempotency-key": "k-1"}
        for _ in range(2):
            answer = await client.post("/v1/completions", json=BODY, headers=headers)
            assert answer.json()["choices"][0]["text"] == "ok"
        refused = await client.post("/v1/completions", json=BODY | {"seed": 8}, headers=headers)
        check_error(refused, 409, "idempotency_mismatch")
        check_error(await client.get("/v1/streams/nothing"), 404, "stream_gone")
        for bad in ({"x-penumbra-resume": "60"}, {"x-penumbra-resume": "x", "idempotency-key": "k-2"}):
            check_error(await client.post("/v1/completions", json=BODY, headers=bad), 400, "invalid_request")
        whole = await client.post(
            "/v1/completions", json=BODY, headers={"x-penumbra-resume": "60", "idempotency-key": "k-3"}
        )
        check_error(whole, 400, "invalid_request")
        assert BODY["model"] == MODEL


def told(text: str) -> list[tuple[str, Any]]:
    """(id, data) of each event, in which the last of a token's has an id."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields.get("data", "[DONE]") != "[DONE]":
            found.append((fields.get("id", ""), json.loads(fields["data"])))
    return found


STORIES = {
    "/v1/completions": BODY | {"stream": True, "stream_options": {"include_usage": True}},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/messages": {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    "/v1/responses": {"model": MODEL, "input": "hi", "stream": True},
}


@pytest.mark.parametrize("path", STORIES)
async def test_from_any_event_on_the_rest_is_what_it_was(start_router, redis_url, path: str):
    """In every protocol: whatever of a stream a client has heard, what it gets afterwards makes it whole."""
    script = saying("once \u00fcber twice", per_message=2)
    async with cluster(start_router, redis_url, f"rest{path.replace('/', '-')}", script) as (client, _, _):
        headers = {"idempotency-key": f"k{path}", "x-penumbra-resume": "60"}
        whole = await client.post(path, json=STORIES[path], headers=headers)
        assert whole.status_code == 200
        events = told(whole.text)
        ids = list(dict.fromkeys(stream for stream, _ in events if stream))
        assert len(ids) > 3

        def plain(data: Any) -> str:
            """Without when it was completed, which is when it was sent."""
            if "response" in data:
                data["response"].pop("completed_at", None)
            return json.dumps(data, sort_keys=True)

        for stream in ids[:-1]:
            rest = await client.get(f"/v1/streams/{stream}")
            assert rest.status_code == 200, rest.text
            last = max(i for i, (at, _) in enumerate(events) if at == stream)
            assert [plain(data) for _, data in told(rest.text)] == [plain(data) for _, data in events[last + 1 :]]
        # The same request again, under its key: all of it.
        again = await client.post(path, json=STORIES[path], headers=headers)
        assert [plain(data) for _, data in told(again.text)] == [plain(data) for _, data in events]
