"""The routers of one cluster: how many there are, and what they share through Redis.

Any number of them stands behind a load balancer. None knows another: they have the workers' registry and prefix events
in common, the counters of tenants' limits, and what `Idempotency-Key` names. All of it may be lost; then each router
goes on with what it knows, and with its part of the limits, as if as many were left as it last saw.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio as aioredis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from wire.registry import LEASE_S, connect, honour_cancellation

BEAT_S = 1.0
TIMEOUT_S = 0.2
MAX_CONNECTIONS = 8


log = structlog.get_logger()


class Replicas:
    """One router's seat on the roster, and its view of it. `run` keeps both until cancelled."""

    def __init__(self, redis_url: str, namespace: str, *, expected: int = 1) -> None:
        """`expected` is how many routers there are meant to be; it counts while Redis has not said more.

        Connects lazily. Raises ConfigError for a URL redis-py does not understand.
        """
        self.prefix = namespace
        self.life = secrets.token_hex(8)
        self.redis: aioredis.Redis = connect(
            redis_url, TIMEOUT_S, Retry(NoBackoff(), retries=0), max_connections=MAX_CONNECTIONS
        )
        self._expected = expected
        self._seen = frozenset({self.life})
        self._ahead_s = time.time() - time.monotonic()  # until Redis has told its time

    def share(self) -> float:
        """The part of a limit that is this router's when it can not ask the others."""
        return 1 / max(self._expected, len(self._seen), 1)

    def num_routers(self) -> int:
        return len(self._seen)

    def lives(self, life: str) -> bool:
        return life in self._seen

    def shared_time_s(self) -> float:
        """Redis' clock, in seconds since the epoch: the same minute on every router, whatever its own clock says."""
        return time.monotonic() + self._ahead_s

    async def run(self, each_beat: Callable[[], None] = lambda: None) -> None:
        """Beat, and look who else does, until cancelled; then leave the roster."""
        lost = False
        try:
            while True:
                each_beat()
                try:
                    async with asyncio.timeout(LEASE_S):
                        await self._beat()
                    lost = False
                except (RedisError, OSError, TimeoutError) as error:
                    if not lost:
                        log.warning("roster_lost", error=str(error) or type(error).__name__)
                    lost = True
                honour_cancellation()
                await asyncio.sleep(BEAT_S)
        finally:
            await self._leave()

    async def aclose(self) -> None:
        await self.redis.aclose()

    async def _beat(self) -> None:
        roster, asked = f"{self.prefix}:routers", time.monotonic()
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.set(self._key(self.life), b"1", px=int(LEASE_S * 1000))
            pipe.sadd(roster, self.life)
            pipe.smembers(roster)
            pipe.time()
            _, _, members, (seconds, micros) = await pipe.execute()
        self._ahead_s = seconds + micros / 1e6 - (asked + time.monotonic()) / 2
        listed = sorted(life for raw in members if _is_life(life := raw.decode("ascii", "replace")))
        async with self.redis.pipeline(transaction=False) as pipe:
            for life in listed:
                pipe.exists(self._key(life))
            there = await pipe.execute()
        gone = [life for life, alive in zip(listed, there, strict=True) if not alive]
        self._seen = frozenset(listed) - frozenset(gone) | {self.life}
        if gone:
            await self.awaited(self.redis.srem(roster, *gone))

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S), self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(self._key(self.life))
                pipe.srem(f"{self.prefix}:routers", self.life)
                await pipe.execute()
        except (RedisError, OSError, TimeoutError):
            pass  # the lease runs out by itself

    def _key(self, life: str) -> str:
        return f"{self.prefix}:router:{life}"

    @staticmethod
    async def awaited(answer: Any) -> Any:
        """redis-py types one command for its blocking and its asyncio client together."""
        return await answer


def _is_life(text: str) -> bool:
    return len(text) == 16 and all(c in "0123456789abcdef" for c in text)
