"""What a tenant may use: requests and tokens a minute, and streams at once, over all routers together.

The rules are pure: `judge` compares a tenant's limits with what it has used. The counts are in Redis, where every
router adds its own and reads the sum in one round trip; they are approximate by what others add in between. Without
Redis each router goes by its own counts and its share of the limit, so losing Redis opens nothing.

Minutes are counted by Redis' clock, as each router last heard it. Within one the last minute's use fades out evenly, so
a tenant can not spend two minutes' worth around a full one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.exceptions import RedisError

from router.replicas import Replicas
from router.tenants import Tenant
from wire.errors import RateLimited
from wire.registry import honour_cancellation

WINDOW_S = 60.0
KEEP_S = 180
"""Counters live a little longer than anybody looks at them."""

KEEP_STREAMS_S = 86_400
"""A stream may well run for hours without its tenant asking for anything else."""

TIMEOUT_S = 0.2
PAUSE_S = 1.0
"""After Redis has not answered, requests go without it for so long before one asks again."""

STREAM_RETRY_S = 1.0
"""Nobody knows when a stream will end."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a tenant has used, `into_s` seconds into this minute: then and now, this request included."""

    into_s: float
    requests: int = 0
    requests_before: int = 0  # in the minute before
    tokens: int = 0
    tokens_before: int = 0
    streams: int = 0


def judge(tenant: Tenant, use: Use, *, share: float = 1.0, requests: int = 0, tokens: int = 0) -> RateLimited | None:
    """Why the last `requests` and `tokens` of `use` are too many for the tenant, or None.

    share  the part of each limit that counts here
    """
    fade = 1 - use.into_s / WINDOW_S
    for what, limit, asked, now, before in (
        ("requests", tenant.requests_per_min, requests, use.requests, use.requests_before),
        ("tokens", tenant.tokens_per_min, tokens, use.tokens, use.tokens_before),
    ):
        allowed = _part(limit, share)
        if not asked or not limit or now + before * fade <= allowed:
            continue
        if asked > allowed:
            return RateLimited(
                f"This request alone takes {asked} {what} of the {allowed} a minute that its API key allows. "
                "Shorten it or lower max_tokens."
            ).after(0)
        wait_s = _wait_s(allowed - asked, now - asked, before, use.into_s)
        return RateLimited(
            f"The API key's limit of {allowed} {what} a minute is used up: {now - asked + round(before * fade)} before "
            f"this request's {asked}. Retry in {math.ceil(wait_s)} s."
        ).after(wait_s)
    most = _part(tenant.streams, share)
    if tenant.streams and requests and use.streams > most:
        return RateLimited(
            f"The API key allows {most} requests at once, and so many are running. Retry when one has ended."
        ).after(STREAM_RETRY_S)
    return None


def _part(limit: int, share: float) -> int:
    """Never so little that nothing at all would pass."""
    return max(1, int(limit * share))


def _wait_s(room: int, now: int, before: int, into_s: float) -> float:
    """Seconds until no more than `room` is left of what was used."""
    if now <= room:  # what fades of the last minute is enough
        return max(0.0, WINDOW_S * (1 - (room - now) / before) - into_s)
    return WINDOW_S - into_s + WINDOW_S * (1 - room / now)


@dataclass(slots=True)
class _Counts:
    """This router's own counts of one tenant."""

    minute: int = 0
    requests: int = 0
    requests_before: int = 0
    tokens: int = 0
    tokens_before: int = 0
    streams: int = 0

    def roll(self, minute: int) -> None:
        if minute == self.minute:
            return
        next_one = minute == self.minute + 1
        self.requests_before, self.tokens_before = (self.requests, self.tokens) if next_one else (0, 0)
        self.minute, self.requests, self.tokens = minute, 0, 0


@dataclass(slots=True)
class Stay:
    """A tenant's request on its way through: what was counted for it, and what it has used so far."""

    tenant: Tenant
    reserved: int = 0  # tokens
    used: int = 0  # tokens; what counts in the end, however it ends
    use: Use = field(default_factory=lambda: Use(into_s=0))

    def headers(self) -> dict[str, str]:
        """What OpenAI's clients know the limits by."""
        fade = 1 - self.use.into_s / WINDOW_S
        told: dict[str, str] = {}
        for what, limit, now, before in (
            ("requests", self.tenant.requests_per_min, self.use.requests, self.use.requests_before),
            ("tokens", self.tenant.tokens_per_min, self.use.tokens, self.use.tokens_before),
        ):
            if limit:
                told[f"x-ratelimit-limit-{what}"] = str(limit)
                told[f"x-ratelimit-remaining-{what}"] = str(max(0, limit - now - round(before * fade)))
                told[f"x-ratelimit-reset-{what}"] = f"{WINDOW_S - self.use.into_s:.0f}s"
        return told


class Quotas:
    """The counters of every tenant that has limits."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._own: dict[str, _Counts] = {}
        self._silent_until = 0.0

    @contextlib.asynccontextmanager
    async def stay(self, tenant: Tenant) -> AsyncIterator[Stay]:
        """Count a request, a stream for as long as it is inside, and in the end the tokens that it used.

        Raises RateLimited for one too many.
        """
        stay = Stay(tenant)
        if not tenant.limited:
            yield stay
            return
        await self._count(stay, requests=1, streams=1)
        try:
            yield stay
        finally:
            await self._add(tenant, Counter(streams=-1, tokens=stay.used - stay.reserved))

    async def reserve(self, stay: Stay, tokens: int) -> None:
        """Count the tokens that a request may use at most. Raises RateLimited if those are too many."""
        if stay.tenant.tokens_per_min:
            await self._count(stay, tokens=tokens)
            stay.reserved += tokens

    async def _count(self, stay: Stay, **amounts: int) -> None:
        asked = Counter(amounts)
        use, share = await self._add(stay.tenant, asked)
        stay.use = use
        refusal = judge(stay.tenant, use, share=share, requests=asked["requests"], tokens=asked["tokens"])
        if refusal is not None:
            await self._add(stay.tenant, Counter({name: -amount for name, amount in asked.items()}))
            raise refusal

    async def _add(self, tenant: Tenant, amounts: Counter[str]) -> tuple[Use, float]:
        """Add to the counts -> all routers' sums and 1, or this one's own and its share of the limits."""
        now_s = self._replicas.shared_time_s()
        minute, into_s = divmod(now_s, WINDOW_S)
        own = self._own.setdefault(tenant.tenant_id, _Counts())
        own.roll(int(minute))
        own.requests += amounts["requests"]
        own.tokens += amounts["tokens"]
        own.streams += amounts["streams"]
        if time.monotonic() >= self._silent_until:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    use = await self._add_shared(tenant.tenant_id, int(minute), into_s, amounts)
                honour_cancellation()
                return use, 1.0
            except (RedisError, OSError, TimeoutError) as error:
                honour_cancellation()
                log.warning("limits_alone", share=self._replicas.share(), error=str(error) or type(error).__name__)
                self._silent_until = time.monotonic() + PAUSE_S
        mine = Use(
            into_s=into_s,
            requests=own.requests,
            requests_before=own.requests_before,
            tokens=own.tokens,
            tokens_before=own.tokens_before,
            streams=own.streams,
        )
        return mine, self._replicas.share()

    async def _add_shared(self, tenant_id: str, minute: int, into_s: float, amounts: Counter[str]) -> Use:
        """In one transaction, without scripts: a Redis user that may run none is enough."""
        used = [f"{self._replicas.prefix}:used:{tenant_id}:{m}" for m in (minute, minute - 1)]
        streams = f"{self._replicas.prefix}:streams:{tenant_id}"
        async with self._replicas.redis.pipeline(transaction=True) as pipe:
            for name in ("requests", "tokens"):
                pipe.hincrby(used[0], name, amounts[name])
            pipe.expire(used[0], KEEP_S)
            pipe.hgetall(used[1])
            # A field for each life of a router, which sets its own: what it missed while Redis was away comes right.
            pipe.hset(streams, self._replicas.life, str(self._own[tenant_id].streams))
            pipe.hgetall(streams)
            pipe.expire(streams, KEEP_STREAMS_S)
            requests, tokens, _, before, _, running, _ = await pipe.execute()
        lives = {raw: raw.decode("ascii", "replace") for raw in running}
        if dead := [raw for raw, life in lives.items() if not self._replicas.lives(life)]:
            await self._replicas.awaited(self._replicas.redis.hdel(streams, *dead))
        return Use(
            into_s=into_s,
            requests=requests,
            tokens=tokens,
            requests_before=_number(before, b"requests"),
            tokens_before=_number(before, b"tokens"),
            streams=sum(_number(running, raw) for raw in lives if raw not in dead),
        )


def _number(fields: Mapping[Any, Any], name: bytes) -> int:
    try:
        return int(fields.get(name, 0))
    except ValueError:  # not written by a router
        return 0
