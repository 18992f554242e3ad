"""The baseline a language model must be far better than: counting. Interpolated Kneser-Ney over the same tokens.

N tokens. An n-gram is known by its number among the distinct n-grams of the training text, and that number by the pair
(number of the n - 1 tokens before, last token), so no hash can collide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DISCOUNT = 0.75


class NGram:
    """Counts of a training text up to `order` tokens long."""

    def __init__(self, tokens: Ints, vocab_size: int, order: int = 5) -> None:
        self.vocab_size, self.order = vocab_size, order
        tokens = np.asarray(tokens, dtype=np.int64)
        # Number of the n-gram that ends at each place, n tokens long; of the first n - 1 places there is none.
        number = np.zeros(len(tokens), dtype=np.int64)
        self.keys: list[Ints] = []
        longest = np.zeros(0, dtype=np.int64)
        ends: list[Ints] = []
        for n in range(1, order + 1):
            key = self._key(number, tokens, n)
            known, place = np.unique(key[n - 1 :], return_inverse=True)
            self.keys.append(known)
            number = np.full(len(tokens), -1, dtype=np.int64)
            number[n - 1 :] = place
            ends.append(number)
            longest = np.bincount(place, minlength=len(known))
        # The longest are counted as they occur, shorter ones by how many different tokens they follow.
        self.counts: list[Ints] = [np.zeros(0, dtype=np.int64)] * order
        self.counts[order - 1] = longest
        for n in range(order - 1, 0, -1):
            longer, first = np.unique(ends[n][n:], return_index=True)
            self.counts[n - 1] = np.bincount(ends[n - 1][n:][first], minlength=len(self.keys[n - 1]))
            assert len(longer) == len(self.keys[n])
        # Of each context: the sum of its counts, and how many different tokens follow it.
        self.sums, self.kinds = [], []
        for n in range(order):
            context = self.keys[n] // vocab_size
            size = 1 if n == 0 else len(self.keys[n - 1])
            self.sums.append(np.bincount(context, weights=self.counts[n], minlength=size))
            self.kinds.append(np.bincount(context, weights=self.counts[n] > 0, minlength=size).astype(np.int64))

    def _key(self, before: Ints, tokens: Ints, n: int) -> Ints:
        """The pair of every place; `before` numbers the (n - 1)-grams by where they end."""
        shifted = np.zeros_like(before) if n == 1 else np.concatenate([[-1], before[:-1]])
        return shifted * self.vocab_size + tokens

    def log_probabilities(self, tokens: Ints) -> Floats:
        """Nats of each token of a text behind those before it: [N], at most `order` - 1 of which count."""
        tokens = np.asarray(tokens, dtype=np.int64)
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        number = np.zeros(len(tokens), dtype=np.int64)
        for n in range(1, self.order + 1):
            context = np.zeros_like(number) if n == 1 else np.concatenate([[-1], number[:-1]])
            key = self._key(number, tokens, n)
            place = np.searchsorted(self.keys[n - 1], key).clip(max=len(self.keys[n - 1]) - 1)
            found = (self.keys[n - 1][place] == key) & (context >= 0)
            number = np.where(found, place, -1)
            held = context.clip(min=0)
            total = np.where(context >= 0, self.sums[n - 1][held], 0.0)
            count = np.where(found, self.counts[n - 1][place], 0)
            some = total > 0
            left = np.where(some, DISCOUNT * self.kinds[n - 1][held] / np.maximum(total, 1), 1.0)
            own = np.where(some, np.maximum(count - DISCOUNT, 0) / np.maximum(total, 1), 0.0)
            probability = own + left * probability
        return np.log(probability)

    def perplexity(self, tokens: Ints) -> float:
        return float(np.exp(-self.log_probabilities(tokens).mean()))
