"""The shell around the gate: whoever the gate lets in or refuses hears of it, whatever made it look."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry

from router.admission import Admission, Wishes
from router.attempts import RelayRequest
from router.config import RouterConfig
from router.fleet import FleetSnapshot
from router.mirror import PrefixMirror
from router.tenants import ANYONE
from tests.router.test_router_placement import decode, fleet, prefill
from wire.telemetry import RouterMetrics
from wire.types import SamplingParams


def request(name: str) -> RelayRequest:
    return RelayRequest(
        request_id=name, prompt=(5,) * 1000, sampling=SamplingParams(max_tokens=8, seed=1), vocab_size=10
    )


def seen(free_tokens: int) -> FleetSnapshot:
    return fleet(prefill("p0"), decode("d0", free_tokens=free_tokens, running=1))


async def test_who_waits_is_let_in_when_a_newcomer_is_the_first_to_see_the_room():
    now = seen(0)
    config = RouterConfig(model=Path("m"), redis_url="redis://127.0.0.1:1")
    admission = Admission(config, RouterMetrics(CollectorRegistry()), lambda: now, PrefixMirror())
    served: list[str] = []

    async def run(name: str) -> None:
        async with admission.turn(request(name), ANYONE, Wishes()) as turn:
            served.append(name)
            turn.placed()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        # Nobody looks at the fleet but the requests themselves: `Admission.run` is not running.
        tasks.create_task(run("first"))
        await asyncio.sleep(0)
        assert served == []
        now = seen(8_000)
        tasks.create_task(run("second"))
    assert sorted(served) == ["first", "second"]
