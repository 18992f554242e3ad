"""Requests that workers died of: refused for a while, so that a client's retries do not take the rest of the pool."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from wire.errors import RequestQuarantined

REFUSED_S = 600.0
MAX_REFUSED = 1024


class Quarantine:
    """One router's memory of them, and of those it is not sure of. Times are monotonic seconds from the caller.

    A worker that dies takes all its requests along, and any of those it had just begun with may be the one it died of.
    So each of them is tried on workers where no other is, and one more death tells.
    """

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}  # oldest first
        self._on_trial: dict[str, frozenset[str]] = {}  # request id -> workers

    def check(self, now_s: float, fingerprint: bytes) -> None:
        """Raises RequestQuarantined for a request that is like one of them."""
        until = self._until.get(fingerprint, 0.0)
        if now_s < until:
            raise RequestQuarantined(
                f"Workers died of a request like this one; it is refused for {until - now_s:.0f} s more. "
                "Change the request, or report it."
            )

    def add(self, now_s: float, fingerprint: bytes) -> None:
        self._until = {key: until for key, until in self._until.items() if until > now_s and key != fingerprint}
        self._until[fingerprint] = now_s + REFUSED_S
        while len(self._until) > MAX_REFUSED:
            del self._until[next(iter(self._until))]

    def try_on(self, request_id: str, workers: Collection[str]) -> None:
        self._on_trial[request_id] = frozenset(workers)

    def trying(self, request_id: str) -> frozenset[str]:
        """Workers that others than this request are on trial on."""
        return frozenset().union(*(on for other, on in self._on_trial.items() if other != request_id))

    def acquit(self, request_id: str) -> None:
        """The request's trial is over. Idempotent."""
        self._on_trial.pop(request_id, None)


def fingerprint(packed: bytes, grammar: str) -> bytes:
    """What makes a request deadly: its prompt, as it travels, and its grammar. A retry draws another seed."""
    return hashlib.blake2b(packed + grammar.encode(), digest_size=16).digest()
