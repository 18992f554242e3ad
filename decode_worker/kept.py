"""Answers that outlive the calls that read them: all of their tokens from the first on, for as long as was asked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator

from wire.types import Failed, Finished, StartEvent, StartRequest, TokenEvent, Tokens

MOST_KEPT = 256
"""Answers kept at once on one worker; a request beyond is served, but ends with its client."""


class KeptAnswer:
    """One run's tokens and how it ended. Used on the event loop only."""

    def __init__(self, request: StartRequest) -> None:
        self.request = request
        # What another worker drew is known by its ids alone; whoever reads it again has told the rest already.
        self._tokens = [TokenEvent(index=i, token_id=token) for i, token in enumerate(request.emitted)]
        self.end: Finished | Failed | None = None
        self._readers = 0
        self._unread_since = time.monotonic()
        self._changed = asyncio.Event()

    def add(self, event: StartEvent) -> None:
        if isinstance(event, Tokens):
            self._tokens += event.tokens
        elif isinstance(event, Finished | Failed):
            self.end = event
        else:
            return
        self._wake()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Somebody reads for the length of the block, and the answer waits for no one."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._unread_since = time.monotonic()
            self._wake()

    async def read(self, attempt: int) -> AsyncGenerator[Tokens | Finished | Failed, None]:
        """Everything from the first token on, as it comes; then how it ended."""
        sent = 0
        with self.reading():
            while True:
                changed = self._changed
                if sent < len(self._tokens):
                    ready = tuple(self._tokens[sent:])
                    sent += len(ready)
                    yield Tokens(attempt=attempt, tokens=ready)
                elif self.end is not None:
                    yield self.end
                    return
                else:
                    await changed.wait()

    async def abandoned(self) -> None:
        """Returns when nobody has read for as long as the answer is kept."""
        while True:
            changed, left = self._changed, None
            if not self._readers:
                left = self._unread_since + self.request.keep_s - time.monotonic()
                if left <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
