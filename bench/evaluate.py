"""What a trained model can do, measured on the engine that serves it.

Perplexity and drafts on text that training never read, beside counting 5-grams with the same tokenizer; needles at
growing distance; JSON; and how far FP4 and FP8 are from the trainer's own weights.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import deepseek_recipe as recipe
import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.record import append_rows, commit, load, machine
from engine.batch import Segment, StepMeta
from engine.batch import Sequence as Running
from engine.config import EngineConfig, KvLayout
from engine.runner import Runner
from engine.window import WindowPages, most_window_pages, num_pages
from training import tasks
from training.config import Data
from training.data import Texts
from training.export import load_run
from training.model import Numerics
from training.ngram import NGram
from wire.errors import ConfigError, PenumbraError
from wire.types import SamplingParams

CHUNK = {"cpu": 256, "cuda": 2048}
"""Tokens of a step, by device."""
WINDOW_TOKENS = 2048
DEPTH = 3
ANSWER_TOKENS = 24
ASKED_S = 2 * 3600.0
"""A cluster on a CPU reads 900,000 tokens in an hour."""
SEED = "held out"


class Engine:
    """One runner, one sequence at a time."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.window = runner, WindowPages(runner.pools.swa)
        self.chunk = CHUNK[runner.model.device.type]

    @contextmanager
    def _sequence(self, prompt: Sequence[int], tokens: int):
        pools = self.runner.pools
        sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0)
        answer: list[int] = []
        sequence = Running(
            request_id="eval", sampling=sampling, slot=pools.slots.allocate(1)[0], prompt=prompt, answer=answer
        )
        self.window.reserve(sequence, most_window_pages(self.chunk))
        try:
            yield sequence, answer
        finally:
            pools.full.release(sequence.pages)
            pools.swa.release(self.window.drop(sequence))
            pools.slots.release([sequence.slot])

    def _cover(self, sequence: Running, end: int) -> None:
        sequence.pages += self.runner.pools.full.allocate(max(0, num_pages(end) - len(sequence.pages)))
        self.window.cover(sequence, sequence.length, end)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] float32 of a whole text."""
        found = []
        with self._sequence(ids, 1) as (sequence, _):
            for start in range(0, len(ids), self.chunk):
                part = list(ids[start : start + self.chunk])
                self._cover(sequence, start + len(part))
                meta = StepMeta.of([Segment(sequence=sequence, start=start, tokens=part, sample=False)])
                wanted = torch.arange(len(part))
                found.append(self.runner.model.forward(torch.tensor(part), meta, wanted, self.runner.pools).cpu())
                sequence.length = start + len(part)
                self.window.trim(sequence)
        return torch.cat(found)

    def answer(self, prompt: Sequence[int], tokens: int, depth: int = 0) -> tuple[list[int], list[int]]:
        """(greedy answer without its EOS, how many drafts each verifying step kept)."""
        eos, kept = self.runner.model_config.eos_token_id, []
        with self._sequence(prompt, tokens) as (sequence, answer):
            part, rest = list(prompt[: self.chunk]), list(prompt[self.chunk :])
            drafts: list[int] = []
            while True:
                self._cover(sequence, sequence.length + len(part) + depth)
                (drawn,) = self.runner.step(
                    [
                        Segment(
                            sequence=sequence, start=sequence.length, tokens=part, sample=not rest,
                            index=len(answer), drafts=len(drafts), guesses=depth,
                        )
                    ]
                )  # fmt: skip
                new = [sampled.token_id for sampled in drawn.tokens]
                sequence.length += len(part) - len(drafts) + max(0, len(new) - 1)
                self.window.trim(sequence)
                if drafts:
                    kept.append(len(new) - 1)
                answer += new
                if rest:
                    part, rest = rest[: self.chunk], rest[self.chunk :]
                    continue
                if eos in answer or len(answer) >= tokens:
                    done = answer[: answer.index(eos)] if eos in answer else answer[:tokens]
                    return done, kept
                drafts = list(drawn.guesses)[: max(0, min(depth, tokens - len(answer) - 1))]
                part = [answer[-1], *drafts]


def run(
    model: Path,
    *,
    trained: Path | None = None,
    lengths: tuple[int, ...] = (1024, 4096, 16384),
    needles: int = 20,
    questions: int = 50,
    text_tokens: int = 65_536,
    packages: tuple[str, ...] = Data().packages,
    device: Literal["cpu", "cuda"] = "cpu",
    layout: KvLayout = "v4",
    threads: int = 2,
    through: str | None = None,
    console: Console | None = None,
    save: bool = True,
) -> list[dict[str, object]]:
    """Measure, print and append rows to bench/results/eval.csv: one (measure, at, value, of) each.

    trained  run directory that the model was published from: its weights are compared with, in bfloat16
    through  a cluster that serves this model: needles are asked of it too and its answers compared, and nothing else
             is measured
    Raises ConfigError for a model that cannot be read, or whose context a needle would not fit, and PenumbraError for
    a cluster that does not answer.
    """
    console = console or Console()
    memory = max(256 << 20, 3 * max((*lengths, WINDOW_TOKENS)) * 1500)
    # One sequence at a time, but a long step on a GPU needs the window pages of several.
    engine = EngineConfig(
        model=model, device=device, kv_layout=layout, kv_memory_bytes=memory, max_requests=4, threads=threads
    )
    runner = Runner.load(engine)
    if max((*lengths, 0)) + ANSWER_TOKENS > runner.max_context:
        raise ConfigError(f"--lengths: {max(lengths)} tokens and an answer exceed the {runner.max_context} of {model}.")
    texts = Texts.read(Data(packages=packages), runner.model_config.vocab_size, model / "tokenizer.json")
    at = Engine(runner)
    rows: list[dict[str, object]] = []

    def add(measure: str, where: object, value: float, of: int) -> None:
        rows.append({"measure": measure, "at": where, "value": round(value, 5), "of": of})
        console.print(f"{measure:<28} {where!s:>10}  {value:.4f}  of {of}")

    if through is None:
        _text(at, texts, text_tokens, trained, add)
        _drafts(at, texts, questions, add)
        _json(at, texts, questions, add)
    for length in lengths:
        _needles(at, texts, length, needles, add, through)
    common: dict[str, Any] = {
        "model": model.name, "device": device, "kv_layout": layout, "threads": threads, "load": load()
    }  # fmt: skip
    rows = [common | row for row in rows]
    table = Table("measure", "at", "value", "of")
    for row in rows:
        table.add_row(str(row["measure"]), str(row["at"]), str(row["value"]), str(row["of"]))
    console.print(table)
    console.print(f"{machine()}; {threads} threads; {device}; kv_layout {layout}; commit {commit()}")
    if save:
        console.print(f"rows added to {append_rows('eval', rows)}")
    return rows


Add = Callable[[str, object, float, int], None]


def _text(at: Engine, texts: Texts, tokens: int, trained: Path | None, add: Add) -> None:
    """Perplexity of held-out text on the engine, of the baseline, and of the trainer's weights beside it."""
    held = texts.held_out[:tokens].astype(np.int64)
    windows = [w for w in np.split(held, range(WINDOW_TOKENS, len(held), WINDOW_TOKENS)) if len(w) > 1]
    model = load_run(trained)[0] if trained is not None else None
    losses, theirs, errors, agreed = [], [], [], 0
    for window in windows:
        ids = torch.from_numpy(window)
        logits = at.logits(window.tolist())
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
        if model is not None:
            run = model.begin(Numerics(dtype=torch.bfloat16))
            with torch.no_grad():
                other = run.logits(run.hidden(run.streams(ids[None])))[0]
            theirs.append(torch.nn.functional.cross_entropy(other[:-1], ids[1:], reduction="none"))
            errors.append((logits - other).abs().mean(-1))
            agreed += int((logits.argmax(-1) == other.argmax(-1)).sum())
    count = sum(len(loss) for loss in losses)
    add("perplexity", "held out", float(torch.cat(losses).mean().exp()), count)
    baseline = NGram(texts.train.astype(np.int64), texts.vocab_size)
    guessed = np.concatenate([baseline.log_probabilities(window)[1:] for window in windows])
    add("perplexity of 5-grams", "held out", float(np.exp(-guessed.mean())), count)
    if model is not None:
        whole = sum(map(len, windows))
        add("perplexity of the trainer", "bfloat16", float(torch.cat(theirs).mean().exp()), count)
        add("logit error, mean", "bfloat16", float(torch.cat(errors).mean()), whole)
        add("same likeliest token", "bfloat16", agreed / whole, whole)


def _drafts(at: Engine, texts: Texts, prompts: int, add: Add) -> None:
    """Drafts that verification kept, by their place, in greedy answers to pieces of held-out text."""
    if at.runner.draft is None:
        return
    rng, kept = random.Random(f"{SEED} drafts"), list[int]()
    for _ in range(prompts):
        start = rng.randrange(max(1, len(texts.held_out) - 200))
        kept += at.answer(texts.held_out[start : start + 128].tolist(), 32, DEPTH)[1]
    if not kept:
        return
    for place in range(DEPTH):
        reached = [k for k in kept if k >= place]
        add(
            "draft accepted", f"place {place + 1}", sum(k > place for k in reached) / max(1, len(reached)), len(reached)
        )
    add("accept length", f"depth {DEPTH}", 1 + sum(kept) / len(kept), len(kept))


def _json(at: Engine, texts: Texts, questions: int, add: Add) -> None:
    """Answers that are JSON objects, and those that hold what was asked, without a grammar to force them."""
    valid = right = 0
    for n in range(questions):
        asked, wanted = tasks.extraction_of(random.Random(f"{SEED} json {n}"))
        prompt = tasks.render([recipe.UserMessage(asked)])
        answer = texts.tokenizer.decode(at.answer(texts.tokenizer.encode(prompt).ids, 80)[0])
        try:
            found = json.loads(answer)
        except ValueError:
            continue
        valid += isinstance(found, dict)
        right += found == wanted
    add("JSON valid", "extraction", valid / questions, questions)
    add("JSON right", "extraction", right / questions, questions)


def _needles(at: Engine, texts: Texts, length: int, count: int, add: Add, through: str | None) -> None:
    """Prompts of `length` tokens whose hidden word comes back, from the engine and, where one is given, a cluster."""
    found = theirs = same = 0
    for n in range(count):
        made = texts.needles(random.Random(f"{SEED} needle {length} {n}"), length, 4, held_out=True)
        prompt, word = texts.tokenizer.encode(made.prompt()).ids, made.questions[0][2]
        answer = texts.tokenizer.decode(at.answer(prompt, ANSWER_TOKENS)[0])
        found += word in answer.rstrip(".").split()
        if through is not None:
            other = _asked(through, prompt)
            theirs += word in other.rstrip(".").split()
            same += other == answer
    add("needles found", length, found / count, count)
    if through is not None:
        add("needles found by a cluster", length, theirs / count, count)
        add("same answers", length, same / count, count)


def _asked(url: str, prompt: Sequence[int]) -> str:
    """A cluster's greedy answer."""
    told = ""
    try:
        with httpx.Client(base_url=url, timeout=ASKED_S) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            body = {"model": model, "prompt": list(prompt), "max_tokens": ANSWER_TOKENS, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            told = answer.text
            return str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        why = told[:300] or error
        raise PenumbraError(f"--through: the cluster at {url} did not answer: {why}. Is it up?") from None
