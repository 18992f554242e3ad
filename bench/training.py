"""Training speed: tokens/s of a run file's first steps on this machine, and what share of its peak that is."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bench.record import append_rows, commit, load, machine
from training.config import load_config
from training.data import Batch
from training.group import Group
from training.initial import initial_model
from training.loop import Trainer


def run(
    run_file: Path,
    *,
    steps: int = 3,
    stage: int = 0,
    threads: int = 2,
    peak_tflops: float = 0.0,
    console: Console | None = None,
    save: bool = True,
) -> dict[str, object]:
    """Take `steps` steps of one stage over random tokens, after one to warm up; a row for bench/results/training.csv.

    peak_tflops  of the device at the run's dtype, such as 989 for an H200 in bfloat16; 0: MFU is not told
    MFU counts the products of forward and backward pass, recomputation left out.
    """
    console = console or Console()
    config = load_config(run_file)
    chosen = config.stages[stage]
    config = replace(config, stages=(replace(chosen, steps=steps + 2),), threads=threads)
    torch.set_num_threads(threads)
    trainer = Trainer(config, initial_model(config.model.config(), config.seed, config.device), Group())
    generator = torch.Generator().manual_seed(0)
    shape = (chosen.sequences, chosen.sequence_tokens + 2)
    batch = Batch(torch.randint(3, config.model.vocab_size, shape, generator=generator), torch.ones(shape))
    trainer.take(batch)
    speeds = [trainer.take(batch).tokens_per_s for _ in range(steps)]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped}) as counted:
        sums = torch.zeros(2, dtype=torch.float64, device=config.device).add_(batch.weights.numel())
        part = min(chosen.sequences, chosen.micro_sequences or chosen.sequences)
        few = batch.rows(0, part)
        numerics = replace(trainer.numerics(), recompute=False)
        loss, *_ = trainer.losses(few.ids.to(config.device), few.weights.to(config.device), numerics, sums, 1)
        loss.backward()
    flops = counted.get_total_flops() / (part * chosen.sequence_tokens)
    speed = statistics.median(speeds)
    row: dict[str, object] = {
        "run": run_file.stem,
        "stage": stage,
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
        "threads": threads,
        "dtype": config.dtype,
        "sequence_tokens": chosen.sequence_tokens,
        "sequences": chosen.sequences,
        "tokens_per_s": round(speed, 1),
        "mflop_per_token": round(flops / 1e6, 1),
        "mfu": round(speed * flops / peak_tflops / 1e12, 4) if peak_tflops else "",
        "load": load(),
    }
    console.print(
        f"{speed:,.0f} tokens/s, {flops / 1e6:,.0f} MFLOP a token, {speed * flops / 1e12:.3f} TFLOP/s"
        + (f", MFU {float(str(row['mfu'])):.1%}" if peak_tflops else "")
    )
    console.print(
        f"{machine()}; {row['device']}; {threads} threads; {config.dtype}; load {row['load']}; commit {commit()}"
    )
    if save:
        console.print(f"row added to {append_rows('training', [row])}")
    return row


def _grouped(a_shape: torch.Size, b_shape: torch.Size, *_: object, **__: object) -> int:
    """Multiply-adds of a grouped product count twice: [M, K] by G of [K, N], or [K, M] by [M, N] in G parts of M."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]
