"""A transport inside one process: for colocated workers, and for tests that need to hold a read in the air.

Every open transport is in a process-wide directory under its agent name, as NIXL agents are on a network.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from enum import Enum

from kvtransfer.plan import check_congruent
from kvtransfer.transport import ReadState
from wire.errors import WorkerLost
from wire.types import OwnerCard, PageClass, RegionClass

_directory: dict[str, LoopbackTransport] = {}
_directory_lock = threading.Lock()


class Flow(Enum):
    """What a gate does with reads: let them copy, keep them running, or let them end in failure."""

    OPEN = "open"
    HELD = "held"
    FAILING = "failing"


class Gate:
    """Set from any thread. A held read copies its bytes when the gate opens, however late that is."""

    def __init__(self) -> None:
        self.flow = Flow.OPEN


class LoopbackTransport:
    name = "loopback"

    def __init__(self, agent: str, gate: Gate | None = None) -> None:
        """`agent` must be unique in this process; a worker id with its epoch is. `gate` rules our own reads."""
        self._agent = agent
        self._gate = gate or Gate()
        self._classes: dict[PageClass, RegionClass] = {}
        self._peers: dict[str, OwnerCard] = {}

    def register(self, classes: Sequence[RegionClass]) -> None:
        self._classes = {region_class.name: region_class for region_class in classes}
        with _directory_lock:
            if self._agent in _directory:
                raise ValueError(f"a loopback transport named {self._agent!r} is already open")
            _directory[self._agent] = self

    def describe(self) -> tuple[str, bytes]:
        return self._agent, b""

    def connect(self, card: OwnerCard) -> None:
        check_congruent(list(self._classes.values()), card.classes)
        _find(card)
        self._peers[card.worker_id] = card

    def read(self, card: OwnerCard, page_class: PageClass, remote: Sequence[int], local: Sequence[int]) -> LoopbackRead:
        known = self._peers.get(card.worker_id)
        if known is None or known.epoch != card.epoch:
            raise WorkerLost(f"{card.worker_id} of epoch {card.epoch:#x} is not connected.")
        owner = _find(card)
        copies = [
            (here.address + ours * here.item_bytes, there.address + theirs * there.item_bytes, here.item_bytes)
            for here, there in zip(self._classes[page_class].regions, owner._classes[page_class].regions, strict=True)
            for theirs, ours in zip(remote, local, strict=True)
        ]
        handle = LoopbackRead(card, copies, self._gate)
        handle.poll()
        return handle

    def disconnect(self, worker_id: str) -> None:
        self._peers.pop(worker_id, None)

    def close(self) -> None:
        with _directory_lock:
            if _directory.get(self._agent) is self:
                del _directory[self._agent]
        self._peers.clear()


class LoopbackRead:
    def __init__(self, card: OwnerCard, copies: list[tuple[int, int, int]], gate: Gate) -> None:
        self._card = card
        self._copies = copies  # (to, from, bytes)
        self._gate = gate
        self._state = ReadState.RUNNING

    def poll(self) -> ReadState:
        if self._state is ReadState.RUNNING and self._gate.flow is not Flow.HELD:
            self._state = self._settle()
        return self._state

    def _settle(self) -> ReadState:
        if self._gate.flow is Flow.FAILING:
            return ReadState.FAILED
        try:
            _find(self._card)  # its memory may be freed once it is closed
        except WorkerLost:
            return ReadState.FAILED
        for destination, source, size in self._copies:
            ctypes.memmove(destination, source, size)
        return ReadState.DONE

    def close(self) -> None:
        if self._state is ReadState.RUNNING:
            raise ValueError("a running read can not be closed; its bytes may still land")
        self._copies = []


def _find(card: OwnerCard) -> LoopbackTransport:
    with _directory_lock:
        owner = _directory.get(card.agent)
    if owner is None:
        raise WorkerLost(f"{card.worker_id} has closed its transport {card.agent!r}.")
    check_congruent(list(owner._classes.values()), card.classes)
    return owner
