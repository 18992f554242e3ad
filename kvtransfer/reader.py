"""Pulls offered pages into our own pools, verifies them, and knows when their memory is quiet.

`ReaderCore` decides; it has no clock, no threads and no transport. `Reader` is the thread that owns a
transport and carries the decisions out. Neither knows what a page means.

A destination is *unsettled* while a read into it is in the air. When a job ends early (cancelled, failed, its
owner frozen) the caller learns which of its items are unsettled and sets them aside; they come back through
`on_settled`, when the handles themselves say so. No timer ever does.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from kvtransfer.plan import MAX_SLICE_BYTES, Slice, plan
from kvtransfer.transport import ReadHandle, ReadState, Transport
from wire.errors import Cancelled, PenumbraError, TransferFailed, WorkerLost
from wire.types import OwnerCard, PageClass, PageGroup, RegionClass

PROGRESS_DEADLINE_S = 2.0
"""An owner none of whose reads finishes for this long is treated as dead."""

MAX_GAP_S = 0.25
"""Longest time between two looks that counts against an owner: a pause of our own process is not its fault."""

MAX_READS_PER_PEER = 4

MIN_POLL_S = 0.0001
MAX_POLL_S = 0.002
IDLE_POLL_S = 0.05
"""Between two looks at reads in the air: from the first to the second while jobs wait, the last for orphans."""

Item = tuple[PageClass, int]
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadJob:
    """Read these groups from this owner. local[page_class][position] is our item for the page."""

    job_id: str
    card: OwnerCard
    groups: tuple[PageGroup, ...]
    local: Mapping[PageClass, Mapping[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadResult:
    """How a job ended. With `ok` every page arrived and matched its checksum; otherwise `error` says why not.

    `unsettled` items may still be written: give them to nobody until `on_settled` names them.
    """

    job_id: str
    ok: bool
    error: PenumbraError | None = None
    unsettled: tuple[Item, ...] = ()
    num_bytes: int = 0  # read and verified
    seconds: float = 0.0  # since the job was submitted


# What happens to the core, and what it asks for.


@dataclass(frozen=True, slots=True)
class Submit:
    job: ReadJob


@dataclass(frozen=True, slots=True)
class Cancel:
    job_id: str


@dataclass(frozen=True, slots=True)
class PostFailed:
    """These reads never began: nothing of theirs is in the air."""

    read_ids: tuple[int, ...]
    error: PenumbraError


@dataclass(frozen=True, slots=True)
class Polled:
    read_id: int
    state: ReadState


@dataclass(frozen=True, slots=True)
class Verified:
    """`bad` holds those of the read's local items whose bytes do not match."""

    read_id: int
    bad: tuple[int, ...] = ()
    error: PenumbraError | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Every running read has just been polled."""


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Event = Submit | Cancel | PostFailed | Polled | Verified | Tick | Stop


@dataclass(frozen=True, slots=True)
class Post:
    read_id: int
    card: OwnerCard
    part: Slice


@dataclass(frozen=True, slots=True)
class Verify:
    read_id: int
    part: Slice


@dataclass(frozen=True, slots=True)
class Close:
    read_id: int


@dataclass(frozen=True, slots=True)
class Report:
    result: ReadResult


@dataclass(frozen=True, slots=True)
class Settled:
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    worker_id: str


Action = Post | Verify | Close | Report | Settled | Disconnect


@dataclass(slots=True)
class _Job:
    job: ReadJob
    submitted: float
    todo: deque[Slice]
    destinations: set[Item]
    running: dict[int, Slice] = field(default_factory=dict)
    verifying: dict[int, Slice] = field(default_factory=dict)
    reread: set[Item] = field(default_factory=set)
    quiet_s: float = 0.0  # observed time in which none of its running reads finished
    num_bytes: int = 0

    @property
    def peer(self) -> tuple[str, int]:
        return self.job.card.worker_id, self.job.card.epoch


class ReaderCore:
    """Decides what to read, verify, give up and report. `step` is the only way in."""

    def __init__(
        self,
        classes: Sequence[RegionClass],
        *,
        max_slice_bytes: int = MAX_SLICE_BYTES,
        progress_deadline_s: float = PROGRESS_DEADLINE_S,
    ) -> None:
        self._classes = tuple(classes)
        self._max_slice_bytes = max_slice_bytes
        self._deadline_s = progress_deadline_s
        self._jobs: dict[str, _Job] = {}
        self._orphans: dict[int, tuple[tuple[str, int], Slice]] = {}
        self._taken: set[Item] = set()  # destinations of jobs and of orphans
        self._in_flight: dict[tuple[str, int], int] = {}
        self._next_read = 0
        self._last_tick: float | None = None

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._jobs)

    @property
    def unsettled(self) -> tuple[Item, ...]:
        """Destinations of reads whose job is over."""
        return tuple(item for _, part in self._orphans.values() for item in _items(part))

    def step(self, now: float, event: Event) -> list[Action]:
        """What to do after `event`, in order. `now` is any monotonic clock in seconds."""
        actions: list[Action] = []
        match event:
            case Submit(job):
                self._submit(now, job, actions)
            case Cancel(job_id):
                if job_id in self._jobs:
                    self._fail(now, job_id, Cancelled("The read was cancelled."), actions)
            case PostFailed(read_ids, error):
                self._post_failed(now, read_ids, error, actions)
            case Polled(read_id, state):
                if state is not ReadState.RUNNING:
                    self._settle(now, read_id, state, actions)
            case Verified(read_id, bad, error):
                self._verified(now, read_id, bad, error, actions)
            case Tick():
                self._watch(now, actions)
            case Stop():
                for job_id in list(self._jobs):
                    self._fail(now, job_id, Cancelled("The reader is stopping."), actions)
        self._post(actions)
        return actions

    def _submit(self, now: float, job: ReadJob, actions: list[Action]) -> None:
        assert job.job_id not in self._jobs, f"job {job.job_id} was submitted twice"
        try:
            slices = plan(job.groups, job.local, self._classes, job.card.classes, self._max_slice_bytes)
            destinations = {item for part in slices for item in _items(part)}
            if clash := destinations & self._taken:
                page_class, item = min(clash)
                raise TransferFailed(
                    f"{len(clash)} destination pages, {page_class} {item} first, belong to an unfinished read."
                )
        except PenumbraError as error:
            actions.append(Report(ReadResult(job_id=job.job_id, ok=False, error=error)))
            return
        self._taken |= destinations
        self._jobs[job.job_id] = _Job(job, now, deque(slices), destinations)
        self._finish_if_done(now, job.job_id, actions)

    def _post(self, actions: list[Action]) -> None:
        """Hand out reads, to the job with the fewest in the air first: a long job holds up no short one."""
        while True:
            ready = [
                entry
                for entry in self._jobs.values()
                if entry.todo and self._in_flight.get(entry.peer, 0) < MAX_READS_PER_PEER
            ]
            if not ready:
                return
            entry = min(ready, key=lambda entry: len(entry.running))
            if not entry.running:
                entry.quiet_s = 0.0
            read_id, self._next_read = self._next_read, self._next_read + 1
            part = entry.todo.popleft()
            entry.running[read_id] = part
            self._in_flight[entry.peer] = self._in_flight.get(entry.peer, 0) + 1
            actions.append(Post(read_id, entry.job.card, part))

    def _owner_of(self, read_id: int) -> _Job | None:
        return next((entry for entry in self._jobs.values() if read_id in entry.running), None)

    def _landed(self, peer: tuple[str, int]) -> None:
        self._in_flight[peer] -= 1
        if not self._in_flight[peer]:
            del self._in_flight[peer]

    def _post_failed(self, now: float, read_ids: Sequence[int], error: PenumbraError, actions: list[Action]) -> None:
        failed: dict[str, _Job] = {}
        for read_id in read_ids:
            entry = self._owner_of(read_id)
            if entry is None:
                self._orphan_settled(read_id, actions)
                continue
            del entry.running[read_id]
            self._landed(entry.peer)
            failed[entry.job.job_id] = entry
        if isinstance(error, WorkerLost):
            workers = dict.fromkeys(entry.job.card.worker_id for entry in failed.values())
            actions.extend(Disconnect(worker_id) for worker_id in workers)
        for job_id in failed:
            self._fail(now, job_id, error, actions)

    def _settle(self, now: float, read_id: int, state: ReadState, actions: list[Action]) -> None:
        actions.append(Close(read_id))
        entry = self._owner_of(read_id)
        if entry is None:
            self._orphan_settled(read_id, actions)
            return
        part = entry.running.pop(read_id)
        self._landed(entry.peer)
        entry.quiet_s = 0.0
        if state is ReadState.DONE:
            entry.verifying[read_id] = part
            actions.append(Verify(read_id, part))
            return
        worker_id = entry.job.card.worker_id
        actions.append(Disconnect(worker_id))
        error = TransferFailed(f"A read of {len(part.remote)} {part.page_class} pages from {worker_id} failed.")
        self._fail(now, entry.job.job_id, error, actions)

    def _orphan_settled(self, read_id: int, actions: list[Action]) -> None:
        if read_id not in self._orphans:
            return
        peer, part = self._orphans.pop(read_id)
        self._landed(peer)
        items = _items(part)
        self._taken.difference_update(items)
        actions.append(Settled(items))

    def _verified(
        self, now: float, read_id: int, bad: Sequence[int], error: PenumbraError | None, actions: list[Action]
    ) -> None:
        entry = next((entry for entry in self._jobs.values() if read_id in entry.verifying), None)
        if entry is None:
            return
        part = entry.verifying.pop(read_id)
        if error is not None:
            self._fail(now, entry.job.job_id, error, actions)
            return
        size = part.num_bytes // len(part.local)
        entry.num_bytes += size * (len(part.local) - len(bad))
        if bad:
            wrong = {(part.page_class, item) for item in bad}
            if wrong & entry.reread:
                failure = TransferFailed(
                    f"{len(wrong)} of {len(entry.destinations)} pages from {entry.job.card.worker_id} do not match "
                    f"their checksums, read twice. Prefill this prompt again."
                )
                self._fail(now, entry.job.job_id, failure, actions)
                return
            entry.reread |= wrong
            again = [i for i, item in enumerate(part.local) if (part.page_class, item) in wrong]
            entry.todo.appendleft(
                Slice(
                    page_class=part.page_class,
                    remote=tuple(part.remote[i] for i in again),
                    local=tuple(part.local[i] for i in again),
                    checksums=tuple(part.checksums[i] for i in again),
                    num_bytes=size * len(again),
                )
            )
        self._finish_if_done(now, entry.job.job_id, actions)

    def _finish_if_done(self, now: float, job_id: str, actions: list[Action]) -> None:
        entry = self._jobs[job_id]
        if entry.todo or entry.running or entry.verifying:
            return
        del self._jobs[job_id]
        self._taken -= entry.destinations
        actions.append(
            Report(ReadResult(job_id=job_id, ok=True, num_bytes=entry.num_bytes, seconds=now - entry.submitted))
        )

    def _fail(self, now: float, job_id: str, error: PenumbraError, actions: list[Action]) -> None:
        entry = self._jobs.pop(job_id)
        unsettled = tuple(item for part in entry.running.values() for item in _items(part))
        self._taken -= entry.destinations - set(unsettled)
        for read_id, part in entry.running.items():
            self._orphans[read_id] = (entry.peer, part)
        actions.append(
            Report(
                ReadResult(
                    job_id=job_id,
                    ok=False,
                    error=error,
                    unsettled=unsettled,
                    num_bytes=entry.num_bytes,
                    seconds=now - entry.submitted,
                )
            )
        )

    def _watch(self, now: float, actions: list[Action]) -> None:
        gap = 0.0 if self._last_tick is None else min(now - self._last_tick, MAX_GAP_S)
        self._last_tick = now
        frozen: set[tuple[str, int]] = set()
        for entry in self._jobs.values():
            if entry.running:
                entry.quiet_s += gap
                if entry.quiet_s >= self._deadline_s:
                    frozen.add(entry.peer)
        for worker_id, epoch in sorted(frozen):
            # Whoever waits behind the stuck reads would wait for nothing.
            for job_id in [j for j, entry in self._jobs.items() if entry.peer == (worker_id, epoch)]:
                error = TransferFailed(
                    f"No read from {worker_id} finished for {self._deadline_s:g} s; it is treated as dead."
                )
                self._fail(now, job_id, error, actions)
            actions.append(Disconnect(worker_id))


def _items(part: Slice) -> tuple[Item, ...]:
    return tuple((part.page_class, item) for item in part.local)


class Reader:
    """The thread that owns a registered transport and reads, verifies and reports.

    verify(page_class, items, checksums) returns those of our items whose bytes differ; it, `on_result` and
    `on_settled` are called on the reader's thread and must not block for long. Every submitted job gets exactly
    one result.
    """

    def __init__(
        self,
        transport: Transport,
        classes: Sequence[RegionClass],
        verify: Callable[[PageClass, Sequence[int], Sequence[int]], list[int]],
        on_result: Callable[[ReadResult], None],
        on_settled: Callable[[tuple[Item, ...]], None],
        *,
        max_slice_bytes: int = MAX_SLICE_BYTES,
        progress_deadline_s: float = PROGRESS_DEADLINE_S,
    ) -> None:
        """`classes` are the regions `transport` has registered. The caller closes the transport after `stop`."""
        self._core = ReaderCore(classes, max_slice_bytes=max_slice_bytes, progress_deadline_s=progress_deadline_s)
        self._transport = transport
        self._verify = verify
        self._on_result = on_result
        self._on_settled = on_settled
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._events: deque[Event] = deque()
        self._running: dict[int, ReadHandle] = {}
        self._lock = threading.Lock()  # guards the next three
        self._submitted: dict[str, ReadJob] = {}
        self._closed_by: BaseException | str | None = None
        self._stop_at = float("inf")
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kv-reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: ReadJob) -> None:
        """Thread-safe. Raises ValueError for a job id that is still being read, WorkerLost once stopped."""
        with self._lock:
            if self._closed_by is not None:
                raise WorkerLost(f"This worker's reader has ended ({self._closed_by}); ask another worker.")
            if job.job_id in self._submitted:
                raise ValueError(f"job {job.job_id} is already being read")
            self._submitted[job.job_id] = job
            self._inbox.put(Submit(job))

    def cancel(self, job_id: str) -> None:
        """Thread-safe; does nothing when the job is over. Its result, if still due, carries Cancelled."""
        self._inbox.put(Cancel(job_id))

    def stop(self, timeout_s: float) -> tuple[Item, ...]:
        """Cancel every job, wait up to `timeout_s` for reads in the air, end the thread.

        Returns the items still unsettled: their memory must stay mapped for as long as the process lives.
        """
        with self._lock:
            if self._closed_by is None:
                self._closed_by = "stopped"
                self._stop_at = time.monotonic() + timeout_s
                self._inbox.put(Stop())
        if self._thread.ident is not None:
            self._thread.join(timeout_s + 1.0)
            if self._thread.is_alive():
                log.error("reader_stuck", timeout_s=timeout_s, running=len(self._running))
        return self._core.unsettled

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # A bug of ours. Nobody may wait for an answer that can not come, nor reuse what may be written.
            log.critical("reader_died", exc_info=error)
            with self._lock:
                self._closed_by = error
                waiting, self._submitted = self._submitted, {}
            for job in waiting.values():
                everything = tuple((c, item) for c, places in job.local.items() for item in places.values())
                dead = PenumbraError("This worker's reader died; its log says why. Restart the worker.")
                result = ReadResult(job_id=job.job_id, ok=False, error=dead, unsettled=everything)
                self._tell(self._on_result, result)

    def _loop(self) -> None:
        pause_s = MIN_POLL_S
        while not (self._stopped and (not self._running or time.monotonic() >= self._stop_at)):
            self._receive(0.0 if self._events else pause_s)
            busy = bool(self._events)
            if busy:
                # One at a time, then the inbox again: a long job must not keep a cancel waiting.
                self._step(self._events.popleft())
            busy |= self._sweep()
            if busy:
                pause_s = MIN_POLL_S
            elif self._core.job_ids:
                pause_s = min(2 * pause_s, MAX_POLL_S)
            else:
                pause_s = IDLE_POLL_S if self._running else 1.0

    def _receive(self, wait_s: float) -> None:
        try:
            self._events.append(self._inbox.get(block=wait_s > 0, timeout=wait_s or None))
            while True:
                self._events.append(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _sweep(self) -> bool:
        """Poll every read in the air, then let the core look at the time. True when something settled."""
        settled = False
        for read_id, handle in list(self._running.items()):
            state = handle.poll()
            if state is not ReadState.RUNNING:
                settled = True
                self._step(Polled(read_id, state))
        self._step(Tick())
        return settled

    def _step(self, event: Event) -> None:
        refused: dict[tuple[str, int], PostFailed] = {}
        for action in self._core.step(time.monotonic(), event):
            if isinstance(action, Post):
                # An owner that refused one read is not asked for the others of this step.
                peer = action.card.worker_id, action.card.epoch
                failure = refused.get(peer) or self._post(action)
                if failure is not None:
                    reads = (*failure.read_ids, action.read_id) if peer in refused else failure.read_ids
                    refused[peer] = PostFailed(reads, failure.error)
            else:
                self._perform(action)
        self._events.extend(refused.values())
        self._stopped |= isinstance(event, Stop)

    def _post(self, post: Post) -> PostFailed | None:
        part = post.part
        try:
            self._transport.connect(post.card)
            self._running[post.read_id] = self._transport.read(post.card, part.page_class, part.remote, part.local)
        except PenumbraError as error:
            return PostFailed((post.read_id,), error)
        return None

    def _perform(self, action: Action) -> None:
        match action:
            case Verify(read_id, part):
                try:
                    bad = tuple(self._verify(part.page_class, part.local, part.checksums))
                    self._events.append(Verified(read_id, bad))
                except Exception as error:
                    log.error("verify_failed", exc_info=error)
                    failure = TransferFailed(f"The pages could not be verified: {error}")
                    self._events.append(Verified(read_id, error=failure))
            case Close(read_id):
                self._running.pop(read_id).close()
            case Report(result):
                with self._lock:
                    self._submitted.pop(result.job_id, None)
                self._tell(self._on_result, result)
            case Settled(items):
                self._tell(self._on_settled, items)
            case Disconnect(worker_id):
                self._transport.disconnect(worker_id)

    def _tell(self, callback: Callable[[T], None], what: T) -> None:
        try:
            callback(what)
        except Exception as error:
            log.error("reader_callback_failed", exc_info=error)
