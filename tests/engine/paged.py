"""Runs prompts through the paged engine the way a worker does: pages mapped as needed, windows freed behind."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import Segment, Sequence, StepMeta
from engine.cache.pools import KvPools, PoolSizes
from engine.config import KvLayout
from engine.model.deepseek_v4 import DeepseekV4
from engine.window import WindowPages, num_pages
from wire.types import SamplingParams

GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0)


class Paged:
    """One model over small pools; every position's logits are wanted."""

    def __init__(
        self, model: DeepseekV4, layout: KvLayout, *, pages: int = 100, slots: int = 8, keep_windows: bool = False
    ) -> None:
        self.model, self.keep_windows = model, keep_windows
        self.pools = KvPools(model.config, layout, PoolSizes(full=pages, swa=pages, slots=slots), "test", "cpu")

        self.window = WindowPages(self.pools.swa)

    def sequence(self) -> Sequence:
        sequence = Sequence(request_id="r", sampling=GREEDY, slot=self.pools.slots.allocate(1)[0])
        self.window.reserve(sequence, 16)
        return sequence

    def step(self, *parts: tuple[Sequence, Tensor]) -> list[Tensor]:
        """Append tokens to each sequence; returns [n, V] logits of every token, per sequence."""
        batch = []
        for sequence, tokens in parts:
            end = sequence.length + len(tokens)
            sequence.pages += self.pools.full.allocate(num_pages(end) - len(sequence.pages))
            self.window.cover(sequence, sequence.length, end)
            batch.append(Segment(sequence=sequence, start=sequence.length, tokens=tokens.tolist(), sample=False))
        ids = torch.cat([tokens for _, tokens in parts])
        self.positions = StepMeta.of(batch).positions  # of the step that runs, for whoever looks on
        logits = self.model.forward(ids, StepMeta.of(batch), torch.arange(len(ids)), self.pools)
        for sequence, tokens in parts:
            sequence.length += len(tokens)
            if not self.keep_windows:
                self.window.trim(sequence)
        return list(logits.split([len(tokens) for _, tokens in parts]))

    def prefill(self, tokens: Tensor, chunk: int) -> Tensor:
        """[T, V] logits of one prompt computed `chunk` tokens at a time, everything returned to the pools after."""
        sequence = self.sequence()
        logits = torch.cat([self.step((sequence, part))[0] for part in tokens.split(chunk)])
        self.finish(sequence)
        return logits

    def finish(self, sequence: Sequence) -> None:
        self.pools.full.release(sequence.pages)
        self.pools.swa.release(self.window.drop(sequence))
        self.pools.slots.release([sequence.slot])
