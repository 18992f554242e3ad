"""Streamed answers and their reference. A thread for each client, as a client has a process for itself."""

from __future__ import annotations

import copy
import json
import random
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from chaos.cluster import ChaosFailed

SILENCE_S = 120.0
"""A client's patience with a silent connection: what waits longer counts as a hang."""


Headers = Mapping[str, str]
NO_HEADERS: Headers = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer is determined by it."""

    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    seed: int


@dataclass(slots=True)
class Outcome:
    """What a client saw. `gaps_s` are the times between two pieces that brought tokens, the first one's excluded."""

    ids: list[int] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    status: int = 0
    error: str = ""
    reason: str = ""
    done: bool = False  # [DONE] came
    seconds: float = 0.0
    first_s: float = 0.0  # to the first token
    retry_after_s: float = 0.0

    @property
    def longest_s(self) -> float:
        return max(self.gaps_s, default=0.0)


def asks(count: int, *, prompt_tokens: Sequence[int], max_tokens: Sequence[int], vocab: int, seed: int) -> list[Ask]:
    """Requests of these sizes in turn, all different, from one seed."""
    rng = random.Random(seed)
    return [
        Ask(
            tuple(rng.randrange(3, vocab) for _ in range(prompt_tokens[i % len(prompt_tokens)])),
            max_tokens[i % len(max_tokens)],
            rng.randrange(1 << 30),
        )
        for i in range(count)
    ]


def answer(
    url: str,
    model: str,
    ask: Ask,
    on_token: Callable[[int], bool] = lambda count: True,
    *,
    headers: Headers = NO_HEADERS,
    salt: str = "",
) -> Outcome:
    """Stream one answer to its end, whatever that is. `on_token(tokens so far)` returning False hangs up.

    Without a `salt`, no answer finds pages of an earlier one: each is in a part of the caches of its own.
    """
    body = {
        "model": model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "seed": ask.seed,
        "temperature": 0.8,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt or secrets.token_hex(8),
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", data=json.dumps(body).encode(), headers={"content-type": "application/json", **headers}
    )
    out, began = Outcome(), time.monotonic()
    last: float | None = None
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as reply:
            out.status = reply.status
            for raw in reply:
                if not raw.startswith(b"data: "):
                    continue
                if raw.startswith(b"data: [DONE]"):
                    out.done = True
                    continue
                event = json.loads(raw[6:])
                if "error" in event:
                    out.error = f"{event['error'].get('code')}: {event['error'].get('message')}"
                    continue
                for choice in event.get("choices", ()):
                    if fresh := choice.get("token_ids"):
                        now = time.monotonic()
                        if last is None:
                            out.first_s = now - began
                        else:
                            out.gaps_s.append(now - last)
                        last = now
                        out.ids += fresh
                    out.reason = choice.get("finish_reason") or out.reason
                if not on_token(len(out.ids)):
                    out.error = "hung up"
                    break
    except urllib.error.HTTPError as error:
        out.status, out.error = error.code, error.read().decode(errors="replace")[:300]
        out.retry_after_s = float(error.headers.get("retry-after") or 0)
    except (OSError, ValueError) as error:
        out.error = f"{type(error).__name__}: {error}"
    out.seconds = time.monotonic() - began
    return out


@dataclass(slots=True)
class Verdict:
    """How many of a set of streams were what they should have been."""

    streams: int = 0
    lost: int = 0  # no answer, or not all of it
    doubled: int = 0  # more tokens than there should be
    altered: int = 0  # other tokens
    why: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest of each stream

    def add(self, other: Verdict) -> None:
        self.streams += other.streams
        self.lost, self.doubled, self.altered = (
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.altered + other.altered,
        )
        self.why += other.why
        self.gaps_s += other.gaps_s

    def judge(self, reference: Sequence[int], seen: Outcome) -> None:
        self.streams += 1
        self.gaps_s.append(seen.longest_s)
        n = len(reference)
        if seen.ids == list(reference) and seen.done and seen.reason == "length":
            return
        if len(seen.ids) > n:
            self.doubled += 1
        elif seen.ids != list(reference[: len(seen.ids)]):
            self.altered += 1
        else:
            self.lost += 1
        self.why.append(f"{len(seen.ids)} of {n} tokens, status {seen.status}, {seen.error or 'no error'}")

    @property
    def bad(self) -> int:
        return self.lost + self.doubled + self.altered

    def gap(self, share: float) -> float:
        """The gap that `share` of the streams stayed below, in seconds."""
        ordered = sorted(self.gaps_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Reference:
    """Requests and what a cluster says to them when nothing happens to it."""

    def __init__(self, url: str, model: str, questions: Sequence[Ask], clients: int) -> None:
        """Asks them all once. Raises ChaosFailed when an answer is not whole."""
        self.url, self.model = url, model
        with ThreadPoolExecutor(clients) as pool:
            seen = list(pool.map(lambda ask: answer(url, model, ask), questions))
        for ask, one in zip(questions, seen, strict=True):
            if len(one.ids) != ask.max_tokens or not one.done:
                raise ChaosFailed(f"Undisturbed, an answer ended after {len(one.ids)} tokens: {one.error}")
        self._answers = {ask: one.ids for ask, one in zip(questions, seen, strict=True)}
        self.questions = list(questions)

    def at(self, url: str) -> Self:
        """The same questions and answers for another cluster of the same model."""
        other = copy.copy(self)
        other.url = url
        return other

    def of(self, ask: Ask) -> list[int]:
        return self._answers[ask]

    def run(
        self, questions: Sequence[Ask], clients: int, on_token: Callable[[Ask, int], bool] = lambda ask, count: True
    ) -> tuple[Verdict, list[Outcome]]:
        """Ask them, so many at a time, and compare."""

        def one(ask: Ask) -> Outcome:
            return answer(self.url, self.model, ask, lambda count: on_token(ask, count))

        verdict = Verdict()
        with ThreadPoolExecutor(clients) as pool:
            seen = list(pool.map(one, questions))
        for ask, outcome in zip(questions, seen, strict=True):
            verdict.judge(self.of(ask), outcome)
        return verdict, seen
