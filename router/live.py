"""The requests of this router, as the front page and /fleet tell of them: who is in flight, who has just ended.

Serving a request costs this nothing but its entry and a few counts; whoever looks does the work, once for everybody.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from router.attempts import RelayRequest
from router.relay import Relay
from router.timeline import Timeline
from wire.errors import PenumbraError

MOST_ENDED = 512
"""Ended requests that are remembered: what latencies and hit rates of late are taken from."""

BRIEF_S = 1e-4
"""A phase shorter than this is none that anybody could see."""

Phase = tuple[str, float]
"""A phase's name and when it began, seconds after the request arrived."""


@dataclass(slots=True, kw_only=True, eq=False)
class Live:
    """One request on its way."""

    request: RelayRequest
    timeline: Timeline
    feed: Relay | None = None  # once it is being relayed
    generated_tokens: int = 0

    def told(self) -> Told:
        """How it stands now."""
        feed, line = self.feed, self.timeline
        placement = feed.placement if feed is not None else None
        progress = line.progress(time.monotonic())
        tpot_s = None
        if line.first_token is not None and line.last_token is not None and self.generated_tokens > 1:
            tpot_s = (line.last_token - line.first_token) / (self.generated_tokens - 1)
        return Told(
            request_id=self.request.request_id,
            arrived=line.arrived,
            prefill=placement.prefill.worker_id if placement and placement.prefill else "",
            decode=placement.decode.worker_id if placement else "",
            attempt=feed.attempts if feed else 0,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=progress.cached if progress else 0,
            done_tokens=progress.processed if progress else 0,
            generated_tokens=self.generated_tokens,
            max_tokens=self.request.sampling.max_tokens,
            phases=tuple(_visible([(part, begin - line.arrived) for part, begin in line.begun()])),
            ttft_s=line.ttft,
            tpot_s=tpot_s,
        )


def _visible(phases: list[Phase]) -> Iterator[Phase]:
    """Without those that ended as they began."""
    for (part, begin), after in zip(phases, [*phases[1:], None], strict=True):
        if after is None or after[1] - begin >= BRIEF_S:
            yield part, begin


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
    def follow(self, request: RelayRequest, timeline: Timeline) -> Iterator[Live]:
        """The request is in flight while inside; how it left says how it ended."""
        live = self.flying[request.request_id] = Live(request=request, timeline=timeline)
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
        self.ended.append(replace(told, ended_s=time.monotonic() - live.timeline.arrived, failed=failed))
