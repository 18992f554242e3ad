"""One prompt of 900,000 tokens through a whole cluster: router, prefill, NIXL, decode; then a follow-up on it.

The prompt is made of fixed random token ids. While the prefill worker computes, its record says how far it is; what
was computed is kept band by band, so that a run that ends early has still measured something.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from rich.console import Console

from bench.cluster import BYTE_TOKENS, Answer, Cluster, cluster
from bench.record import append_rows, commit, load, machine
from engine.config import KvLayout
from wire.errors import PenumbraError

ANSWER = 128
FOLLOW_UP = 4096
MEMORY_BOUND = 8 << 30
"""Resident bytes all processes together may take on a CPU; CUDA alone takes gigabytes of each."""
BANDS = 9
POLL_S = 2.0


def run(
    *,
    tokens: int = 900_000,
    threads: int = 2,
    layout: KvLayout = "v4",
    kv_memory_bytes: int = 1 << 30,
    device: Literal["cpu", "cuda"] = "cpu",
    budget_minutes: float = 90.0,
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure, print as it goes and append each row to bench/results/long.csv, of a GPU to long-gpu.csv.

    `prefill` rows say tokens/s by depth, `answer` and `follow-up` rows the whole wait (TTFT), what of it was exposed
    transfer, bytes moved and how fast a read of them was on average, the mean step of decoding, and what a token of the
    answer took the client. Raises PenumbraError when the answer was not there in time or memory went over the bound.
    """
    console = console or Console()
    rng = random.Random(0)
    prompt = [rng.randrange(*BYTE_TOKENS) for _ in range(tokens)]
    rows: list[dict[str, object]] = []

    def keep(kind: str, first: int, last: int, seconds: float, answer: Answer | None, **more: object) -> None:
        row: dict[str, object] = {
            "kind": kind,
            "from_token": first,
            "to_token": last,
            "seconds": round(seconds, 1),
            "tok_s": round((last - first) / seconds, 1),
            "cached_tokens": answer.cached_tokens if answer else "",
            "exposed_ms": more.get("exposed_ms", ""),
            "moved_mb": more.get("moved_mb", ""),
            "decode_step_ms": more.get("decode_step_ms", ""),
            "tpot_ms": more.get("tpot_ms", ""),
            "transfer_gb_s": more.get("transfer_gb_s", ""),
            "resident_mb": " ".join(f"{name}={size >> 20}" for name, size in ours.most_resident_bytes().items()),
            "threads": threads,
            "kv_layout": layout,
            "load_1m": load(),
            "device": "cpu" if device == "cpu" else gpu_name(),
        }
        rows.append(row)
        console.print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), highlight=False)
        if save:
            append_rows("long" if device == "cpu" else "long-gpu", [row])

    def decode_figures() -> tuple[float, ...]:
        """Steps and their seconds, as the worker counts them (a client on a busy machine sees tokens in bunches);
        seconds exposed, bytes moved, seconds of the reads that moved them.
        """
        seconds = "penumbra_step_time_seconds"
        names = f"{seconds}_count", f"{seconds}_sum", "penumbra_kv_transfer_seconds_sum"
        steps, step_s, read_s = (ours.metric("decode", name) for name in names)
        return steps, step_s, ours.exposed_s(), ours.moved_bytes(), read_s

    def asked(kind: str, words: list[int], follow: bool) -> Answer:
        before = decode_figures()
        waiting = pool.submit(ours.ask, words, ANSWER)
        if follow:
            _watch(ours, tokens, budget_minutes * 60, waiting, keep)
        answer = waiting.result()
        steps, step_s, exposed_s, moved, read_s = (
            now - then for now, then in zip(decode_figures(), before, strict=True)
        )
        keep(
            kind,
            answer.cached_tokens,
            len(words),
            answer.ttft_s,
            answer,
            exposed_ms=round(exposed_s * 1e3, 1),
            moved_mb=round(moved / 1e6, 1),
            decode_step_ms=round(step_s / steps * 1e3, 2),
            tpot_ms=round((answer.total_s - answer.ttft_s) / (len(answer.tokens) - 1) * 1e3, 2),
            transfer_gb_s=round(moved / read_s / 1e9, 3) if read_s else "",
        )
        return answer

    console.print(
        f"{machine()}; {threads} threads; on {device}; kv_layout {layout}; commit {commit()}", highlight=False
    )
    flags = ("--device", device, "--threads", str(threads), "--kv-layout", layout, "--kv-memory", str(kv_memory_bytes))
    # The cluster goes first, and with it whatever is still being waited for.
    with ThreadPoolExecutor(1) as pool, cluster(*flags, "--max-requests", "8") as ours:
        ours.ask(prompt[-300:])  # connects the pair
        answer = asked("answer", prompt, follow=True)
        more = [rng.randrange(*BYTE_TOKENS) for _ in range(FOLLOW_UP)]
        asked("follow-up", [*prompt, *answer.tokens, *more], follow=False)
        resident = sum(ours.most_resident_bytes().values())
    console.print(f"{resident / 1e9:.2f} GB resident at most, all processes together", highlight=False)
    if device == "cpu" and resident > MEMORY_BOUND:
        raise PenumbraError(f"{resident:,} bytes were resident, more than {MEMORY_BOUND:,}.")
    return rows


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _watch(ours: Cluster, tokens: int, budget_s: float, waiting: Future[Answer], keep: Callable[..., object]) -> None:
    """Keep a row for each band of the prompt, until its answer is there. Raises PenumbraError at the budget's end."""
    began = since = time.perf_counter()
    band, start = -(-tokens // BANDS), 0
    while not waiting.done():
        time.sleep(POLL_S)
        now = time.perf_counter()
        # A worker's record is as old as its last heartbeat, a second at most.
        if ours.workers("prefill"):
            done = tokens - sum(worker["queued_tokens"] for worker in ours.workers("prefill"))
            if start + band <= done < tokens:
                keep("prefill", start, done, now - since, None)
                since, start = now, done
        if now - began > budget_s:
            raise PenumbraError(f"no answer after {budget_s / 60:g} minutes; {start:,} of {tokens:,} tokens were kept.")
