"""One request's time, cut into parts that lie end to end: from its first byte to its first token, and on to its last.

Everything is measured on this router's monotonic clock, so the parts sum to the time to first token whatever happened
on the way. What happened inside a worker comes as durations that the worker measured on its own clock, and only divides
the time that the router has seen pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from router.attempts import Placed, RelayEvent, Said
from wire.types import Admitted, FirstTokenTimes, Progress, Tokens

PARTS = ("receive", "tokenize", "queue", "route", "retry", "admit", "prefill", "transfer", "first_decode")
"""What the time to first token consists of, in order.

receive       until the body is whole
tokenize      until the body is token ids and their page digests, waiting for a thread included
queue         until the router takes the request on
route         until the first pair of workers is chosen
retry         until the last pair is chosen; nothing but for attempts that failed
admit         until the decode worker has set room aside
prefill       until the last offer of pages reaches the decode worker, transfers that computing hides included
transfer      until the last page is verified there: what computing did not hide
first_decode  until the first token is handed to the client's stream
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """How far a prompt has come; llama.cpp's `prompt_progress`, and the time it will still take."""

    total: int  # prompt tokens
    cached: int  # of them, found in a cache
    processed: int  # of them, computed or found
    time_s: float  # since computing began
    left_s: float | None  # until the prompt is done, should the rest take as long for each token; None: too early

    def to_json(self) -> dict[str, int | float | None]:
        return {
            "total": self.total,
            "cache": self.cached,
            "processed": self.processed,
            "time_ms": _ms(self.time_s),
            "eta_ms": None if self.left_s is None else _ms(self.left_s),
        }


@dataclass(slots=True)
class Timeline:
    """Fed with moments as they pass, in monotonic seconds; reads as parts once the first token is out."""

    arrived: float
    _ends: dict[str, float] = field(default_factory=dict)
    _attempt: int = 0
    _admitted: float | None = None
    _seen_token: float | None = None
    _times: FirstTokenTimes | None = None
    _progress: Progress | None = None
    _began_computing: float = 0.0
    first_token: float | None = None
    last_token: float | None = None

    def fork(self) -> Timeline:
        """Another request of the same arrival, which takes its own way from here on."""
        return Timeline(self.arrived, dict(self._ends))

    def ended(self, part: str, now: float) -> None:
        """One of the parts before the relay ended."""
        self._ends[part] = now

    def saw(self, now: float, event: RelayEvent) -> None:
        """An event of the request's relay. Those of attempts that were given up change nothing."""
        if self._seen_token is not None:
            return
        match event:
            case Placed(attempt, _):
                self._ends.setdefault("route", now)
                self._ends["retry"] = now
                self._attempt, self._admitted, self._progress = attempt, None, None
            case Said(attempt, _, said) if attempt == self._attempt:
                match said:
                    case Admitted() if self._admitted is None:
                        self._admitted = now
                    case Progress():
                        if self._progress is None:
                            self._began_computing = now
                        self._progress = said
                    case Tokens():
                        self._seen_token, self._times = now, said.times

    def delivered(self, now: float) -> bool:
        """Tokens reached the client's stream. Whether they were the first."""
        self.last_token = now
        if self.first_token is not None:
            return False
        self.first_token = now
        return True

    def progress(self, now: float) -> PromptProgress | None:
        """None before the prefill worker told of any."""
        told = self._progress
        if told is None:
            return None
        # No decode worker has a token before the prompt is done, whatever has been told of it.
        done = told.total if self._seen_token is not None else told.done
        took, computed = now - self._began_computing, done - told.cached
        left_s = None
        if done >= told.total:
            left_s = 0.0
        elif computed > 0:
            left_s = took / computed * (told.total - done)
        return PromptProgress(
            total=told.total, cached=told.cached, processed=done, time_s=max(0.0, took), left_s=left_s
        )

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    def parts(self) -> Iterator[tuple[str, float, float]]:
        """(part, its begin, its end), without gaps from the arrival to the first token; nothing before that."""
        if self.first_token is None:
            return
        begin = self.arrived
        for part, end in self._part_ends(self.first_token):
            end = min(max(begin, end), self.first_token)
            yield part, begin, end
            begin = end

    def begun(self) -> Iterator[tuple[str, float]]:
        """(part, its begin) of the parts so far, the one that lasts included; `tokens` is what follows the first."""
        if self.first_token is not None:
            for part, begin, _ in self.parts():
                yield part, begin
            yield "tokens", self.first_token
            return
        begin = self.arrived
        for part in (*PARTS[:6], "prefill"):
            yield part, begin
            end = self._admitted if part == "admit" else self._ends.get(part)
            if end is None:
                return
            begin = max(begin, end)

    def _part_ends(self, first_token: float) -> Iterator[tuple[str, float]]:
        for part in PARTS[:5]:
            yield part, self._ends.get(part, 0.0)
        admitted = self._admitted if self._admitted is not None else 0.0
        yield "admit", admitted
        times = self._times
        if times is None:  # an older worker: all it took counts as prefill
            yield "prefill", first_token if self._seen_token is None else self._seen_token
            yield "transfer", 0.0
        else:
            # Counted back from the first token: on the way to it the two messages took about as long as each other,
            # and what they did not is in prefill, which is the longest.
            landed = (first_token if self._seen_token is None else self._seen_token) - times.emit_us / 1e6
            yield "prefill", landed - times.transfer_us / 1e6
            yield "transfer", landed
        yield "first_decode", first_token

    def to_json(self) -> dict[str, float | dict[str, float]]:
        """Milliseconds: each part, their sum, and what came after it. `prefill_worker` divides `prefill_ms`."""
        if self.first_token is None or self.last_token is None:
            return {}
        body: dict[str, float | dict[str, float]] = {"ttft_ms": _ms(self.first_token - self.arrived)}
        for part, begin, end in self.parts():
            body[f"{part}_ms"] = _ms(end - begin)
        body["tokens_ms"] = _ms(self.last_token - self.first_token)
        if self._times is not None:
            told = self._times.prefill
            body["prefill_worker"] = {"queue_ms": told.queue_us / 1e3, "compute_ms": told.compute_us / 1e3}
        return body


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
