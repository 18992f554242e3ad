"""The owner's side of a transfer: who may read which request's pages, and until when.

The table decides, it never touches memory. Pages of a run stay in place until the table returns a `Freed` for
it; so a claim it calls valid was never undercut, and no page can be pinned by a reader that is gone. Every
method takes the time (monotonic seconds) from its caller, and mutates nothing when it raises.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeVar

from wire.errors import (
    Cancelled,
    ClaimRefused,
    LayoutMismatch,
    Overloaded,
    PenumbraError,
    StaleAttempt,
    WorkerLost,
)
from wire.types import PAGE_TOKENS, AttemptId, ClaimRequest, OwnerCard, PageClass, PageGroup, PageOffer, Tail

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLimits:
    """How long pages wait for whom, on the owner's own clock, and how much the table holds."""

    early_claim_s: float = 10.0  # a claim may arrive this long before its run
    grace_s: float = 10.0  # after a claim's stream broke
    unclaimed_s: float = 30.0  # after the run finished, for somebody to claim it
    read_s: float = 300.0  # after the run finished, for a living reader to release
    tombstone_s: float = 60.0  # what ended is remembered, so that late messages find it ended
    max_runs: int = 4096
    held_bytes: int = 1 << 62  # of pages that were read and stay for another reader; the oldest go first
    max_early_claims: int = 1024
    max_tombstones: int = 65536


class Freed(NamedTuple):
    """This run's pages may go. `error` says why, when the run was not simply read and released."""

    run: AttemptId
    error: PenumbraError | None


class _State(Enum):
    EARLY = "early"  # its run has not arrived; the secret is not yet checked
    OPEN = "open"  # its stream lives, which is what renews it
    BROKEN = "broken"  # its stream is gone; a release is still welcome
    ENDED = "ended"


@dataclass(slots=True)
class _Claim:
    claim_id: str
    run: AttemptId
    secret: bytes = field(repr=False)
    from_token: int
    state: _State
    deadline: float | None  # EARLY and BROKEN: when it ends
    error: PenumbraError | None = None  # ENDED: why; None after a release


@dataclass(slots=True)
class _Run:
    id: AttemptId
    secret: bytes = field(repr=False)
    skip: int
    claim: _Claim | None = None
    payloads: list[tuple[tuple[PageGroup, ...], Tail | None]] = field(default_factory=list)
    complete: bool = False  # the tail is among the payloads
    finished_at: float | None = None
    hold: bool = False  # somebody wants the pages to stay after they were read
    was_read: bool = False  # and they were; only held

    def deadline(self, limits: ClaimLimits) -> float | None:
        """When the pages go without anyone's word."""
        if self.claim is not None and self.claim.state is _State.BROKEN:
            return self.claim.deadline
        if self.finished_at is None or self.was_read:
            return None  # the run's own stream bounds the computation
        return self.finished_at + (limits.unclaimed_s if self.claim is None else limits.read_s)


@dataclass(frozen=True, slots=True)
class _Outcome:
    secret: bytes
    valid: bool
    until: float


@dataclass(frozen=True, slots=True)
class TableCounts:
    runs: int
    early_claims: int
    open_claims: int
    tombstones: int
    held: int  # of the runs: read, and kept for another reader


class ClaimTable:
    """Runs whose pages this worker holds, and the claims on them; at most one claim to a run, ever.

    A run is expected, offers are appended, a reader opens its claim before or after, its stream breaks or it
    releases; expiry sweeps every entry. A run that is also held outlives its reader, until it is let go or others
    need the room. Each call that ends a run's stay returns its `Freed` exactly once.
    """

    def __init__(self, card: OwnerCard, limits: ClaimLimits | None = None) -> None:
        self._card = card
        self._limits = limits or ClaimLimits()
        self._runs: dict[AttemptId, _Run] = {}
        self._claims: dict[str, _Claim] = {}
        self._latest: dict[str, tuple[int, float]] = {}  # request -> newest ended attempt, until when
        self._abandoned: dict[AttemptId, tuple[bytes, float]] = {}  # by their readers, before the run came
        self._outcomes: dict[str, _Outcome] = {}  # claim id -> how it ended

    # The run's side.

    def expect(self, now_s: float, run: AttemptId, secret: bytes, skip: int) -> list[Freed]:
        """A run was accepted: whoever shows `secret` may claim its pages from token `skip` on.

        Returns older attempts of the same request, which end here. Raises StaleAttempt for an attempt seen
        before, Cancelled when its reader has already given it up, Overloaded when the table is full.
        """
        abandoned = self._abandoned.get(run)
        if abandoned is not None and hmac.compare_digest(abandoned[0], secret):
            raise Cancelled(f"run {run} was given up by its decode worker before it arrived")
        live = [other for other in self._runs if other.request_id == run.request_id]
        ended = self._latest.get(run.request_id)
        newest = max([other.attempt for other in live] + ([ended[0]] if ended else []), default=-1)
        if run.attempt <= newest:
            raise StaleAttempt(f"run {run} comes after attempt {newest} of that request; send a higher attempt")
        if len(self._runs) - len(live) >= self._limits.max_runs:
            raise Overloaded(f"{len(self._runs)} runs hold pages here, the most this worker allows; try another")
        freed = []
        for other in live:
            freed += self.revoke(now_s, other, StaleAttempt(f"run {other} was overtaken by attempt {run.attempt}"))
        entry = self._runs[run] = _Run(run, secret, skip)
        for claim in [c for c in self._claims.values() if c.run == run and c.state is _State.EARLY]:
            refusal = self._refusal(entry, claim.secret, claim.from_token)
            if refusal is None:
                claim.state, claim.deadline, entry.claim = _State.OPEN, None, claim
            else:
                self._end(now_s, claim, refusal, valid=False)
        return freed

    def offer(self, now_s: float, run: AttemptId, groups: tuple[PageGroup, ...], tail: Tail | None) -> None:
        """Pages of a run became ready; `tail` comes with the last. Ignored for a run that no longer holds
        pages.
        """
        entry = self._runs.get(run)
        if entry is None:
            return
        assert not entry.complete, f"run {run} offers pages after its tail"
        entry.payloads.append((groups, tail))
        entry.complete = tail is not None

    def finished(self, now_s: float, run: AttemptId) -> None:
        """The computation is over; from here on the pages only wait for their reader."""
        if run in self._runs:
            self._runs[run].finished_at = now_s

    def hold(self, run: AttemptId) -> None:
        """Whoever asked for the run waits to see how its reader fares: the pages stay when they have been read."""
        if run in self._runs:
            self._runs[run].hold = True

    def is_held(self, run: AttemptId) -> bool:
        return run in self._runs and self._runs[run].hold

    def let_go(self, now_s: float, run: AttemptId) -> list[Freed]:
        """Nobody will ask for the run again. One that still has a reader waits for that."""
        entry = self._runs.get(run)
        if entry is None:
            return []
        entry.hold = False
        return [self._free(now_s, entry, None, valid=True)] if entry.was_read else []

    def make_room(self, now_s: float) -> list[Freed]:
        """Others need the room: the run that has been held longest goes, if there is one."""
        held = min((run for run in self._runs.values() if run.was_read), key=_since, default=None)
        return [] if held is None else [self._free(now_s, held, None, valid=True)]

    def revoke(self, now_s: float, run: AttemptId, error: PenumbraError) -> list[Freed]:
        """The run failed or was cancelled: its claim ends with `error` and its pages may go at once."""
        return [] if run not in self._runs else [self._free(now_s, self._runs[run], error, valid=False)]

    # The reader's side.

    def open(self, now_s: float, claim_id: str, request: ClaimRequest) -> None:
        """A reader asks for a run's pages; `claim_id` is fresh and unguessable.

        A claim that comes before its run is held for `early_claim_s`, its secret checked when the run
        arrives. Raises LayoutMismatch, StaleAttempt, ClaimRefused or Overloaded.
        """
        assert claim_id not in self._claims, f"claim id {claim_id} used twice"
        run = AttemptId(request.request_id, request.attempt)
        if request.signature != self._card.signature:
            raise LayoutMismatch(
                f"reader {request.reader_id} has page layout {request.signature[:12]}, this worker "
                f"{self._card.signature[:12]}. Serve both with the same checkpoint, --kv-layout and version."
            )
        entry = self._runs.get(run)
        if entry is not None:
            refusal = self._refusal(entry, request.secret, request.from_token)
            if refusal is not None:
                raise refusal
            claim = _Claim(claim_id, run, request.secret, request.from_token, _State.OPEN, None)
            entry.claim = claim
        else:
            ended = self._latest.get(run.request_id)
            overtaken = any(o.request_id == run.request_id and o.attempt > run.attempt for o in self._runs)
            if overtaken or (ended is not None and run.attempt <= ended[0]) or run in self._abandoned:
                raise StaleAttempt(f"run {run} has ended here; its pages are gone")
            early = sum(c.state is _State.EARLY for c in self._claims.values())
            if early >= self._limits.max_early_claims:
                raise Overloaded(f"{early} claims wait for their runs here, the most this worker allows; try again")
            deadline = now_s + self._limits.early_claim_s
            claim = _Claim(claim_id, run, request.secret, request.from_token, _State.EARLY, deadline)
        self._claims[claim_id] = claim

    def offers(self, claim_id: str, from_seq: int) -> list[PageOffer] | None:
        """Offers of an open claim from `from_seq` on: 0 is the owner's card, then every payload in order.

        Empty while there is nothing new, None once the claim is released. Raises what else the claim ended
        with.
        """
        claim = self._claims[claim_id]
        if claim.state is _State.ENDED:
            if claim.error is not None:
                raise claim.error
            return None
        if claim.state is _State.EARLY:
            return []
        payloads = self._runs[claim.run].payloads
        card = [PageOffer(seq=0, claim_id=claim_id, owner=self._card)] if from_seq == 0 else []
        first = max(from_seq, 1)
        return card + [
            PageOffer(seq=seq, claim_id=claim_id, groups=groups, tail=tail)
            for seq, (groups, tail) in enumerate(payloads[first - 1 :], start=first)
        ]

    def broken(self, now_s: float, claim_id: str) -> None:
        """The claim's stream is gone; the shell says so exactly once for every claim it opened.

        The reader may still be reading: an open claim's pages stay for `grace_s`. A claim that ended, or
        whose run never came, is forgotten.
        """
        claim = self._claims[claim_id]
        if claim.state is _State.OPEN:
            claim.state, claim.deadline = _State.BROKEN, now_s + self._limits.grace_s
        else:
            del self._claims[claim_id]

    def release(self, now_s: float, claim_id: str, secret: bytes) -> tuple[bool, list[Freed]]:
        """The reader is done, or gives up. Answers whether the claim was valid from its first offer until
        now.

        Idempotent: for `tombstone_s` a repeated release gets the same answer and frees nothing; later, and
        for ids never given out, the answer is False. Raises ClaimRefused for a wrong secret.
        """
        claim, outcome = self._claims.get(claim_id), self._outcomes.get(claim_id)
        known = outcome.secret if outcome is not None else claim.secret if claim is not None else None
        if known is None:
            return False, []
        if not hmac.compare_digest(known, secret):
            raise ClaimRefused(f"claim {claim_id} can not be released with this secret")
        if outcome is not None:
            return outcome.valid, []
        if claim is None or claim.state is _State.ENDED:
            return False, []  # how it ended is forgotten, though its stream still lives
        if claim.state is _State.EARLY:
            self._abandoned[claim.run] = (claim.secret, now_s + self._limits.tombstone_s)
            self._cap(self._abandoned)
            self._end(now_s, claim, None, valid=False)
            return False, []
        entry = self._runs[claim.run]
        if entry.hold and entry.complete:
            return True, self._keep(now_s, entry, None)
        unread = None if entry.complete else Cancelled(f"the reader of run {claim.run} gave up its claim")
        return True, [self._free(now_s, entry, unread, valid=True)]

    # Time.

    def expire(self, now_s: float) -> list[Freed]:
        """End everything whose time is over. Looks at every entry: deadlines are in no order."""
        for claim in list(self._claims.values()):
            if claim.state is _State.EARLY and claim.deadline is not None and claim.deadline <= now_s:
                error = ClaimRefused(f"no run {claim.run} arrived within {self._limits.early_claim_s:g} s")
                self._end(now_s, claim, error, valid=False)
        freed = []
        for entry in list(self._runs.values()):
            deadline = entry.deadline(self._limits)
            if deadline is None or deadline > now_s:
                continue
            if entry.hold and entry.complete and entry.claim is not None:
                # The reader is gone, not the one who will send the next.
                freed += self._keep(now_s, entry, self._expiry_error(entry))
            else:
                freed.append(self._free(now_s, entry, self._expiry_error(entry), valid=False))
        self._latest = {k: v for k, v in self._latest.items() if v[1] > now_s}
        self._abandoned = {k: v for k, v in self._abandoned.items() if v[1] > now_s}
        self._outcomes = {k: v for k, v in self._outcomes.items() if v.until > now_s}
        return freed

    def next_deadline(self) -> float | None:
        """When `expire` next has pages or a waiting claim to end; forgetting what ended needs no timer."""
        times = [run.deadline(self._limits) for run in self._runs.values()]
        times += [c.deadline for c in self._claims.values() if c.state is _State.EARLY]
        return min((t for t in times if t is not None), default=None)

    def runs(self) -> list[AttemptId]:
        """Runs whose pages are held, oldest first."""
        return list(self._runs)

    def counts(self) -> TableCounts:
        states = [claim.state for claim in self._claims.values()]
        return TableCounts(
            runs=len(self._runs),
            early_claims=states.count(_State.EARLY),
            open_claims=states.count(_State.OPEN) + states.count(_State.BROKEN),
            tombstones=len(self._latest) + len(self._abandoned) + len(self._outcomes),
            held=sum(run.was_read for run in self._runs.values()),
        )

    # Inside.

    def _refusal(self, entry: _Run, secret: bytes, from_token: int) -> PenumbraError | None:
        """Why this claim may not have this run. The secret comes first: without it nothing is told."""
        if not hmac.compare_digest(entry.secret, secret):
            return ClaimRefused(f"run {entry.id} can not be claimed with this secret")
        if entry.claim is not None or entry.was_read:
            return StaleAttempt(f"run {entry.id} has been claimed before; retry with a new attempt")
        if from_token != entry.skip:
            return ClaimRefused(
                f"run {entry.id} offers pages from token {entry.skip}, the claim wants them from {from_token}"
            )
        return None

    def _expiry_error(self, entry: _Run) -> PenumbraError:
        limits = self._limits
        if entry.claim is None:
            return ClaimRefused(f"nobody claimed run {entry.id} within {limits.unclaimed_s:g} s of its end")
        if entry.claim.state is _State.BROKEN:
            return WorkerLost(
                f"the reader of run {entry.id} broke off and did not come back within {limits.grace_s:g} s"
            )
        return WorkerLost(f"the reader of run {entry.id} did not release its pages within {limits.read_s:g} s")

    def _keep(self, now_s: float, entry: _Run, error: PenumbraError | None) -> list[Freed]:
        """The claim is over and the pages stay; -> others that have to go for them, or the run itself."""
        assert entry.claim is not None
        self._end(now_s, entry.claim, error, valid=error is None)
        entry.claim, entry.was_read, entry.finished_at = None, True, now_s
        freed = []
        while sum(self._bytes(run) for run in self._runs.values() if run.was_read) > self._limits.held_bytes:
            freed += self.make_room(now_s)
        return freed

    def _bytes(self, entry: _Run) -> int:
        """Of the run's pages, those its reader held already included."""
        of_class = {cls.name: sum(region.item_bytes for region in cls.regions) for cls in self._card.classes}
        offered = sum(len(g.items) * of_class.get(g.page_class, 0) for groups, _ in entry.payloads for g in groups)
        return offered + entry.skip // PAGE_TOKENS * of_class.get(PageClass.FULL, 0)

    def _free(self, now_s: float, entry: _Run, error: PenumbraError | None, *, valid: bool) -> Freed:
        del self._runs[entry.id]
        if entry.claim is not None:
            self._end(now_s, entry.claim, error, valid=valid)
        before = self._latest.pop(entry.id.request_id, (0, 0.0))[0]
        self._latest[entry.id.request_id] = (max(before, entry.id.attempt), now_s + self._limits.tombstone_s)
        self._cap(self._latest)
        return Freed(entry.id, error)

    def _end(self, now_s: float, claim: _Claim, error: PenumbraError | None, *, valid: bool) -> None:
        # A broken claim has no stream left to tell; the others are forgotten when their stream ends.
        if claim.state is _State.BROKEN:
            del self._claims[claim.claim_id]
        claim.state, claim.deadline, claim.error = _State.ENDED, None, error
        self._outcomes[claim.claim_id] = _Outcome(claim.secret, valid, now_s + self._limits.tombstone_s)
        self._cap(self._outcomes)

    def _cap(self, remembered: dict[_K, _V]) -> None:
        """Forget the oldest rather than grow: dicts keep insertion order."""
        while len(remembered) > self._limits.max_tombstones:
            del remembered[next(iter(remembered))]


def _since(entry: _Run) -> float:
    """When the run was read; finished runs only."""
    assert entry.finished_at is not None
    return entry.finished_at
