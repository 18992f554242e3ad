"""How many tokens fit into a step: measured, by depth of context, since attention and the index scan grow with it."""

from __future__ import annotations

from collections.abc import Iterable

_FIRST_DEPTH = 4096
"""Depths below this share one rate; beyond, each doubling has its own."""

_WEIGHT = 0.3
"""Of the newest measurement: a machine that slows down is believed within a few steps, one odd step is not."""


class Pace:
    """Seconds per token at each depth; knows nothing before the first step."""

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}  # depth class -> seconds per token

    def tokens_in(self, seconds: float, depth: int) -> float:
        """Tokens behind `depth` that take so long; infinite while nothing has been measured."""
        cost = self._cost_at(depth)
        return seconds / cost if cost else float("inf")

    def seconds_for(self, num_tokens: int, depth: int) -> float:
        """How long so many tokens behind `depth` take; 0 while nothing has been measured."""
        return num_tokens * self._cost_at(depth)

    def line(self) -> tuple[int, int]:
        """Nanoseconds for a token at the start of a prompt, and how many more for each 1,024 tokens in front of it:
        the line through the shallowest and the deepest measurement. Zeros while nothing has been measured.
        """
        if not self._cost:
            return 0, 0
        first, last = min(self._cost), max(self._cost)
        between = (_middle(last) - _middle(first)) / 1024
        slope = max(0.0, (self._cost[last] - self._cost[first]) / between) if between else 0.0
        start = max(0.0, self._cost[first] - slope * _middle(first) / 1024) if between else self._cost[first]
        return max(1, round(start * 1e9)), round(slope * 1e9)

    def record(self, parts: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step of (depth, number of tokens) parts took so long."""
        parts = list(parts)
        tokens = sum(n for _, n in parts)
        if not tokens or seconds <= 0:
            return
        expected = sum(self.seconds_for(n, depth) for depth, n in parts)
        for depth, _ in parts:
            # The parts share the step by what each was expected to take; unmeasured, by their lengths.
            cost = self._cost_at(depth) * seconds / expected if expected else seconds / tokens
            known = self._cost.get(_class(depth))
            self._cost[_class(depth)] = cost if known is None else known + _WEIGHT * (cost - known)

    def _cost_at(self, depth: int) -> float:
        wanted = _class(depth)
        if not self._cost or wanted in self._cost:
            return self._cost.get(wanted, 0.0)
        shallower = [known for known in self._cost if known < wanted]
        if not shallower:
            return self._cost[min(self._cost)]
        # No token costs more than in proportion to its depth.
        return self._cost[max(shallower)] * 2.0 ** (wanted - max(shallower))


def _class(depth: int) -> int:
    return (depth // _FIRST_DEPTH).bit_length()


def _middle(depth_class: int) -> float:
    """A depth of the class that stands for all of them."""
    return _FIRST_DEPTH * (0.75 * 2.0**depth_class if depth_class else 0.5)
