"""Limits of tenants: the arithmetic of minutes, the counts of several routers in one Redis, and life without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.redis import EmbeddedRedis
from router.quota import Quotas, Use, judge
from router.replicas import Replicas
from router.tenants import Tenant
from wire.errors import RateLimited

ACME = Tenant(tenant_id="acme", requests_per_min=10, tokens_per_min=1_000, streams=3)

# name: (use, share, requests, tokens) -> (what the refusal speaks of, seconds to wait), or None
JUDGED: dict[str, tuple[Use, float, int, int, tuple[str, float] | None]] = {
    "the last one allowed": (Use(into_s=0, requests=10), 1, 1, 0, None),
    # Eleven counted, ten allowed; in the next minute the ten fade by one in 6 s.
    "one more": (Use(into_s=30, requests=11), 1, 1, 0, ("10 requests a minute", 30 + 6)),
    "the last minute counts": (Use(into_s=0, requests=1, requests_before=10), 1, 1, 0, ("requests", 6)),
    "and fades": (Use(into_s=30, requests=6, requests_before=8), 1, 1, 0, None),
    "but not at once": (Use(into_s=30, requests=6, requests_before=10), 1, 1, 0, ("requests", 6)),
    "tokens": (Use(into_s=15, tokens=1_200), 1, 0, 300, ("1000 tokens a minute", 45 + 60 * (1 - 700 / 900))),
    "tokens of the last minute": (Use(into_s=0, tokens=500, tokens_before=1_000), 1, 0, 500, ("tokens", 30)),
    "more than any minute allows": (Use(into_s=0, tokens=1_001), 1, 0, 1_001, ("This request alone", 0)),
    "a fourth stream": (Use(into_s=0, requests=4, streams=4), 1, 1, 0, ("3 requests at once", 1)),
    "a share of the limit": (Use(into_s=0, requests=6), 0.5, 1, 0, ("5 requests a minute", 60 + 12)),
    "a share is never nothing": (Use(into_s=0, requests=1, streams=1), 0.01, 1, 0, None),
    "settling is never refused": (Use(into_s=0, requests=99, tokens=9_999, streams=9), 1, 0, 0, None),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_minute_is_judged_with_what_is_left_of_the_one_before(name: str):
    use, share, requests, tokens, expected = JUDGED[name]
    refusal = judge(ACME, use, share=share, requests=requests, tokens=tokens)
    if expected is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert expected[0] in str(refusal)
        assert refusal.retry_after_s == pytest.approx(expected[1])


def test_after_the_time_told_the_same_request_passes():
    """Whatever was used, waiting as long as the answer says is enough, and a second less is not."""
    for into in range(0, 60, 7):
        for now in range(0, 1_100, 130):
            for before in range(0, 1_100, 130):
                use = Use(into_s=into, tokens=now + 100, tokens_before=before)
                refusal = judge(ACME, use, tokens=100)
                if refusal is None:
                    continue
                assert refusal.retry_after_s is not None
                for shift, passes in ((1e-6, True), (-1.0, False)):
                    minutes, later = divmod(into + max(0.0, refusal.retry_after_s + shift), 60)
                    if minutes > 1:
                        continue
                    counts = (now, before) if minutes == 0 else (0, now)
                    again = Use(into_s=later, tokens=counts[0] + 100, tokens_before=counts[1])
                    if refusal.retry_after_s + shift > 0:
                        assert (judge(ACME, again, tokens=100) is None) == passes, (use, refusal.retry_after_s)


def test_a_tenant_without_limits_is_never_refused():
    free = Tenant(tenant_id="free")
    assert not free.limited
    assert judge(free, Use(into_s=0, requests=10**9, tokens=10**12, streams=10**6), requests=1, tokens=10**6) is None


@asynccontextmanager
async def routers(url: str, namespace: str, n: int, expected: int = 1) -> AsyncIterator[list[Quotas]]:
    """Quotas of so many routers that all see each other."""
    async with contextlib.AsyncExitStack() as stack:
        all_replicas = [Replicas(url, namespace, expected=expected) for _ in range(n)]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for replicas in all_replicas:
            stack.push_async_callback(replicas.aclose)
            stack.callback(tasks.create_task(replicas.run()).cancel)
        async with asyncio.timeout(20):
            while n > 1 and any(replicas.num_routers() < n for replicas in all_replicas):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield [Quotas(replicas) for replicas in all_replicas]


async def test_routers_count_together(redis_url: str):
    async with routers(redis_url, "quota-together", 2) as (one, other):
        tenant = Tenant(tenant_id="t", requests_per_min=4)
        for quotas in (one, other, one, other):
            async with quotas.stay(tenant):
                pass
        for quotas in (one, other):
            with pytest.raises(RateLimited, match="4 requests a minute"):
                async with quotas.stay(tenant):
                    pass
        # Nobody else pays for it.
        async with other.stay(Tenant(tenant_id="u", requests_per_min=4)) as stay:
            assert stay.use.requests == 1


async def test_streams_count_while_they_run(redis_url: str):
    async with routers(redis_url, "quota-streams", 2) as (one, other):
        tenant = Tenant(tenant_id="t", streams=2)
        async with one.stay(tenant), other.stay(tenant):
            with pytest.raises(RateLimited, match="2 requests at once"):
                async with one.stay(tenant):
                    pass
        async with one.stay(tenant) as stay:
            assert stay.use.streams == 1


async def test_streams_of_a_router_that_died_are_forgotten(redis_url: str):
    tenant = Tenant(tenant_id="t", streams=1)
    dead = Replicas(redis_url, "quota-dead")  # never on the roster any more
    async with routers(redis_url, "quota-dead", 1) as (alive,), Quotas(dead).stay(tenant), alive.stay(tenant) as stay:
        assert stay.use.streams == 1
    await dead.aclose()


async def test_reserved_tokens_that_were_not_used_come_back(redis_url: str):
    async with routers(redis_url, "quota-tokens", 1) as (quotas,):
        tenant = Tenant(tenant_id="t", tokens_per_min=1_000)
        async with quotas.stay(tenant) as stay:
            await quotas.reserve(stay, 900)
            with pytest.raises(RateLimited, match="1000 tokens a minute"):
                await quotas.reserve(stay, 200)
            assert stay.headers()["x-ratelimit-limit-tokens"] == "1000"
            stay.used = 150
        async with quotas.stay(tenant) as stay:
            await quotas.reserve(stay, 850)
            with pytest.raises(RateLimited):
                await quotas.reserve(stay, 1)


async def test_without_redis_each_router_goes_by_its_share():
    with EmbeddedRedis() as server:
        async with routers(server.url, "alone", 1, expected=2) as (quotas,):
            tenant = Tenant(tenant_id="t", requests_per_min=8, streams=4)
            async with quotas.stay(tenant) as stay:
                assert stay.use.requests == 1
                server.stop()
                for _ in range(3):
                    async with quotas.stay(tenant):
                        pass
                # What it let in while Redis was there counts as well: four in all, half of eight.
                with pytest.raises(RateLimited, match="4 requests a minute"):
                    async with quotas.stay(tenant):
                        pass
