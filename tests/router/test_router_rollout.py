"""Two revisions side by side, as in a rollout: pages of one never go to the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.router.conftest import RouterStarter
from tests.router.scripted_worker import ScriptedWorker, scripted
from tests.router.test_router_stream import BODY, prefills, saying
from wire.types import PROTOCOL_VERSION

REVISIONS: dict[str, dict[str, Any]] = {"layout": {"signature": "v5"}, "model": {"model": "m-2"}}


@contextlib.asynccontextmanager
async def two_revisions(
    start_router: RouterStarter, redis_url: str, namespace: str, change: dict[str, Any]
) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, ScriptedWorker]]]:
    """A router over a prefill and a decode worker of each revision, all of them serving."""
    workers: dict[str, ScriptedWorker] = {}
    async with contextlib.AsyncExitStack() as stack:
        for revision, info in (("old", {}), ("new", change)):
            for role, script in (("prefill", {"prefill": prefills}), ("decode", {"decode": saying("done")})):
                workers[f"{revision}-{role}"] = await stack.enter_async_context(
                    scripted(redis_url, namespace, f"{revision}-{role}", **script, **info)
                )
        client = await stack.enter_async_context(start_router(namespace=namespace, policy="least_tokens"))
        await until_states(client, serving=4)
        yield client, workers


async def until_states(client: httpx.AsyncClient, **wanted: int) -> None:
    """Until the router knows so many workers in each of these states, and none in another."""
    async with asyncio.timeout(10):
        while Counter(one["state"] for one in (await client.get("/workers")).json()["workers"]) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ask(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/completions", json=BODY)


@pytest.mark.parametrize("revision", REVISIONS)
async def test_no_request_is_given_to_workers_of_two_revisions(
    start_router: RouterStarter, redis_url: str, revision: str
) -> None:
    async with two_revisions(start_router, redis_url, f"roll-{revision}", REVISIONS[revision]) as (client, workers):
        # At once: so many that they do not all go to the revision that is named first.
        answers = await asyncio.gather(*(ask(client) for _ in range(12)))
        assert [answer.status_code for answer in answers] == [200] * 12
        pairs = [
            (name.removesuffix("-decode"), start.source.worker_id.removesuffix("-prefill"))
            for name, worker in workers.items()
            if name.endswith("-decode")
            for start in worker.requests
        ]
        assert len(pairs) == 12
        assert {decode for decode, _ in pairs} == {"old", "new"}, "both revisions serve meanwhile"
        assert all(decode == prefill for decode, prefill in pairs), pairs
        # The old prefill worker drains: whoever is left alone of its revision is given nothing.
        workers["old-prefill"].info = replace(workers["old-prefill"].info, draining=True)
        await until_states(client, serving=3, draining=1)
        before = len(workers["old-decode"].requests)
        for _ in range(4):
            assert (await ask(client)).status_code == 200
        assert len(workers["old-decode"].requests) == before
        # And the new decode worker too: what serves on each side is of two revisions, and nothing is tried.
        await workers["new-decode"].server.set_serving(False)
        await until_states(client, serving=2, draining=1, down=1)
        started = sum(len(worker.requests) for worker in workers.values())
        assert (await ask(client)).status_code == 503
        assert sum(len(worker.requests) for worker in workers.values()) == started


async def test_a_worker_of_another_protocol_is_not_even_known(start_router: RouterStarter, redis_url: str) -> None:
    change = {"protocol": PROTOCOL_VERSION + 1}
    async with contextlib.AsyncExitStack() as stack:
        old = await stack.enter_async_context(scripted(redis_url, "roll-protocol", "old-prefill", prefill=prefills))
        new = await stack.enter_async_context(
            scripted(redis_url, "roll-protocol", "new-decode", decode=saying("done"), **change)
        )
        client = await stack.enter_async_context(start_router(namespace="roll-protocol"))
        await until_states(client, serving=1)
        assert [one["worker_id"] for one in (await client.get("/workers")).json()["workers"]] == ["old-prefill"]
        assert (await ask(client)).status_code == 503
        assert old.requests == new.requests == []
