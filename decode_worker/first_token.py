"""Where one request's time to token 0 went, as this worker's own clock saw it."""

from __future__ import annotations

from wire.types import FirstTokenTimes, PrefillTimes


class FirstTokenClock:
    """Takes the moments as they pass, in monotonic seconds, and cuts what lies between them into parts.

    `landed` may be called from any thread; a read that ends after the parts were taken changes nothing.
    """

    __slots__ = ("_admitted", "_landed", "_last_offer", "_prefill", "_started")

    def __init__(self, now_s: float) -> None:
        self._started = self._admitted = now_s
        self._last_offer: float | None = None
        self._landed = 0.0
        self._prefill = PrefillTimes()

    def admitted(self, now_s: float) -> None:
        self._admitted = now_s

    def last_offer(self, now_s: float, prefill: PrefillTimes) -> None:
        self._last_offer, self._prefill = now_s, prefill

    def landed(self, now_s: float) -> None:
        """A read ended with every page verified."""
        self._landed = now_s

    def exposed_s(self, now_s: float) -> float | None:
        """From the last offer until `now_s`: what computing did not hide. None when no offer was the last."""
        return None if self._last_offer is None else now_s - self._last_offer

    def times(self, now_s: float) -> FirstTokenTimes:
        """The parts, which follow each other without gaps from the start to `now_s`, when token 0 goes out."""
        offered = self._admitted if self._last_offer is None else self._last_offer
        # The last read may have ended before the last offer came, which then brought no pages.
        landed = min(max(offered, self._landed), now_s)
        return FirstTokenTimes(
            admit_us=_us(self._admitted - self._started),
            pages_us=_us(offered - self._admitted),
            transfer_us=_us(landed - offered),
            emit_us=_us(now_s - landed),
            prefill=self._prefill,
        )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
