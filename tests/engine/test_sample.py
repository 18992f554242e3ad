"""Drawing tokens: distribution, reproducibility, logprobs, and what happens to logits that are not numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.sample import gumbel, sample
from wire.types import SamplingParams

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 2.0, -np.float32(3)], dtype=np.float32)


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1, "seed": 7} | changes))  # type: ignore[arg-type]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def test_temperature_zero_takes_the_lowest_of_the_most_likely() -> None:
    (drawn,) = sample(LOGITS[None], [params(temperature=0)], [5])
    assert drawn.token_id == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    n = 20_000
    rows = np.broadcast_to(LOGITS, (n, len(LOGITS)))
    drawn = sample(rows, [params(temperature=temperature)] * n, list(range(n)))
    seen = np.bincount([d.token_id for d in drawn], minlength=len(LOGITS)) / n
    expected = softmax(LOGITS / temperature)
    # Five standard deviations of a frequency over n draws.
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all(), (seen, expected)


def test_top_p_never_leaves_the_nucleus() -> None:
    n = 2_000
    rows = np.broadcast_to(LOGITS, (n, len(LOGITS)))
    order = np.argsort(-LOGITS, kind="stable")
    reach = np.cumsum(softmax(LOGITS)[order])
    nucleus = set(order[: int(np.searchsorted(reach, 0.8)) + 1].tolist())
    drawn = sample(rows, [params(top_p=0.8)] * n, list(range(n)))
    assert {d.token_id for d in drawn} == nucleus


def test_a_tiny_top_p_is_greedy() -> None:
    drawn = sample(np.broadcast_to(LOGITS, (50, 6)), [params(top_p=1e-9)] * 50, list(range(50)))
    assert {d.token_id for d in drawn} == {0}


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20))
def test_noise_depends_on_seed_position_and_token_alone(seed: int, position: int) -> None:
    noise = gumbel(seed, position, 64)
    assert np.isfinite(noise).all()
    assert np.array_equal(noise, gumbel(seed, position, 256)[:64])
    assert not np.array_equal(noise, gumbel(seed, position + 1, 64))
    assert not np.array_equal(noise, gumbel(seed ^ 1, position, 64))


def test_a_row_is_drawn_alike_alone_and_in_a_batch() -> None:
    rows = np.random.default_rng(0).standard_normal((9, 97)).astype(np.float32)
    options = [params(seed=i, temperature=0.5 + i / 4, top_p=0.9, logprobs=True, top_logprobs=5) for i in range(9)]
    together = sample(rows, options, list(range(9)))
    assert together == [sample(rows[i : i + 1], [options[i]], [i])[0] for i in range(9)]


def test_logprobs_are_those_of_the_untempered_softmax() -> None:
    (drawn,) = sample(LOGITS[None], [params(temperature=0.1, logprobs=True, top_logprobs=3)], [0])
    expected = np.log(softmax(LOGITS))
    assert drawn.logprob == pytest.approx(expected[drawn.token_id], abs=1e-6)
    assert [i for i, _ in drawn.top] == [0, 4, 1]
    assert [p for _, p in drawn.top] == pytest.approx([expected[0], expected[4], expected[1]], abs=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_fail_their_own_row_only(poison: float) -> None:
    rows = np.stack([LOGITS, LOGITS, LOGITS])
    rows[1, 3] = poison
    drawn = sample(rows, [params(temperature=0)] * 3, [0, 1, 2])
    assert [d.ok for d in drawn] == [True, False, True]
    assert drawn[0].token_id == drawn[2].token_id == 0
