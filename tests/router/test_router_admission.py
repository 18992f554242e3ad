"""Keys, limits and the queue at the HTTP door: what strangers, tenants and administrators get, and when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.redis import free_port
from router.config import RouterConfig
from router.process import serve
from router.tenants import new_key
from tests.router.conftest import MODEL, RouterStarter
from tests.router.scripted_worker import ScriptedWorker, for_ever, scripted
from tests.router.test_router_http import check_error
from tests.router.test_router_stream import BODY, finished, prefilled, prefills, saying, tokens, until, until_ready
from tests.wire.collector import Collector
from wire.errors import ConfigError
from wire.prefix import namespace
from wire.types import Admitted

OPEN = ("/health", "/healthz", "/liveness", "/livez", "/live", "/readiness", "/readyz")
COMPLETIONS = "/v1/completions"


class Keys:
    """A key file with a tenant for each word of `rows`, and the keys."""

    def __init__(self, folder: Path, **rows: str) -> None:
        self.path = folder / "keys.toml"
        self.of = {}
        text = []
        for tenant, row in rows.items():
            self.of[tenant], stored = new_key()
            text.append(f'[tenants.{tenant}]\nkeys = ["{stored}"]\n{row}\n')
        self.path.write_text("\n".join(text))

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.of[tenant]}"}


@contextlib.asynccontextmanager
async def guarded(
    start_router: RouterStarter, redis_url: str, name: str, keys: Keys, decode: Any = None, **config: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedWorker, ScriptedWorker]]:
    """A router with keys before one pair of workers. The client sends no key by itself."""
    async with (
        scripted(redis_url, name, "p0", prefill=prefills) as p0,
        scripted(redis_url, name, "d0", decode=decode or saying("ok")) as d0,
        start_router(namespace=name, keys_file=keys.path, **config) as client,
    ):
        client.headers.update(keys.headers("ops"))
        await until_ready(client, 2)
        del client.headers["authorization"]
        yield client, p0, d0


ADMIN = "admin = true"


async def test_every_route_without_a_key_is_closed_but_health(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN)
    async with guarded(start_router, redis_url, "walk", keys) as (client, _, _):
        for path in OPEN:
            assert (await client.get(path)).status_code == 200, path
        routes = [
            *("/v1/models", "/v1/models/nano", "/version", "/workers", "/metrics/", "/docs", "/openapi.json"),
            *(COMPLETIONS, "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize", "/detokenize"),
            *(
                "/fleet",
                "/fleet/events",
                "/page",
                "/v1/../workers",
                "//v1/models",
                "/pause",
                "/invocations",
                "/health/x",
                "/HEALTH",
                "/v1/streams/x",
            ),
        ]
        for path in routes:
            for method in ("GET", "POST", "DELETE", "PATCH"):
                answer = await client.request(method, path)
                assert answer.status_code == 401, (method, path, answer.status_code)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
        check_error(await client.get("/v1/models"), 401, "invalid_api_key")
        messages = (await client.post("/v1/messages")).json()
        assert messages["error"]["type"] == "authentication_error"
        # On an address that only this machine reaches, metrics are open.
        assert (await client.get("/metrics")).status_code == 200


async def test_a_wrong_key_is_answered_like_none(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN)
    wrong = [
        f"Bearer {new_key()[0]}",
        "Bearer",
        "Bearer  x",
        f"Basic {keys.of['ops']}",
        keys.of["ops"],
        "Bearer \xff\xfe",
    ]
    async with guarded(start_router, redis_url, "wrong", keys) as (client, _, _):
        bare = check_error(await client.get("/v1/models"), 401, "invalid_api_key")
        for header in wrong:
            answer = await client.get("/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
            assert check_error(answer, 401, "invalid_api_key") == bare, header
        for header in ({"authorization": f"bearer {keys.of['ops']}"}, {"x-api-key": keys.of["ops"]}):
            assert (await client.get("/v1/models", headers=header)).status_code == 200


async def test_tenants_see_their_models_and_nothing_of_the_fleet(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN, some=f'models = ["{MODEL}"]', other='models = ["else"]')
    async with guarded(start_router, redis_url, "models", keys, served_model_names=(MODEL, "alias")) as (client, _, _):

        async def names(tenant: str) -> list[str]:
            listed = (await client.get("/v1/models", headers=keys.headers(tenant))).json()["data"]
            return [card["id"] for card in listed]

        assert await names("ops") == [MODEL, "alias"]
        assert await names("some") == [MODEL]
        assert await names("other") == []
        for tenant in ("some", "other"):
            for path in ("/workers", "/nothing", "/fleet", "/fleet/events"):
                check_error(await client.get(path, headers=keys.headers(tenant)), 403, "permission_denied")
        # A model that is not theirs is as unknown as one that does not exist.
        refused = [
            check_error(
                await client.post(COMPLETIONS, json=BODY | {"model": model}, headers=keys.headers("some")),
                404,
                "model_not_found",
            ).replace(model, "?")
            for model in ("alias", "no-such-model")
        ]
        assert refused[0] == refused[1]
        answer = await client.post(COMPLETIONS, json=BODY, headers=keys.headers("some"))
        assert answer.json()["choices"][0]["text"] == "ok"


async def test_no_prefix_is_shared_between_tenants(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN, a="", b="")
    async with guarded(start_router, redis_url, "prefixes", keys) as (client, p0, d0):
        for tenant in ("a", "b", "a"):
            for salt in ("", "s"):
                body = BODY | ({"cache_salt": salt} if salt else {})
                assert (await client.post(COMPLETIONS, json=body, headers=keys.headers(tenant))).status_code == 200
        spaces = [start.namespace for start in d0.requests]
        assert spaces == [run.namespace for run in p0.requests]
        assert spaces == [namespace("m", tenant, salt) for tenant in ("a", "b", "a") for salt in ("", "s")]
        assert len(set(spaces)) == 4


async def test_a_key_is_taken_back_without_a_restart(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN, gone="")
    async with guarded(start_router, redis_url, "taken", keys) as (client, _, _):
        assert (await client.get("/v1/models", headers=keys.headers("gone"))).status_code == 200
        keys.path.write_text(keys.path.read_text().partition("[tenants.gone]")[0])
        async with asyncio.timeout(20):
            while (await client.get("/v1/models", headers=keys.headers("gone"))).status_code != 401:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert (await client.get("/v1/models", headers=keys.headers("ops"))).status_code == 200


async def test_over_its_limit_a_tenant_is_told_when_to_come_again_and_others_are_served(
    start_router, redis_url, tmp_path
):
    keys = Keys(tmp_path, ops=ADMIN, small="requests_per_min = 2", tokens="tokens_per_min = 60", free="")
    async with guarded(start_router, redis_url, "limits", keys) as (client, p0, _):
        answers = [await client.post(COMPLETIONS, json=BODY, headers=keys.headers("small")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
        check_error(answers[2], 429, "rate_limit_exceeded")
        retry_ms = int(answers[2].headers["retry-after-ms"])
        assert 0 < retry_ms <= 120_000
        assert int(answers[2].headers["retry-after"]) == -(-retry_ms // 1000)
        assert len(p0.requests) == 2  # nothing was computed for the third

        # 3 prompt tokens and 50 of the answer are reserved; 3 and 3 are used.
        answers = [await client.post(COMPLETIONS, json=BODY, headers=keys.headers("tokens")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-remaining-tokens"] == "7"
        # A request that no minute has room for need not come again at all.
        huge = await client.post(COMPLETIONS, json=BODY | {"max_tokens": 58}, headers=keys.headers("tokens"))
        check_error(huge, 429, "rate_limit_exceeded")
        assert huge.headers["x-should-retry"] == "false"
        assert "retry-after" not in huge.headers

        assert (await client.post(COMPLETIONS, json=BODY, headers=keys.headers("free"))).status_code == 200
        error = (await client.post("/v1/messages", json={}, headers=keys.headers("small"))).json()
        assert error["error"]["type"] == "rate_limit_error"


async def num_waiting(client: httpx.AsyncClient) -> float:
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("penumbra_num_requests_waiting "):
            return float(line.split()[1])
    raise AssertionError("no such metric")


async def until_waiting(client: httpx.AsyncClient, n: int) -> None:
    async with asyncio.timeout(10):
        while await num_waiting(client) != n:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def stands_still(request: Any) -> AsyncIterator[Any]:
    yield Admitted(resident_prefix=0, secret=b"0123456789abcdef")
    await prefilled(request)
    yield tokens(request, 70)
    await for_ever()


async def test_streams_of_one_key_are_capped_and_free_again_when_their_client_leaves(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN, two="streams = 2", free="")
    async with guarded(start_router, redis_url, "streams", keys, stands_still) as (client, _, d0):
        body = BODY | {"stream": True}
        mine = keys.headers("two")
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                answer = await stack.enter_async_context(client.stream("POST", COMPLETIONS, json=body, headers=mine))
                assert answer.status_code == 200
            check_error(await client.post(COMPLETIONS, json=body, headers=mine), 429, "rate_limit_exceeded")
            async with client.stream("POST", COMPLETIONS, json=body, headers=keys.headers("free")) as answer:
                assert answer.status_code == 200
        await until(lambda: d0.running == 0)
        async with asyncio.timeout(10):
            while True:
                async with client.stream("POST", COMPLETIONS, json=body, headers=mine) as answer:
                    if answer.status_code == 200:
                        break
                await asyncio.sleep(0.05)


async def test_keys_and_prompts_are_in_no_log_line(start_router, redis_url, tmp_path, caplog, capfd):
    keys = Keys(tmp_path, ops=ADMIN, a="requests_per_min = 1")
    caplog.set_level(logging.DEBUG)
    canary = "prompt-canary-4711"
    async with guarded(start_router, redis_url, "canary", keys) as (client, _, _):
        body = BODY | {"prompt": canary, "cache_salt": "salt-canary-4711"}
        for headers in (keys.headers("a"), keys.headers("a"), {"x-api-key": keys.of["ops"]}, {"x-api-key": "pn-wrong"}):
            await client.post(COMPLETIONS, json=body, headers=headers)
            await client.post(COMPLETIONS, content=b'{"prompt": "' + canary.encode(), headers=headers)
    written = capfd.readouterr()
    told = caplog.text + written.out + written.err
    assert "request_done" in told
    for secret in (canary, "salt-canary-4711", keys.of["a"], keys.of["ops"], keys.of["a"].split("-", 2)[2]):
        assert secret not in told


# The queue


async def test_who_finds_no_room_waits_until_there_is_some(start_router, redis_url, tmp_path):
    """Nothing is computed for a request that waits; when its turn comes it goes like any other."""
    let_go = asyncio.Event()

    async def once(request: Any) -> AsyncIterator[Any]:
        yield Admitted(resident_prefix=0, secret=b"0123456789abcdef")
        await prefilled(request)
        yield tokens(request, 70)
        await let_go.wait()
        yield finished(request, 1)

    keys = Keys(tmp_path, ops=ADMIN)
    async with guarded(start_router, redis_url, "queue", keys, once, queue_size=2) as (client, p0, d0):
        client.headers.update(keys.headers("ops"))
        # A prompt that takes more than half of the 8,192 tokens that the worker has.
        body = BODY | {"prompt": [5] * 3_000, "max_tokens": 1_000, "stream": True}

        async with asyncio.TaskGroup() as tasks:
            first = [tasks.create_task(client.post(COMPLETIONS, json=body)) for _ in range(2)]
            await until(lambda: d0.running == 2)
            later = []
            for n in (1, 2):
                later.append(tasks.create_task(client.post(COMPLETIONS, json=body)))
                await until_waiting(client, n)
            refused = await client.post(COMPLETIONS, json=body)
            check_error(refused, 503, "overloaded")
            assert 1_000 <= int(refused.headers["retry-after-ms"]) <= 120_000
            unwilling = await client.post(COMPLETIONS, json=body, headers={"prefer": "if-available"})
            check_error(unwilling, 412, "would_wait")
            anthropic = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "a" * 3_500}]}
            busy = await client.post("/v1/messages", json=anthropic)
            assert (busy.status_code, busy.json()["error"]["type"]) == (529, "overloaded_error")
            assert len(p0.requests) == len(d0.requests) == 2
            # A client that leaves the line leaves its place.
            later.pop().cancel()
            await until_waiting(client, 1)
            let_go.set()
            for task in (*first, *later):
                assert (await task).text.endswith("data: [DONE]\n\n")
        assert await num_waiting(client) == 0
        assert len(d0.requests) == 3


async def test_who_waits_in_vain_is_told_so_and_nothing_was_computed(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN)
    async with guarded(start_router, redis_url, "vain", keys, stands_still, queue_timeout_s=0.3) as (client, p0, d0):
        client.headers.update(keys.headers("ops"))
        body = BODY | {"prompt": [5] * 3_900, "max_tokens": 100, "stream": True}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(client.stream("POST", COMPLETIONS, json=body))
            await until(lambda: d0.running == 2)
            refused = await client.post(COMPLETIONS, json=body)
            check_error(refused, 408, "queue_timeout")
            assert int(refused.headers["retry-after"]) >= 1
            assert len(p0.requests) == 2


async def test_a_priority_that_is_none_is_refused(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN)
    async with guarded(start_router, redis_url, "priority", keys) as (client, _, _):
        client.headers.update(keys.headers("ops"))
        for bad in ("high", "1.5", "99999", "--1", "\u0661"):
            answer = await client.post(COMPLETIONS, json=BODY, headers=[(b"x-dynamo-request-priority", bad.encode())])
            check_error(answer, 400, "invalid_request")
        good = await client.post(COMPLETIONS, json=BODY, headers={"x-dynamo-request-priority": "-7"})
        assert good.status_code == 200


async def test_a_body_may_say_its_priority_and_a_header_goes_before_it(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN)
    async with guarded(start_router, redis_url, "body-priority", keys, stands_still) as (client, _, d0):
        client.headers.update(keys.headers("ops"))
        for bad in ("high", 1.5, 1001, -1001, True):
            refused = await client.post(COMPLETIONS, json=BODY | {"priority": bad})
            check_error(refused, 400, "invalid_request", "priority")
        body = BODY | {"prompt": [5] * 3_900, "max_tokens": 100, "stream": True}
        running = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(2)]
        await until(lambda: d0.running == 2)
        waiting = []
        for salt, more, headers in (
            ("late", {"priority": 7}, {}),
            ("later", {"priority": -7}, {"x-dynamo-request-priority": "9"}),
            ("sooner", {"priority": 3}, {}),
        ):
            asked = body | more | {"cache_salt": salt}
            waiting.append(asyncio.create_task(client.post(COMPLETIONS, json=asked, headers=headers)))
            await until_waiting(client, len(waiting))
        for post in running:
            post.cancel()
        await until(lambda: len(d0.requests) == 4)
        first, second = (request.namespace for request in d0.requests[2:])
        assert first == namespace("m", "ops", "sooner")
        assert second == namespace("m", "ops", "late")
        for post in waiting:
            post.cancel()
        await asyncio.wait([*running, *waiting])


async def test_a_request_that_is_refused_has_a_span_in_its_callers_trace(start_router, redis_url, tmp_path):
    keys = Keys(tmp_path, ops=ADMIN, one="requests_per_min = 1")
    trace_id, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    parent = {"traceparent": f"00-{trace_id}-{caller}-01"}
    with Collector() as collector:
        async with start_router(namespace="refused", keys_file=keys.path, otlp_traces_endpoint=collector.url) as client:
            one = keys.headers("one")
            answers = [
                await client.post(COMPLETIONS, json=BODY, headers=parent),  # no key
                await client.post(COMPLETIONS, json=BODY | {"nonsense": 1}, headers=parent | one),
                await client.post(COMPLETIONS, json=BODY, headers=parent | one),  # above the limit
                await client.post(COMPLETIONS, json=BODY, headers=parent | keys.headers("ops")),  # no workers
                await client.get("/v1/models", headers=parent | one),  # nothing that generates
            ]
        assert [answer.status_code for answer in answers] == [401, 400, 429, 503, 200]
        spans = [span for span in collector.spans if span.name == f"POST {COMPLETIONS}"]
    assert {span.trace_id.hex() for span in spans} == {trace_id}
    assert {span.parent_span_id.hex() for span in spans} == {caller}
    told = [Collector.attributes(span) for span in spans]
    errors = ["invalid_api_key", "invalid_request", "rate_limit_exceeded", "no_workers"]
    assert [attributes["error.type"] for attributes in told] == errors
    # The last was placed in vain, and is told by the span of what it would have been.
    assert [attributes.get("status") for attributes in told] == [401, 400, 429, None]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [attributes.get("request_id") for attributes in told] == [*ids[:3], None]


async def test_the_front_page_needs_no_key_and_what_it_asks_for_does(start_router, redis_url, tmp_path):
    async with guarded(start_router, redis_url, "front", Keys(tmp_path, ops=ADMIN)) as (client, _, _):
        page = await client.get("/")
        assert page.status_code == 200
        for file in re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text):
            assert (await client.get(file)).status_code == 200
        for beside in ("/page/../workers", "/page/..%2f..%2fworkers", "/page/nothing.js"):
            assert (await client.get(beside)).status_code in (401, 404), beside


# Ports


async def test_administrators_have_a_port_of_their_own(start_router):
    port = free_port()
    async with start_router(namespace="admin-port", admin_port=port) as client:
        check_error(await client.get("/workers"), 403, "permission_denied")
        assert (await client.get("/v1/models")).status_code == 200
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as admin:
            assert (await admin.get("/workers")).json()["workers"] == []
            assert "penumbra_num_requests_running" in (await admin.get("/metrics")).text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
async def test_strangers_are_not_served_without_keys_unless_told_to(model_dir, redis_url, tmp_path, host):
    with pytest.raises(ConfigError, match="--insecure"):
        RouterConfig(model=model_dir, redis_url=redis_url, host=host)
    with pytest.raises(ConfigError, match="--insecure"):
        RouterConfig(model=model_dir, redis_url=redis_url, admin_host=host)
    assert RouterConfig(model=model_dir, redis_url=redis_url, host=host, insecure=True).host == host
    assert RouterConfig(model=model_dir, redis_url=redis_url, host=host, keys_file=tmp_path / "k").host == host


@pytest.mark.parametrize(
    "edges", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, float("inf")), (float("nan"),), (*range(1, 99),)]
)
def test_edges_that_make_no_histogram_are_refused(model_dir, redis_url, edges):
    with pytest.raises(ConfigError, match="duration_buckets_s"):
        RouterConfig(model=model_dir, redis_url=redis_url, duration_buckets_s=edges)


async def test_a_router_with_a_bad_key_file_does_not_start(model_dir, redis_url, tmp_path):
    (tmp_path / "keys.toml").write_text("[tenants.A]\nkeys = []")
    with pytest.raises(ConfigError, match="key file"):
        await serve(RouterConfig(model=model_dir, redis_url=redis_url, port=0, keys_file=tmp_path / "keys.toml"))
