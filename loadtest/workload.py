"""Who asks what, and when: all of it a function of the scenario and its seed, and nothing of the server's answers.

A traffic's n-th request has a random generator of its own, so it is the same request whatever came before it.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.prose import Prose
from loadtest.scenario import Arrivals, Scenario, Traffic

REPEAT_WITHIN = 16
"""A repeated request repeats one of so many before it, while a cache may still know it."""

NAMES = (
    "Anna", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate",
    "Leo", "Mary", "Noah", "Olive", "Peter", "Rose", "Simon", "Tess", "Will", "Nora",
)  # fmt: skip
TOWNS = (
    "Paris", "London", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Kyoto", "Prague",
    "Vienna", "Dublin", "Boston", "Athens", "Geneva", "Lisbon", "Madrid", "Tokyo", "Berlin", "Havana",
)  # fmt: skip
WORDS = (
    "lantern", "key", "map", "boat", "bell", "coin", "drum", "rope", "kite", "clock",
    "basket", "ladder", "mirror", "flute", "shell", "fox", "owl", "goose", "crow", "swan",
    "forest", "castle", "meadow", "bridge", "harbour", "market", "golden", "silver", "purple", "yellow",
)  # fmt: skip
"""What is hidden: sentences of the form that the bundled model was taught, which any other model can read too."""


def times(arrivals: Arrivals, window_s: float | None, seed: str) -> Iterator[float]:
    """Seconds from the traffic's start at which requests arrive, in order, all below `window_s` if there is one."""
    if arrivals.kind == "once":
        yield from itertools.repeat(0.0, arrivals.count)
        return
    rng = random.Random(seed)
    due, area = 0.0, 0.0
    for n in itertools.count():
        if arrivals.kind == "constant":
            due = n / arrivals.per_s
        elif arrivals.kind == "poisson":
            due += rng.expovariate(arrivals.per_s)
        else:
            area += rng.expovariate(1.0)
            due = _ramp_reaches(area, arrivals, window_s)
        if window_s is not None and due >= window_s:
            return
        yield due


def _ramp_reaches(area: float, ramp: Arrivals, window_s: float | None) -> float:
    """When a rate that goes up or down in a straight line has brought `area` arrivals on average."""
    first, last = ramp.per_s, ramp.to_per_s
    assert last is not None, "a ramp says where it goes"
    assert window_s is not None, "and when it is there"
    slope = (last - first) / window_s
    if abs(slope) < 1e-12:
        return area / first
    inside = first * first + 2 * slope * area
    if inside < 0:  # a falling ramp never brings so many
        return float("inf")
    return 2 * area / (first + math.sqrt(inside))  # the root that keeps its digits when the slope is small


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One arrival: a request, or a session of several turns."""

    traffic: Traffic
    number: int
    due_s: float  # from the run's start
    text_of: int  # the number whose words it says; another's when it repeats that one
    prompt_tokens: int
    tenant: str
    cancel_after_s: float | None
    cancel_after_pieces: int | None
    slow_bytes_per_s: float | None
    think_s: tuple[float, ...]  # before each later turn
    again: bool  # every second turn asks what the one before it asked


def job(scenario: Scenario, traffic: Traffic, number: int, due_s: float) -> Job:
    """The traffic's n-th arrival."""
    seed = f"{scenario.seed}/{traffic.name}"
    text_of = _original(seed, traffic, number)
    words = random.Random(f"{seed}/{text_of}/length")
    rng = random.Random(f"{seed}/{number}/client")
    (length,) = words.choices(traffic.prompt, [one.share for one in traffic.prompt])
    cancelled, slow, tenant = rng.random(), rng.random(), rng.random()
    leaves = traffic.cancel if traffic.cancel and cancelled < traffic.cancel.share else None
    session = traffic.session
    pause = session.think_s if session else 0.0
    return Job(
        traffic=traffic,
        number=number,
        due_s=due_s,
        text_of=text_of,
        prompt_tokens=length.tokens,
        tenant=traffic.tenants[int(tenant * len(traffic.tenants))] if traffic.tenants else "",
        cancel_after_s=leaves.after_s if leaves else None,
        cancel_after_pieces=leaves.after_pieces if leaves else None,
        slow_bytes_per_s=traffic.slow.bytes_per_s if traffic.slow and slow < traffic.slow.share else None,
        again=session is not None and session.again,
        think_s=tuple(rng.expovariate(1 / pause) if pause else 0.0 for _ in range(session.turns - 1 if session else 0)),
    )


def _original(seed: str, traffic: Traffic, number: int) -> int:
    """Whose words the n-th request says: follows repeats of repeats back to the first."""
    while number:
        rng = random.Random(f"{seed}/{number}/repeat")
        if rng.random() >= traffic.repeat_share:
            break
        number = rng.randrange(max(0, number - REPEAT_WITHIN), number)
    return number


@dataclass(frozen=True, slots=True)
class Asked:
    """A user's words, and what a right answer holds; empty where there is nothing to check it by."""

    text: str
    expect: str = ""


class Writer:
    """Words of requests, in the lengths asked for."""

    def __init__(self, scenario: Scenario, prose: Prose, chars_per_token: float) -> None:
        self._seed = scenario.seed
        self._prose = prose
        self._chars_per_token = chars_per_token

    def first(self, job: Job) -> Asked:
        """What a request says, or the first turn of a session."""
        seed = f"{self._seed}/{job.traffic.name}"
        question, expect = self._question(job, 0)
        hidden = [f" {_needle(seed, job.text_of, k)}" for k in range(job.traffic.needles)]
        room = self._chars(job.prompt_tokens) - len(question) - sum(map(len, hidden))
        shared = min(self._chars(job.traffic.session.shared_prefix_tokens), room) if job.traffic.session else 0
        text = self._prose.text(f"{seed}/shared", shared)
        rest = self._prose.text(f"{seed}/{job.text_of}/text", max(1, room - len(text)))
        return Asked(text + _with(rest, hidden, random.Random(f"{seed}/{job.text_of}/depths")) + question, expect)

    def later(self, job: Job, turn: int) -> Asked:
        """What a session's turn (from 1) adds to what was said before."""
        session = job.traffic.session
        assert session is not None, "only sessions have later turns"
        question, expect = self._question(job, turn)
        room = self._chars(session.turn_tokens) - len(question)
        more = self._prose.text(f"{self._seed}/{job.traffic.name}/{job.number}/turn {turn}", max(0, room))
        return Asked(more + question, expect)

    def _question(self, job: Job, turn: int) -> tuple[str, str]:
        if not job.traffic.needles:
            return "\n\nTell how it goes on.", ""
        seed = f"{self._seed}/{job.traffic.name}"
        k = (job.text_of + turn) % job.traffic.needles
        return (
            f"\n\nWhat is the secret word of {_name(k)}?",
            _word(seed, job.text_of, k),
        )

    def _chars(self, tokens: int) -> int:
        return round(tokens * self._chars_per_token)


def named(answer: str) -> str:
    """The first of WORDS that an answer says; empty if it says none. An answer that goes on may say others later."""
    found = re.search(rf"\b({'|'.join(WORDS)})\b", answer, re.IGNORECASE)
    return found[0].lower() if found else ""


def _name(k: int) -> str:
    return f"{NAMES[k % len(NAMES)]} of {TOWNS[(k // len(NAMES) + k) % len(TOWNS)]}"


def _word(seed: str, number: int, k: int) -> str:
    """As many needles as there are words hide different ones."""
    words = random.Random(f"{seed}/{number}/needles").sample(WORDS, len(WORDS))
    return words[k % len(words)]


def _needle(seed: str, number: int, k: int) -> str:
    return f"The secret word of {_name(k)} is {_word(seed, number, k)}."


def _with(text: str, hidden: list[str], rng: random.Random) -> str:
    """`hidden` put into `text`, one in each equal part of it, behind a sentence where there is one near."""
    parts, begin = [], 0
    for k, needle in enumerate(hidden):
        low, high = (len(text) * j // len(hidden) for j in (k, k + 1))
        at = rng.randrange(low, max(low + 1, high))
        stop = text.find(".", at, high)
        at = max(begin, stop + 1 if stop >= 0 else at)
        parts += [text[begin:at], needle]
        begin = at
    return "".join([*parts, text[begin:]])
