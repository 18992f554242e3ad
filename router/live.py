"""The requests of this router, as the front page and /fleet tell of them: who is in flight, who has just ended.

Serving a request costs this nothing but its entry and a few counts; whoever looks does the work, once for everybody.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from router.relay import Relay, RelayRequest
from wire.errors import PenumbraError

MOST_ENDED = 512
"""Ended requests that are remembered: what latencies and hit rates of late are taken from."""

Phase = tuple[str, float]
"""A phase's name and when it began, seconds after the request arrived."""


@dataclass(slots=True, kw_only=True, eq=False)
class Live:
    """One request on its way. Times are monotonic seconds."""

    request: RelayRequest
    arrived: float
    feed: Relay | None = None  # once it is being relayed
    first_token: float | None = None
    last_token: float | None = None
    generated_tokens: int = 0

    def tokens(self, now_s: float, num_tokens: int) -> None:
        """So many more have been delivered."""
        if self.first_token is None:
            self.first_token = now_s
        self.last_token = now_s
        self.generated_tokens += num_tokens

    def told(self) -> Told:
        """How it stands now."""
        feed, placement = self.feed, self.feed and self.feed.placement
        prompt_tokens = len(self.request.prompt)
        phases: list[Phase] = [("queue", 0.0)]
        if feed is not None and feed.placed_at is not None:
            phases.append(("prefill", feed.placed_at - self.arrived))
        if self.first_token is not None:
            phases.append(("decode", self.first_token - self.arrived))
        return Told(
            request_id=self.request.request_id,
            arrived=self.arrived,
            prefill=placement.prefill.worker_id if placement and placement.prefill else "",
            decode=placement.decode.worker_id if placement else "",
            attempt=feed.attempts if feed else 0,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(feed.progress.cached, prompt_tokens) if feed and feed.progress else 0,
            done_tokens=min(feed.progress.done, prompt_tokens) if feed and feed.progress else 0,
            generated_tokens=self.generated_tokens,
            max_tokens=self.request.sampling.max_tokens,
            phases=tuple(phases),
            ttft_s=None if self.first_token is None else self.first_token - self.arrived,
            tpot_s=self._tpot_s(),
        )

    def _tpot_s(self) -> float | None:
        if self.first_token is None or self.last_token is None or self.generated_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.generated_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A request at one moment. `arrived` is monotonic seconds, `ended_s` seconds after it."""

    request_id: str
    arrived: float
    prefill: str
    decode: str
    attempt: int
    prompt_tokens: int
    cached_tokens: int
    done_tokens: int  # of the prompt, computed or found
    generated_tokens: int
    max_tokens: int
    phases: tuple[Phase, ...]
    ttft_s: float | None = None
    tpot_s: float | None = None
    ended_s: float | None = None
    failed: str = ""  # error code


@dataclass(slots=True)
class LiveRequests:
    """Written by running answers, read by the board; both on the event loop."""

    flying: dict[str, Live] = field(default_factory=dict)
    ended: deque[Told] = field(default_factory=lambda: deque(maxlen=MOST_ENDED))
    num_ended: int = 0
    ended_generated_tokens: int = 0
    ended_computed_tokens: int = 0  # prompt tokens

    @contextlib.contextmanager
    def follow(self, request: RelayRequest, arrived: float) -> Iterator[Live]:
        """The request is in flight while inside; how it left says how it ended."""
        live = self.flying[request.request_id] = Live(request=request, arrived=arrived)
        failed = "cancelled"
        try:
            yield live
            failed = ""
        except PenumbraError as error:
            failed = error.code
            raise
        finally:
            del self.flying[request.request_id]
            self._end(live, failed)

    def _end(self, live: Live, failed: str) -> None:
        told = live.told()
        self.num_ended += 1
        self.ended_generated_tokens += told.generated_tokens
        self.ended_computed_tokens += told.done_tokens - told.cached_tokens
        self.ended.append(replace(told, ended_s=time.monotonic() - live.arrived, failed=failed))
