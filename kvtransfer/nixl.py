"""Pages over NIXL: RDMA, CUDA IPC, shared memory or TCP behind one call, one agent a process.

Every region of a class is one strided row of a prepared descriptor list, so a read is two int32 index arrays:
descriptor = region * num_items + item. Neighbouring descriptors on both sides are merged by NIXL.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from kvtransfer.plan import check_congruent, num_items
from kvtransfer.transport import ReadState
from wire.errors import ConfigError, LayoutMismatch, WorkerLost
from wire.types import OwnerCard, PageClass, RegionClass

PROGRESS_INTERVAL_S = 0.01
"""Wire-up and transports without RDMA need the owner's CPU. NIXL's own thread takes 40% of one, this 1.5%."""

log = structlog.get_logger()


def _load() -> ModuleType:
    # Standard output belongs to the program; UCX and NIXL would log there.
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    for package in ("nixl_cu12", "nixl_cu13"):
        try:
            module = importlib.import_module(f"{package}._api")
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            continue
        nixl_log = logging.getLogger("nixl")
        nixl_log.handlers.clear()
        nixl_log.propagate = True
        nixl_log.setLevel(logging.WARNING)
        return module
    raise ConfigError("NIXL is not installed. `pip install nixl-cu12` (it also runs without a GPU).")


def _check_environment() -> None:
    transports = os.environ.get("UCX_TLS")
    if transports is None or transports.startswith("^"):
        return
    if not {"tcp", "all"} & {name.strip() for name in transports.split(",")}:
        raise ConfigError(
            f"UCX_TLS={transports} leaves out tcp, which UCX needs to notice a dead peer. "
            f"Set UCX_TLS={transports},tcp or unset it."
        )


@dataclass(slots=True)
class _Peer:
    """One life of one worker. Retired when a newer life replaces it, removed once its last read is closed."""

    card: OwnerCard
    lists: dict[PageClass, Any]
    num_items: dict[PageClass, int]
    open_reads: int = 0
    retired: bool = False


class NixlTransport:
    name = "nixl"

    def __init__(self, agent: str, *, memory: str = "DRAM", device: int = 0, progress_thread: bool = False) -> None:
        """`agent` must be unique in the cluster and over restarts: a worker id with its epoch is.

        `memory` ("DRAM" or "VRAM") and `device` say where the registered regions are. `progress_thread` turns on
        NIXL's own, which spins: worth a core where pages travel over TCP between hosts.
        Raises ConfigError when NIXL is missing or UCX is set up so that it can not work.
        """
        _check_environment()
        self._api = _load()
        self._agent_name = agent
        self._memory = memory
        self._device = device
        config = self._api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[])
        try:
            self._agent: Any = self._api.nixl_agent(agent, config)
            self._agent.create_backend("UCX", {})
        except Exception as error:
            raise ConfigError(f"NIXL cannot start its UCX backend: {error}. Check UCX_* variables.") from error
        # The agent is not thread-safe; its only other user is our progress thread.
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._progress: threading.Thread | None = None
        if not progress_thread:
            self._progress = threading.Thread(target=self._drive, name="nixl-progress", daemon=True)
        self._classes: tuple[RegionClass, ...] = ()
        self._registered: Any = None
        self._lists: dict[PageClass, Any] = {}
        self._metadata = b""
        self._peers: dict[tuple[str, int], _Peer] = {}

    def register(self, classes: Sequence[RegionClass]) -> None:
        check_congruent(classes, classes)
        self._classes = tuple(classes)
        ranges = [(start, size, self._device, "") for start, size in _ranges(classes)]
        with self._lock:
            self._registered = self._agent.register_memory(ranges, self._memory)
            for region_class in classes:
                rows = _rows(region_class, self._device)
                self._lists[region_class.name] = self._agent.prep_xfer_dlist("", rows, self._memory)
            self._metadata = self._agent.get_agent_metadata()
        if self._progress is not None:
            self._progress.start()

    def describe(self) -> tuple[str, bytes]:
        return self._agent_name, self._metadata

    def connect(self, card: OwnerCard) -> None:
        known = self._peers.get((card.worker_id, card.epoch))
        if known is not None and not known.retired:
            return
        if known is not None:
            raise WorkerLost(
                f"{card.worker_id} still owes {known.open_reads} reads that never finished; it is asked nothing new."
            )
        check_congruent(self._classes, card.classes)
        self.disconnect(card.worker_id)
        with self._lock:
            try:
                # NIXL reads from its own memory under its own name, without being introduced.
                name = self._agent_name
                if card.agent != self._agent_name:
                    name = self._agent.add_remote_agent(card.metadata)
            except Exception as error:
                self._forget(card.agent)  # half of it may have been taken in
                raise WorkerLost(f"{card.worker_id} cannot be reached over NIXL: {error}") from error
            if (name.decode() if isinstance(name, bytes) else name) != card.agent:
                self._forget(card.agent)
                raise WorkerLost(f"{card.worker_id} calls itself {card.agent} but its connection data says {name!r}.")
            try:
                lists = {
                    c.name: self._agent.prep_xfer_dlist(card.agent, _rows(c, card.device), card.memory)
                    for c in card.classes
                }
            except Exception as error:
                self._forget(card.agent)
                raise LayoutMismatch(
                    f"{card.worker_id} describes memory that it has not registered: {error}"
                ) from error
        counts = {c.name: num_items(c) for c in card.classes}
        self._peers[card.worker_id, card.epoch] = _Peer(card, lists, counts)
        log.info("peer_connected", peer=card.worker_id, epoch=card.epoch, agent=card.agent)

    def read(self, card: OwnerCard, page_class: PageClass, remote: Sequence[int], local: Sequence[int]) -> NixlRead:
        peer = self._peers.get((card.worker_id, card.epoch))
        if peer is None or peer.retired:
            raise WorkerLost(f"{card.worker_id} of epoch {card.epoch:#x} is not connected.")
        ours = next(c for c in self._classes if c.name is page_class)
        regions = len(ours.regions)
        local_indices = _indices(regions, num_items(ours), local)
        remote_indices = _indices(regions, peer.num_items[page_class], remote)
        with self._lock:
            try:
                handle = self._agent.make_prepped_xfer(
                    "READ", self._lists[page_class], local_indices, peer.lists[page_class], remote_indices, b""
                )
            except Exception as error:
                raise WorkerLost(f"{card.worker_id} does not take a read: {error}") from error
            failure: Exception | None = None
            try:
                status = self._agent.transfer(handle)
            except Exception as error:
                status, failure = "ERR", error
        peer.open_reads += 1
        read = NixlRead(self, peer, handle, status)
        # Descriptors posted before the one that failed may still be landing: then the read settles later.
        if failure is not None and read.poll() is ReadState.FAILED:
            raise WorkerLost(f"{card.worker_id} does not take a read: {failure}") from failure
        return read

    def disconnect(self, worker_id: str) -> None:
        """Refuse new reads from every life of this worker; its agents go when their last read is closed."""
        for peer in [peer for peer in self._peers.values() if peer.card.worker_id == worker_id]:
            peer.retired = True
            self._remove_if_quiet(peer)

    def close(self) -> None:
        """Stop serving and reading. The registered memory must outlive every read that has not settled."""
        self._closing.set()
        if self._progress is not None and self._progress.ident is not None:
            self._progress.join(timeout=5)
        for worker_id in {worker_id for worker_id, _ in self._peers}:
            self.disconnect(worker_id)
        with self._lock:
            for prepared in self._lists.values():
                prepared.release()
            self._lists.clear()
            if self._registered is not None and not self._peers:
                self._agent.deregister_memory(self._registered)
                self._registered = None

    def _poll(self, handle: Any) -> str:
        with self._lock:
            return str(self._agent.check_xfer_state(handle))

    def _release(self, peer: _Peer, handle: Any) -> None:
        with self._lock:
            handle.release()
        peer.open_reads -= 1
        if peer.retired:
            self._remove_if_quiet(peer)

    def _remove_if_quiet(self, peer: _Peer) -> None:
        if peer.open_reads:
            return
        if self._peers.pop((peer.card.worker_id, peer.card.epoch), None) is not None:
            with self._lock:
                for prepared in peer.lists.values():
                    prepared.release()
                self._forget(peer.card.agent)

    def _forget(self, agent: str) -> None:
        if agent == self._agent_name or any(peer.card.agent == agent for peer in self._peers.values()):
            return
        # A dead peer's agent may already be gone from NIXL's tables.
        with contextlib.suppress(Exception):
            self._agent.remove_remote_agent(agent)

    def _drive(self) -> None:
        while not self._closing.wait(PROGRESS_INTERVAL_S):
            # While our own read is being posted or polled the agent makes progress anyway.
            if self._lock.acquire(blocking=False):
                try:
                    self._agent.get_new_notifs()
                except Exception as error:
                    log.warning("nixl_progress_failed", error=str(error))
                finally:
                    self._lock.release()


class NixlRead:
    def __init__(self, transport: NixlTransport, peer: _Peer, handle: Any, status: str) -> None:
        self._transport = transport
        self._peer = peer
        self._handle = handle
        self._status = status
        self._closed = False

    def poll(self) -> ReadState:
        if self._status == "PROC":
            try:
                self._status = self._transport._poll(self._handle)
            except Exception as error:
                log.warning("nixl_read_failed", peer=self._peer.card.worker_id, error=str(error))
                self._status = "ERR"
        if self._status == "DONE":
            return ReadState.DONE
        if self._status == "PROC":
            return ReadState.RUNNING
        # One descriptor failed. Others of this handle may still be landing, and NIXL refuses to release a
        # handle that is active: only a released one has settled.
        if not self._closed:
            try:
                self.close()
            except Exception:
                return ReadState.RUNNING
        return ReadState.FAILED

    def close(self) -> None:
        if self._status == "PROC":
            raise ValueError("a running read can not be closed; its bytes may still land")
        if not self._closed:
            self._transport._release(self._peer, self._handle)
            self._closed = True


def _ranges(classes: Sequence[RegionClass]) -> list[tuple[int, int]]:
    """(address, bytes) of every region, overlapping ones joined: NIXL crashes on giving back memory it knows twice."""
    joined: list[tuple[int, int]] = []
    for start, size in sorted((r.address, r.item_bytes * r.num_items) for c in classes for r in c.regions):
        if joined and start < sum(joined[-1]):
            first = joined[-1][0]
            joined[-1] = (first, max(sum(joined[-1]), start + size) - first)
        else:
            joined.append((start, size))
    return joined


def _rows(region_class: RegionClass, device: int) -> npt.NDArray[np.uint64]:
    """[regions, 5] of (address, length, device, stride, count)."""
    count = num_items(region_class)
    return np.array(
        [[r.address, r.item_bytes, device, r.item_bytes, count] for r in region_class.regions], dtype=np.uint64
    )


def _indices(regions: int, count: int, items: Sequence[int]) -> npt.NDArray[np.int32]:
    """Descriptors of `items` in every region, region by region: [regions * len(items)]."""
    starts = np.arange(regions, dtype=np.int64)[:, None] * count
    return (starts + np.asarray(items, dtype=np.int64)[None, :]).ravel().astype(np.int32)
