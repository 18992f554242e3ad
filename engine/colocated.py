"""Prefill and decode of one request after another on one runner: what a cluster's output is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from engine.batch import Sampled, Segment, Sequence
from engine.runner import Runner
from engine.window import WindowPages, most_window_pages, num_pages
from wire.types import SamplingParams


def generate(runner: Runner, prompt: Seq[int], sampling: SamplingParams, chunk_tokens: int = 512) -> Iterator[Sampled]:
    """Yield the request's tokens, ending as a worker would: at the stop token, or after max_tokens.

    Every page goes back when the iterator is closed. Raises OutOfPages when the pools are too small.
    """
    pools = runner.pools
    window = WindowPages(pools.swa)
    answer: list[int] = []
    sequence = Sequence(
        request_id="colocated", sampling=sampling, slot=pools.slots.allocate(1)[0], prompt=prompt, answer=answer
    )
    window.reserve(sequence, most_window_pages(chunk_tokens))
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops.add(runner.model_config.eos_token_id)
    try:
        tokens = list(prompt)
        while True:
            part, tokens = tokens[:chunk_tokens], tokens[chunk_tokens:]
            end = sequence.length + len(part)
            sequence.pages += pools.full.allocate(num_pages(end) - len(sequence.pages))
            window.cover(sequence, sequence.length, end)
            segment = Segment(
                sequence=sequence, start=sequence.length, tokens=part, sample=not tokens, index=len(answer)
            )
            (sampled,) = runner.run([segment])
            sequence.length = end
            window.trim(sequence)
            if sampled is not None:
                yield sampled
                answer.append(sampled.token_id)
                if len(answer) == sampling.max_tokens or sampled.token_id in stops:
                    return
                tokens = [sampled.token_id]
    finally:
        pools.full.release(sequence.pages)
        pools.swa.release(window.drop(sequence))
        pools.slots.release([sequence.slot])
