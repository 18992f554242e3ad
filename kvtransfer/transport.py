"""What a transport must do: make memory readable, and read a peer's items into our own.

Nobody writes into another process's memory. A transport knows strides and counts; it never learns what a
page means. One thread drives a transport; only `describe` may be called from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from wire.types import OwnerCard, PageClass, RegionClass


class ReadState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class ReadHandle(Protocol):
    """A posted read. Until it settles (DONE or FAILED) its destination must not be given to anyone."""

    def poll(self) -> ReadState: ...

    def close(self) -> None:
        """Free what a settled read holds."""


class Transport(Protocol):
    name: str

    def register(self, classes: Sequence[RegionClass]) -> None:
        """Make this process's regions readable by peers and usable as destinations. Called once."""

    def describe(self) -> tuple[str, bytes]:
        """(agent name, connection data) for our own owner card. Valid after `register`."""

    def connect(self, card: OwnerCard) -> None:
        """Reach a peer; idempotent per (worker, epoch). A newer epoch replaces the old peer.

        Raises LayoutMismatch when the card's classes are not congruent with ours, WorkerLost when unreachable.
        """

    def read(self, card: OwnerCard, page_class: PageClass, remote: Sequence[int], local: Sequence[int]) -> ReadHandle:
        """Post one read of whole items (every region of the class): peer item remote[i] -> our item local[i].

        Raises WorkerLost when it cannot be posted.
        """

    def disconnect(self, worker_id: str) -> None: ...

    def close(self) -> None: ...
