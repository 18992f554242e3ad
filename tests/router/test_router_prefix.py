"""Requests go where their prefix is, as workers have told it; and never by another's prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.router.conftest import MODEL, RouterStarter
from tests.router.scripted_worker import ScriptedWorker, scripted
from tests.router.test_router_stream import PREFILLED, finished, prefilled, saying, tokens, until_ready
from wire.events import PrefixPublisher
from wire.prefix import namespace, page_hashes
from wire.types import Admitted, Progress, RunEvent, RunRequest, StartEvent, StartRequest, Stored

PROMPT = [3 + i % 250 for i in range(1_000)]
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10}
SPACE = namespace("m")


async def prefills_half_cached(request: RunRequest) -> AsyncIterator[RunEvent]:
    PREFILLED.add((request.request_id, request.attempt))
    held = min(512, len(request.prompt))
    yield Progress(done=held, total=len(request.prompt), cached=held)
    await asyncio.Event().wait()


@asynccontextmanager
async def cluster(
    start_router: RouterStarter, redis_url: str, cluster_name: str, decode: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, ScriptedWorker]]]:
    """A router, two prefill and two decode workers; `p1` and `d1` tell of the prompt's pages, without a salt."""
    async with (
        scripted(redis_url, cluster_name, "p0", prefill=prefills_half_cached) as p0,
        scripted(redis_url, cluster_name, "p1", prefill=prefills_half_cached) as p1,
        scripted(redis_url, cluster_name, "d0", decode=decode) as d0,
        scripted(redis_url, cluster_name, "d1", decode=decode) as d1,
        PrefixPublisher(redis_url, "p1", p1.info.epoch, cluster_name) as prefill_pages,
        PrefixPublisher(redis_url, "d1", d1.info.epoch, cluster_name) as decode_pages,
        start_router(namespace=cluster_name) as client,
    ):
        prefill_pages.publish([Stored(tuple(page_hashes(PROMPT, SPACE)))])
        decode_pages.publish([Stored(tuple(page_hashes(PROMPT, SPACE)[:2]))])
        await until_ready(client, 4)
        await until_mirrored(client, {"d0": 0, "d1": 2, "p0": 0, "p1": 3})
        yield client, {"p0": p0, "p1": p1, "d0": d0, "d1": d1}


async def until_mirrored(client: httpx.AsyncClient, pages: dict[str, int]) -> None:
    async with asyncio.timeout(10):
        while True:
            workers = (await client.get("/workers")).json()["workers"]
            if {worker["worker_id"]: worker["mirrored_pages"] for worker in workers} == pages:
                return
            await asyncio.sleep(0.02)


def asked(workers: dict[str, ScriptedWorker]) -> list[str]:
    """Who got requests since the last look."""
    got = [name for name, worker in workers.items() if worker.requests]
    for worker in workers.values():
        worker.requests.clear()
    return got


async def test_a_prompt_goes_to_the_workers_that_hold_it_and_only_with_the_same_salt(start_router, redis_url):
    async with cluster(start_router, redis_url, "prefixes", saying("ok")) as (client, workers):
        for body, expected in (
            (BODY, ["p1", "d1"]),
            (BODY | {"prompt": [*PROMPT[:700], 9]}, ["p1", "d1"]),
            (BODY | {"prompt": [9, *PROMPT]}, ["p0", "d0"]),
            (BODY | {"cache_salt": "mine"}, ["p0", "d0"]),
            (BODY | {"cache_salt": None}, ["p1", "d1"]),
        ):
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert asked(workers) == expected
        metrics = (await client.get("/metrics")).text
        assert 'penumbra_prefix_mirror_pages{worker_id="p1"} 3.0' in metrics
        assert 'penumbra_prefix_mirror_pages{worker_id="d0"} 0.0' in metrics


async def test_both_workers_are_told_the_namespace_of_model_and_salt(start_router, redis_url):
    async with cluster(start_router, redis_url, "namespaces", saying("ok")) as (client, workers):
        for salt in (None, "mine", "x" * 256):
            await client.post("/v1/completions", json=BODY | {"cache_salt": salt})
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "cache_salt": salt}
            await client.post("/v1/chat/completions", json=chat)
            spaces = [request.namespace for worker in workers.values() for request in worker.requests]
            assert spaces == [namespace("m", "default", salt or "")] * 4
            asked(workers)


async def test_usage_says_how_much_of_the_prompt_was_cached_even_if_a_stop_string_ends_the_answer(
    start_router, redis_url
):
    async def half_cached(request: StartRequest) -> AsyncIterator[StartEvent]:
        yield Admitted(resident_prefix=0, secret=b"0123456789abcdef")
        await prefilled(request)
        await asyncio.sleep(0.1)  # the prefill worker's own word is on its way
        yield tokens(request, 100, 101, 102)
        if request.sampling.ignore_eos:
            await asyncio.Event().wait()
        done = finished(request, 3)
        yield type(done)(reason=done.reason, prompt_tokens=done.prompt_tokens, cached_tokens=768, completion_tokens=3)

    async with cluster(start_router, redis_url, "usage", half_cached) as (client, _):
        whole = (await client.post("/v1/completions", json=BODY)).json()
        assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 768}
        assert (whole["usage"]["prompt_cache_hit_tokens"], whole["usage"]["prompt_cache_miss_tokens"]) == (768, 232)
        stop = {"stop": whole["choices"][0]["text"][:2], "ignore_eos": True}
        stopped = (await client.post("/v1/completions", json=BODY | stop)).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert (stopped["usage"]["prompt_cache_hit_tokens"], stopped["usage"]["prompt_cache_miss_tokens"]) == (512, 488)
        assert "penumbra_prompt_tokens_cached_total 1280.0" in (await client.get("/metrics")).text
