"""How many tokens to draft in a step: a number given once, or what has paid of late.

A draft costs a pass of the draft layer and one more row to verify, and is worth a token if it is kept and so were
those before it. Both are measured here while requests run; rows cost less the fewer there are, so costs are kept for
each size of batch.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DRAFTS = 3
"""What the rings of the compressors leave room to take back, and what one draft layer guesses with any success."""

TRIAL_STEPS = 4
"""Steps in a row at one depth before it is compared: the first still verifies what another depth guessed."""

REVIEW_STEPS = 256
"""Steps after which a depth beside the best is tried again, in turn: texts change."""

MEMORY = 1 / 32
"""Weight of the latest measurement."""


class DraftDepth:
    """Pure: what it is told decides what it says.

    verified_total, drafts_total, kept_total   requests' steps with drafts, the drafts in them, and those kept
    """

    def __init__(self, fixed: int | None) -> None:
        """`fixed` drafts a step from 0 to MAX_DRAFTS, or None to choose."""
        assert fixed is None or 0 <= fixed <= MAX_DRAFTS, f"{fixed} drafts a step"
        self._fixed = fixed
        self._depth = fixed or 0
        self._size = 0  # of the batch, as the length of its number in bits
        self._left = 0  # steps before the depth is chosen again
        self._reviews = 0
        self._kept = [0.7] * MAX_DRAFTS  # share of i-th drafts kept where those before were: hopeful at first
        self._cost: dict[tuple[int, int], float] = {}  # (size, depth) -> seconds a step
        self.verified_total = self.drafts_total = self.kept_total = 0

    def choose(self, num_requests: int) -> int:
        """For the next step, which `measured` then tells of."""
        if self._fixed is not None:
            return self._fixed
        size = num_requests.bit_length()
        if size != self._size or self._left == 0:
            self._size = size
            self._depth, self._left = self._next(size)
        self._left -= 1
        return self._depth

    def measured(self, requests: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step ended: for each request how many drafts it held, and how many of these were kept."""
        for drafts, kept in requests:
            self.verified_total += drafts > 0
            self.drafts_total += drafts
            self.kept_total += kept
            for i in range(min(drafts, kept + 1)):
                self._kept[i] += ((i < kept) - self._kept[i]) * MEMORY
        if max((drafts for drafts, _ in requests), default=0) == self._depth:
            known = self._cost.setdefault((self._size, self._depth), seconds)
            self._cost[self._size, self._depth] = known + (seconds - known) * MEMORY

    def _next(self, size: int) -> tuple[int, int]:
        """(depth, for how many steps)."""
        for depth in range(MAX_DRAFTS + 1):
            if (size, depth) not in self._cost:
                return depth, TRIAL_STEPS
        best = max(range(MAX_DRAFTS + 1), key=lambda depth: self.tokens(depth) / self._cost[size, depth])
        self._reviews += 1
        if self._reviews % 2:
            return best, REVIEW_STEPS
        beside = best + (1 if self._reviews % 4 else -1)
        return (beside, TRIAL_STEPS) if 0 <= beside <= MAX_DRAFTS else (best, REVIEW_STEPS)

    def tokens(self, depth: int) -> float:
        """Tokens a step of `depth` drafts may be expected to bring a request."""
        total = share = 1.0
        for kept in self._kept[:depth]:
            share *= kept
            total += share
        return total
