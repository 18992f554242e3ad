"""How a relay ends when its deadline and its client's leaving fall on the same moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from router.attempts import RelayRequest
from router.fleet import Fleet
from router.mirror import PrefixMirror
from router.relay import relay
from tests.router.scripted_worker import for_ever, scripted
from tests.router.test_router_attempts import LIMITS
from tests.router.test_router_stream import prefills, until
from wire.registry import Registry
from wire.types import SamplingParams, StartEvent, StartRequest

ADMISSION_S = 0.5


async def test_a_deadline_that_passes_while_the_client_leaves_starts_nothing_again(redis_url: str) -> None:
    async def silent(request: StartRequest) -> AsyncIterator[StartEvent]:
        await for_ever()
        yield  # type: ignore[misc]

    request = RelayRequest(
        request_id="r", prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=4, seed=1), vocab_size=10
    )
    async with (
        scripted(redis_url, "relay-end", "p0", prefill=prefills),
        scripted(redis_url, "relay-end", "d0", decode=silent) as d0,
        Registry(redis_url, "relay-end") as registry,
        asyncio.TaskGroup() as tasks,
    ):
        fleet = Fleet(registry, poll_s=0.05)
        running = tasks.create_task(fleet.run())
        await until(lambda: all(v.usable for v in fleet.snapshot().decode) and len(fleet.epochs()) == 2)
        await until(lambda: all(v.usable for v in (*fleet.snapshot().prefill, *fleet.snapshot().decode)))
        async with asyncio.timeout(20):
            limits = replace(LIMITS, admission_s=ADMISSION_S)
            async with relay(fleet, request, limits, PrefixMirror()):
                await until(lambda: len(d0.requests) == 1)
                time.sleep(ADMISSION_S)  # noqa: ASYNC251  nothing else may run: the deadline passes in here
                # One turn of the loop rings the deadline; the next would act on it, but the client leaves first.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        await until(lambda: d0.running == 0)
        assert len(d0.requests) == 1
        running.cancel()
