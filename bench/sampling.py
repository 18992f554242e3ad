"""What each sampling option costs at batch 32, in microseconds and as a share of a decode step.

Steps are those of the small model that `penumbra bench engine` uses, with its 8,192 tokens of vocabulary; they are far
shorter than a real model's. The option's own cost is measured on the sampler alone, there and at DeepSeek-V4's 129,280.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.engine import write_benchmark_model
from bench.record import append_rows, commit, load, machine
from engine.batch import Segment, Sequence
from engine.config import EngineConfig
from engine.constraint import Grammars
from engine.kernels.sample import sample
from engine.model.tiny import tokenizer_json
from engine.runner import Runner
from engine.sampler import Draws
from wire.types import SamplingParams

BATCH = 32
ANSWER_TOKENS = 500
"""Already in each answer, for penalties to count."""
REAL_VOCAB = 129_280

SCHEMA = {"type": "array", "items": {"type": "string"}, "x-guidance": {"whitespace_flexible": False}}
OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "all filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias of 300": {"temperature": 0.0, "logit_bias": tuple((i, 1.0) for i in range(300))},
    "min_tokens": {"temperature": 0.0, "min_tokens": 10_000},
    "20 logprobs": {"temperature": 0.0, "logprobs": True, "top_logprobs": 20},
    "json schema": {"temperature": 0.0, "grammar": f"start: %json {json.dumps(SCHEMA)}"},
}


def median_us(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def sampler_us(params: SamplingParams, vocab_size: int, grammars: Grammars, repeats: int) -> float:
    """Rows and draws of one step, the logits being there."""
    rng = np.random.default_rng(0)
    # The n-th most likely token has a share of n^-1.5, much as in text.
    ranks = np.stack([rng.permutation(vocab_size) for _ in range(BATCH)]) + 1
    logits = (-1.5 * np.log(ranks)).astype(np.float32)
    draws = []
    for i in range(BATCH):
        # A grammar's answers begin here; any other may be in the middle of one.
        answer = [] if params.grammar else rng.integers(3, vocab_size, ANSWER_TOKENS).tolist()
        sequence = Sequence(
            request_id="", sampling=replace(params, seed=i), slot=i + 1, prompt=range(3, 3 + 256), answer=answer
        )
        draws.append(Draws(sequence, (1,), grammars))
    return median_us(lambda: sample(logits, [d.row(900, ANSWER_TOKENS) for d in draws]), repeats)


def step_us(model: Path, threads: int, repeats: int) -> float:
    """A greedy decode step of 32 sequences at position 200."""
    runner = Runner.load(EngineConfig(model=model, threads=threads, max_requests=BATCH + 1, kv_memory_bytes=512 << 20))
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0)
    pools = runner.pools
    sequences = [
        Sequence(
            request_id="",
            sampling=greedy,
            slot=pools.slots.allocate(1)[0],
            pages=pools.full.allocate(1),
            swa_pages=pools.swa.allocate(1),
        )
        for _ in range(BATCH)
    ]
    for sequence in sequences:
        runner.run([Segment(sequence=sequence, start=0, tokens=list(range(3, 203)), sample=False)])
    # The same position each time: a step writes the same rows again.
    step = [Segment(sequence=sequence, start=200, tokens=[7], sample=True) for sequence in sequences]
    return median_us(lambda: runner.run(step), repeats)


def run(threads: int, repeats: int, save: bool = True) -> list[dict[str, object]]:
    console = Console()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_benchmark_model(Path(directory) / "model")
        (model / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        step = step_us(model, threads, repeats)
        small, real = Grammars(model, 8192, (1,)), Grammars(model, REAL_VOCAB, (1,))
        for name, options in OPTIONS.items():
            params = SamplingParams(**({"max_tokens": 1 << 20, "seed": 0} | options))  # type: ignore[arg-type]
            rows.append(
                {
                    "option": name,
                    "batch": BATCH,
                    "step_us": round(step),
                    "sampler_us": round(sampler_us(params, 8192, small, repeats)),
                    "sampler_129280_us": round(sampler_us(params, REAL_VOCAB, real, max(3, repeats // 4))),
                    "load": load(),
                }
            )
    greedy = int(str(rows[0]["sampler_us"]))
    table = Table("option", "sampler µs", "more than greedy, of a step", "sampler µs, V=129,280")
    for row in rows:
        share = (int(str(row["sampler_us"])) - greedy) / step
        table.add_row(str(row["option"]), str(row["sampler_us"]), f"{share:.1%}", str(row["sampler_129280_us"]))
    console.print(table)
    console.print(f"batch {BATCH}; greedy step {step:,.0f} µs; {machine()}; {threads} threads; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('sampling', rows)}")
    return rows
