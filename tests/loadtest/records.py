"""Records made up for tests of what is computed from them."""

from __future__ import annotations

import random
from typing import Any

from loadtest.record import Outcome, Own, Record, Sample, judge
from loadtest.scenario import load


def outcome(number: int = 0, due_s: float = 0.0, ttft_s: float | None = 0.1, **more: Any) -> Outcome:
    """A whole answer of 5 tokens, 10 ms apart, unless it is said otherwise."""
    first = None if ttft_s is None else due_s + ttft_s
    fields: dict[str, Any] = {
        "traffic": "chat",
        "number": number,
        "turn": 0,
        "tenant": "",
        "due_s": due_s,
        "sent_s": due_s,
        "first_s": first,
        "last_s": None if first is None else first + 0.04,
        "ended_s": due_s + 0.05 + (ttft_s or 0.0),
        "gaps_ms": [10.0] * 4,
        "status": 200,
        "prompt_tokens": 128,
        "answer_tokens": 5,
    }
    return Outcome(**(fields | more))


def a_run(seed: int = 1, slower: float = 1.0) -> Record:
    """A minute of smoke as it might have been, with something of everything."""
    rng = random.Random(seed)
    outcomes = []
    for n in range(120):
        due = 60 * (n / 120) ** 0.6
        tokens = rng.choice((128, 512, 1024, 4096))
        ttft = slower * (0.05 + tokens / 2000 + 2.0 * (n / 120) ** 4) * rng.uniform(0.8, 1.3)
        parts = {"receive": 1.0, "tokenize": 3.0, "prefill": ttft * 700, "prefill compute": ttft * 500, "transfer": 9.0}
        outcomes.append(
            outcome(
                n,
                due,
                ttft,
                prompt_tokens=tokens,
                cached_tokens=tokens - 64 if n % 5 == 0 else 0,
                timeline=parts,
                asked=str(n // 2),
                answer=str(n // 2),
                traffic="agents" if tokens == 4096 else "chat",
            )
        )
    outcomes[3].error, outcomes[3].message = "503 overloaded", "too much at once"
    outcomes[9].hung_up = True
    judge(outcomes)
    samples = [
        Sample(
            at_s=float(second),
            worker=f"{role}-0",
            role=role,
            pages={"free": 900 - second, "used": second % 7, "cached": second, "quarantined": 0},
            read_bytes=second * 1_000_000,
        )
        for second in range(60)
        for role in ("prefill", "decode")
    ]
    return Record(
        scenario=load("smoke"),
        about={"commit": "0123abc", "machine": "a machine", "server": "http://127.0.0.1:1"},
        seconds=63.0,
        outcomes=outcomes,
        samples=samples,
        own=Own(
            events=600,
            overhead_us={"0.5": 90.0, "0.99": 800.0, "1.0": 2000.0},
            late_ms={"0.5": 0.1, "0.99": 1.0, "1.0": 2.0},
            lag_ms={"0.5": 0.1, "0.99": 1.0, "1.0": 2.0},
            cpu_share=0.02,
        ),
        strikes=[{"at_s": 30.0, "strike": "decode-killed", "told": "decode-0 (pid 1) got SIGKILL"}],
        pages="decode-0: full 900 free + 60 cached = 960",
        pages_balanced=True,
    )
