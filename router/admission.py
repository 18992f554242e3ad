"""Whether a request is taken, and how many run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from router.config import RouterConfig
from wire.errors import Draining, Overloaded
from wire.telemetry import RouterMetrics


class Admission:
    """The count of running requests and its limit. `draining` refuses new work."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics) -> None:
        self._most = config.max_concurrent_requests
        self._metrics = metrics
        self._running = 0
        self.draining = False

    def check(self) -> None:
        """Raises Draining or Overloaded when a request would not be taken now."""
        if self.draining:
            raise Draining("This router is shutting down. Retry with another one.")
        if self._running >= self._most:
            raise Overloaded(
                f"{self._running} requests are running, the most this router serves at once. Retry in a moment."
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The request runs for the length of the block."""
        self._running += 1
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._running -= 1
            self._metrics.running.dec()
