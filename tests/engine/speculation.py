"""Models with a draft layer, and prompts continued on a `Runner` with drafts, the way a decode worker does it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Sampled, Segment, Sequence
from engine.cache.pools import KvPools, PoolSizes
from engine.config import EngineConfig, KvLayout, ModelConfig
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.mtp import DraftLayer
from engine.runner import Runner
from engine.window import WindowPages, num_pages
from tests.engine.geometries import random_tensors, tiny_config
from wire.types import SamplingParams

Guesser = Callable[[int, int], list[int]]
"""(request, tokens answered so far) -> what to try in place of the draft layer's guesses."""


def half_right(answers: list[list[Sampled]], vocab: int, seed: int) -> Guesser:
    """An oracle that tells the truth for a while, then does not."""
    rng = random.Random(seed)

    def guess(request: int, done: int) -> list[int]:
        truth = [sampled.token_id for sampled in answers[request][done : done + 3]]
        return [t if rng.random() < 0.7 else (t + 1) % vocab for t in truth]

    return guess


def drafting_model(seed: int, pattern: str, **changes: object) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A random model with a draft layer: one more plain layer, by another name, and what leads into it."""
    config = replace(tiny_config(seed, pattern, **changes), draft_layer=True)
    longer = replace(config, compress_ratios=(*config.compress_ratios, 0))
    above = f"layers.{config.num_layers}."
    tensors = {name.replace(above, "mtp.0."): t for name, t in random_tensors(longer, seed).items()}
    g, d = torch.Generator().manual_seed(seed + 1), config.hidden_size
    for name in ("e_proj", "h_proj"):
        tensors[f"mtp.0.{name}.weight"] = (torch.randn(d, d, generator=g) * d**-0.5).bfloat16()
    for name in ("enorm", "hnorm", "norm"):
        tensors[f"mtp.0.{name}.weight"] = (1 + 0.2 * torch.randn(d, generator=g)).bfloat16()
    for name in ("fn", "base", "scale"):
        like = tensors[f"hc_head_{name}"]
        tensors[f"mtp.0.hc_head_{name}"] = like + 0.1 * torch.randn(like.shape, generator=g)
    return config, tensors


def echoing(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Make the draft layer always right: a model without attention and experts that looks at its last token only."""
    for name, t in tensors.items():
        if name.endswith(("attn.wo_b.weight", "experts.w2", "shared_experts.w2.weight", "h_proj.weight")):
            t.zero_()
    d = config.hidden_size
    tensors["mtp.0.e_proj.weight"] = torch.eye(d).bfloat16()
    tensors["mtp.0.enorm.weight"] = torch.ones(d).bfloat16()
    tensors["mtp.0.norm.weight"] = tensors["norm.weight"].clone()


def runner_of(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    layout: KvLayout,
    *,
    draft: bool = True,
    sizes: PoolSizes = PoolSizes(full=40, swa=40, slots=8),  # noqa: B008
) -> Runner:
    tensors = dict(tensors)
    model = DeepseekV4(config, tensors)
    pools = KvPools(config, layout, sizes, "test", "cpu")
    engine = EngineConfig(model=Path(), kv_layout=layout, draft=draft)
    return Runner(engine, model, pools, "test", DraftLayer(model, tensors) if draft else None)


@dataclass
class Request:
    """One prompt being continued. `tried` and `kept` count drafts."""

    sequence: Sequence
    prompt: list[int]
    drawn: list[Sampled] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)  # their ids
    guesses: list[int] = field(default_factory=list)
    tried: int = 0
    kept: int = 0


class Speculator:
    """Requests on one runner, `depth` drafts a step. With `keep`, pages stay mapped behind the window. Answers end with
    one of the tokens `ends`, or with max_tokens.
    """

    def __init__(
        self,
        runner: Runner,
        depth: int,
        *,
        keep: bool = False,
        guesser: Guesser | None = None,
        ends: tuple[int, ...] = (),
    ) -> None:
        self.runner, self.depth, self.keep, self.guesser, self.ends = runner, depth, keep, guesser, ends
        self.window = WindowPages(runner.pools.swa)
        self.requests: list[Request] = []

    def prefill(self, prompt: list[int], params: SamplingParams, chunk: int = 200) -> Request:
        sequence = Sequence(request_id="r", sampling=params, slot=self.runner.pools.slots.allocate(1)[0])
        self.window.reserve(sequence, 6)
        request = Request(sequence, prompt)
        sequence.prompt, sequence.answer = request.prompt, request.answer
        self.requests.append(request)
        for at in range(0, len(prompt), chunk):
            part = prompt[at : at + chunk]
            self._step([request], [Segment(sequence=sequence, start=at, tokens=part, sample=at + chunk >= len(prompt))])
        return request

    def run(self) -> None:
        """Until every request has come to its end."""
        while going := [
            r
            for r in self.requests
            if len(r.answer) < r.sequence.sampling.max_tokens and not any(end in r.answer for end in self.ends)
        ]:
            segments = []
            for request in going:
                left = request.sequence.sampling.max_tokens - len(request.answer)
                tries = request.guesses
                if self.guesser is not None:
                    tries = self.guesser(self.requests.index(request), len(request.answer))
                tries = tries[: min(self.depth, left - 1)]
                request.tried += len(tries)
                segments.append(
                    Segment(
                        sequence=request.sequence,
                        start=request.sequence.length,
                        tokens=[request.answer[-1], *tries],
                        sample=True,
                        index=len(request.answer),
                        drafts=len(tries),
                    )
                )
            self._step(going, segments)

    def _step(self, requests: list[Request], segments: list[Segment]) -> None:
        pools = self.runner.pools
        for request, segment in zip(requests, segments, strict=True):
            sequence, end = request.sequence, segment.start + len(segment.tokens) + self.depth
            sequence.pages += pools.full.allocate(max(0, num_pages(end) - len(sequence.pages)))
            self.window.cover(sequence, segment.start, end)
        results = self.runner.step([replace(segment, guesses=self.depth) for segment in segments])
        for request, segment, drawn in zip(requests, segments, results, strict=True):
            kept = max(0, len(drawn.tokens) - 1)
            request.sequence.length = segment.start + len(segment.tokens) - segment.drafts + kept
            request.drawn += drawn.tokens
            request.answer += [sampled.token_id for sampled in drawn.tokens]
            request.guesses = list(drawn.guesses)
            request.kept += kept
            if not self.keep:
                self.window.trim(request.sequence)

    def give_back(self) -> None:
        """Every page and slot of requests that have ended."""
        pools = self.runner.pools
        for request in self.requests:
            pools.full.release(request.sequence.pages)
            pools.swa.release(self.window.drop(request.sequence))
            pools.slots.release([request.sequence.slot])
