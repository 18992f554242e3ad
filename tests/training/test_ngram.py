"""The counting baseline against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from training.ngram import DISCOUNT, NGram


def by_hand(train: list[int], context: tuple[int, ...], token: int, order: int, vocab: int) -> float:
    """Interpolated Kneser-Ney straight from its definition."""

    def count(gram: tuple[int, ...]) -> int:
        places = [i for i in range(len(train) - len(gram) + 1) if tuple(train[i : i + len(gram)]) == gram]
        return len(places) if len(gram) == order else len({train[i - 1 : i + len(gram)][0] for i in places if i > 0})

    def probability(context: tuple[int, ...]) -> float:
        below = probability(context[1:]) if context else 1 / vocab
        counts = [count((*context, other)) for other in range(vocab)]
        if not sum(counts):
            return below
        kinds = sum(c > 0 for c in counts)
        return (max(counts[token] - DISCOUNT, 0) + DISCOUNT * kinds * below) / sum(counts)

    return probability(context)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_counted_by_hand(order: int) -> None:
    rng = np.random.default_rng(order)
    train, test = rng.integers(0, 5, 60).tolist(), rng.integers(0, 6, 40).tolist()
    got = np.exp(NGram(np.array(train), 6, order).log_probabilities(np.array(test)))
    for i in range(order - 1, len(test)):
        want = by_hand(train, tuple(test[i - order + 1 : i]), test[i], order, 6)
        assert got[i] == pytest.approx(want, rel=1e-9), i


def test_what_may_follow_adds_up_to_one() -> None:
    rng = np.random.default_rng(7)
    model = NGram(rng.integers(0, 7, 300), 8)
    before = rng.integers(0, 7, 6)
    last = [np.exp(model.log_probabilities(np.append(before, token))[-1]) for token in range(8)]
    assert sum(last) == pytest.approx(1.0, rel=1e-9)


def test_a_text_that_repeats_itself_is_foreseen() -> None:
    text = np.array([1, 2, 3, 4, 5, 6] * 200)
    assert NGram(text, 100).perplexity(text[:120]) < 1.2
    assert NGram(text, 100).perplexity(np.arange(50, 90)) > 90
