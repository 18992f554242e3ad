"""What a run saw, as plain data: written to `record.json`, read back for a report or a comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.scenario import Scenario, ScenarioError, parse

VERSION = 1

UNFINISHED, SILENCE = "unfinished", "silence"
"""Errors of requests that waited until the run's end, and until their client lost its patience."""
IN_VAIN = (UNFINISHED, SILENCE, "queue_timeout")
"""Errors that end a wait: theirs was at least so long, and belongs to the latencies."""
REFUSALS = (408, 429, 503, 529)
REFUSAL_CODES = ("queue_timeout", "overloaded", "overloaded_error", "rate_limit_exceeded", "slow_down",
                 "server_is_overloaded")  # fmt: skip
"""What a server says that has too much to do: as a status, or in a stream that has begun, as its error's code."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request. Seconds count from the run's start; `due_s` is when it was meant to be sent, whenever it was."""

    traffic: str
    number: int
    turn: int
    tenant: str
    due_s: float
    sent_s: float = 0.0
    first_s: float | None = None  # the first piece with text (or tokens)
    last_s: float | None = None  # the last one
    ended_s: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)  # between two pieces of the answer
    status: int = 0
    error: str = ""  # its kind; empty: none
    message: str = ""
    hung_up: bool = False  # as this client was meant to
    slow: bool = False
    prompt_tokens: int = 0  # as the server counted; 0: it did not tell
    cached_tokens: int = 0
    answer_tokens: int = 0
    timeline: dict[str, float] = field(default_factory=dict)  # part -> ms, as the server tells
    expect: str = ""
    asked: str = ""  # digest of all that the request said
    answer: str = ""  # digest of the answer, of its token ids where the server tells them
    right: bool | None = None  # whether the answer holds what was expected
    same: bool | None = None  # whether it is what the same request got before

    @property
    def refused(self) -> bool:
        """Whether the server said that it has too much to do."""
        return bool(self.error) and (self.status in REFUSALS or self._code in REFUSAL_CODES)

    @property
    def _code(self) -> str:
        return self.error.rpartition(" ")[2]

    @property
    def whole(self) -> bool:
        return not self.error and not self.hung_up

    @property
    def counts(self) -> bool:
        """Whether its times say something of the server: not where the client was meant to leave or to dawdle."""
        return not self.hung_up and not self.slow

    @property
    def ttft_ms(self) -> float | None:
        """From when it was due. Who waited in vain to the end is in it with that wait, which is the least it can be."""
        if self.first_s is None and self._code in IN_VAIN:
            return (self.ended_s - self.due_s) * 1e3
        return None if self.first_s is None else (self.first_s - self.due_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        if self.first_s is None or self.last_s is None or self.answer_tokens < 2 or not self.whole:
            return None
        return (self.last_s - self.first_s) * 1e3 / (self.answer_tokens - 1)


@dataclass(slots=True, kw_only=True)
class Sample:
    """What one worker told of itself, at a moment."""

    at_s: float
    worker: str
    role: str
    pages: dict[str, int]  # state -> pages
    read_bytes: int  # since it began


@dataclass(slots=True, kw_only=True)
class Own:
    """What measuring cost, and how late it was. Milliseconds and microseconds at the quantiles 0.5, 0.99 and 1."""

    events: int = 0
    overhead_us: dict[str, float] = field(default_factory=dict)  # from the kernel's receipt to having been handled
    late_ms: dict[str, float] = field(default_factory=dict)  # sent after it was due
    lag_ms: dict[str, float] = field(default_factory=dict)  # a timer that rang late
    cpu_share: float = 0.0  # of one core, over the run


@dataclass(slots=True, kw_only=True)
class Record:
    scenario: Scenario
    about: dict[str, str]  # commit, machine, server, model, date and whatever else tells where this was
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    own: Own = field(default_factory=Own)
    strikes: list[dict[str, Any]] = field(default_factory=list)  # {at_s, strike, told}
    pages: str = ""  # how the accounting of pages ended; empty: the server does not tell of pages
    pages_balanced: bool | None = None

    def save(self, path: Path) -> None:
        data = asdict(self) | {"version": VERSION, "scenario": self.scenario.model_dump(mode="json")}
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """The record in a file, or in `record.json` of a folder. Raises ScenarioError."""
        path = path / "record.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
            if data.pop("version") != VERSION:
                raise ValueError("it is of another version")
            data["scenario"] = parse(data["scenario"], str(path))
            data["outcomes"] = [Outcome(**one) for one in data["outcomes"]]
            data["samples"] = [Sample(**one) for one in data["samples"]]
            data["own"] = Own(**data["own"])
            return cls(**data)
        except OSError as error:
            raise ScenarioError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ScenarioError(f"{path} is not the record of a load test: {error}.") from error


def judge(outcomes: list[Outcome]) -> None:
    """Mark each whole answer to words that were asked before as the same as the first answer to them, or not."""
    answers: dict[str, str] = {}
    for one in sorted(outcomes, key=lambda outcome: outcome.ended_s):
        if one.whole and one.asked:
            one.same = one.answer == answers[one.asked] if one.asked in answers else None
            answers.setdefault(one.asked, one.answer)
