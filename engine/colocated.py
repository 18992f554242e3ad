"""Prefill and decode of one request after another on one runner: what a cluster's output is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from engine.batch import Sampled, Segment, Sequence
from engine.cache.pools import KvPools
from engine.config import WINDOW
from engine.runner import Runner
from wire.types import PAGE_TOKENS, SamplingParams


def map_pages(pools: KvPools, sequence: Sequence, end: int) -> None:
    """Give the sequence the pages that positions below `end` need. Raises OutOfPages."""
    grow = max(-(-end // PAGE_TOKENS) - len(sequence.pages), 0)
    sequence.pages += pools.full.allocate(grow)
    sequence.swa_pages += pools.swa.allocate(grow)


def slide_window(pools: KvPools, sequence: Sequence) -> None:
    """Return the SWA pages that no later token of the sequence can see."""
    for j in range(max(sequence.length - WINDOW + 1, 0) // PAGE_TOKENS):
        if sequence.swa_pages[j]:
            pools.swa.release([sequence.swa_pages[j]])
            sequence.swa_pages[j] = 0


def generate(
    runner: Runner, prompt: Seq[int], sampling: SamplingParams, chunk_tokens: int = 512
) -> Iterator[Sampled]:
    """Yield the request's tokens, ending as a worker would: at the stop token, or after max_tokens.

    Every page goes back when the iterator is closed. Raises OutOfPages when the pools are too small.
    """
    pools = runner.pools
    sequence = Sequence(request_id="colocated", sampling=sampling, slot=pools.slots.allocate(1)[0])
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops.add(runner.model_config.eos_token_id)
    try:
        tokens, index = list(prompt), 0
        while True:
            part, tokens = tokens[:chunk_tokens], tokens[chunk_tokens:]
            map_pages(pools, sequence, sequence.length + len(part))
            segment = Segment(
                sequence=sequence, start=sequence.length, tokens=part, sample=not tokens, index=index
            )
            (sampled,) = runner.run([segment])
            sequence.length += len(part)
            slide_window(pools, sequence)
            if sampled is not None:
                yield sampled
                index += 1
                if index == sampling.max_tokens or sampled.token_id in stops:
                    return
                tokens = [sampled.token_id]
    finally:
        pools.full.release(sequence.pages)
        pools.swa.release([page for page in sequence.swa_pages if page])
        pools.slots.release([sequence.slot])
