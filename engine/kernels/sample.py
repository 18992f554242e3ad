"""Draw one token per row of logits, reproducibly.

Noise is a pure function of (seed, position, token id), so a request draws the same tokens on any worker, in any batch
and after any migration. A draw is argmax(logits / temperature + Gumbel noise), which samples the softmax.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.batch import Sampled
from wire.types import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(seed: int, position: int, vocab_size: int) -> NDArray[np.float64]:
    """[vocab_size] standard Gumbel noise for the token at `position` of a sequence seeded with `seed` (64 bits)."""
    key = _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64))
    key = _mix(key + np.array([position], dtype=np.uint64) * _GOLDEN)
    bits = _mix(key + np.arange(1, vocab_size + 1, dtype=np.uint64) * _GOLDEN)
    # 53 bits, shifted by half a step so that neither 0 nor 1 occurs and both logarithms are finite.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def sample(logits: NDArray[np.float32], params: list[SamplingParams], positions: list[int]) -> list[Sampled]:
    """logits [S, V]; params and the drawn tokens' positions per row. Ties go to the lower token id."""
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=-1))
    greedy = logits.argmax(axis=-1)
    return [
        _draw(logits[row], int(greedy[row]), p, position) if finite[row] else Sampled(token_id=0, logprob=0.0, ok=False)
        for row, (p, position) in enumerate(zip(params, positions, strict=True))
    ]


def _draw(logits: NDArray[np.float32], greedy: int, params: SamplingParams, position: int) -> Sampled:
    token = greedy
    if params.temperature > 0:
        scores = logits.astype(np.float64) / params.temperature
        if params.top_p < 1:
            scores[~_nucleus(scores, params.top_p)] = -np.inf
        token = int((scores + gumbel(params.seed, position, len(scores))).argmax())
    if not params.logprobs:
        return Sampled(token_id=token, logprob=0.0)
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    order = np.argsort(-logprobs, kind="stable")[: params.top_logprobs]
    return Sampled(
        token_id=token,
        logprob=float(np.float32(logprobs[token])),
        top=tuple((int(i), float(np.float32(logprobs[i]))) for i in order),
    )


def _nucleus(scores: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """The smallest set of most likely tokens whose probability reaches top_p; never empty."""
    order = np.argsort(-scores, kind="stable")
    probabilities = np.exp(scores[order] - scores[order[0]])
    before = np.cumsum(probabilities) - probabilities
    keep = np.zeros(len(scores), dtype=bool)
    keep[order[before < top_p * probabilities.sum()]] = True
    return keep
