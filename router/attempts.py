"""One request from placement to its last token, over as many attempts as it takes: what is done next.

Pure: `step(now, event) -> actions`; `relay.py` carries them out. An attempt is one pair of workers:

    Placed -> Decode.Start -> Admitted{skip, secret} -> Prefill.Run -> Progress... -> Tokens... -> Finished

A failed attempt is tried again, on other workers where there are any. From the first token on the client has been
promised a continuation, so the next attempt brings the tokens there are: its decode worker pulls the prompt's pages,
computes those tokens again and draws the one after them, with the noise it would have had anyway. The prefill worker
keeps the pages for that, for as long as the call that computed them lives:

    Placed -> Decode.Start{emitted} -> Admitted -> Prefill.Run (finds the pages) -> Replaying... -> Tokens...
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from router.config import RouterConfig
from router.placement import Placement, PlacementRules
from wire.errors import (
    DeadlineExceeded,
    Draining,
    PenumbraError,
    RequestQuarantined,
    TransferFailed,
    WorkerLost,
)
from wire.prefix import DEFAULT_TENANT, namespace
from wire.rpc import error_from_code
from wire.types import (
    PAGE_TOKENS,
    Admitted,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    Progress,
    Replaying,
    Role,
    RunEvent,
    RunFinished,
    SamplingParams,
    StartEvent,
    TokenEvent,
    Tokens,
)

GAP_WINDOW = 64
"""Gaps between tokens that the watchdog's median looks back on."""

SILENT_DECODE = "The decode worker, which computes the prompt itself, fell silent"
PLACE_AGAIN_S = 0.2
"""Between two looks for workers that could go on with an answer, while there are none."""

MAX_DRAINS = 16
"""Times a request moves because its worker is going away; that many are a rolling restart of a large pool."""

FINISH_TOKENS = 16
"""An answer that can be no longer than this stays on a worker that is going away, and ends there."""

DEADLY = 2
"""Workers that may die of one request."""

RETRY_PAUSE_S = 0.1
"""Upper end of the first pause before another attempt; doubles with each, drawn evenly from zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayRequest:
    """A request as the workers see it: ids only. `prompt` has at least one id, all below `vocab_size`.

    Prefixes are shared among requests of one tenant and `cache_salt`. `digests` are those of the prompt's pages, whole
    or cut, by the model fingerprint they were computed for; a worker of another model is taken to hold nothing.
    """

    request_id: str
    prompt: Sequence[int] = field(repr=False)
    sampling: SamplingParams
    vocab_size: int
    packed: bytes | None = field(default=None, repr=False)  # the prompt as it travels, if it is packed already
    alike: bytes = field(default=b"", repr=False)  # `quarantine.fingerprint`, where it is known
    cache_salt: str = field(default="", repr=False)
    tenant: str = DEFAULT_TENANT
    keep_s: int = 0  # how long the decode worker keeps the answer when nobody reads it any more
    context: bytes = field(default=b"", repr=False)  # and this with it
    digests: Mapping[str, Sequence[bytes]] = field(default_factory=lambda: MappingProxyType({}), repr=False)

    def namespace(self, fingerprint: str) -> bytes:
        """Within which a worker with this model may reuse pages for the request."""
        return namespace(fingerprint, self.tenant, self.cache_salt)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """How long a request may wait for what, in seconds, and how often it may start over."""

    max_attempts: int  # before the first token
    migration_limit: int  # after it
    migration_patience_s: float
    admission_s: float
    prefill_queue_s: float
    prefill_silence_s: float
    token_silence_s: float
    token_silence_factor: float
    placement: PlacementRules = PlacementRules()  # noqa: RUF009  frozen

    @classmethod
    def of(cls, config: RouterConfig) -> RelayLimits:
        return cls(
            max_attempts=config.max_attempts,
            migration_limit=config.migration_limit,
            migration_patience_s=config.migration_patience_s,
            admission_s=config.admission_timeout_s,
            prefill_queue_s=config.prefill_queue_timeout_s,
            prefill_silence_s=config.prefill_silence_s,
            token_silence_s=config.token_silence_s,
            token_silence_factor=config.token_silence_factor,
            placement=config.placement,
        )


# Events


@dataclass(frozen=True, slots=True)
class Begun:
    """The request arrived."""


@dataclass(frozen=True, slots=True)
class Placed:
    """`in_company`: another request that a worker may have died of is on one of these workers, and just as far."""

    attempt: int
    placement: Placement
    in_company: bool = False


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """No pair of workers can take the attempt."""

    attempt: int
    error: PenumbraError


class Said(NamedTuple):
    """A worker's message on one of the attempt's two streams."""

    attempt: int
    role: Role
    event: StartEvent | RunEvent


@dataclass(frozen=True, slots=True)
class Broke:
    """One of the attempt's two streams ended; `error` is None when it ended without saying why."""

    attempt: int
    role: Role
    error: PenumbraError | None


@dataclass(frozen=True, slots=True)
class Leaving:
    """The attempt's decode worker drains, and there is another pair to go to."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; sent no later than `next_deadline`."""


RelayEvent = Begun | Placed | NotPlaced | Said | Broke | Leaving | Ticked


# Actions


@dataclass(frozen=True, slots=True)
class Place:
    """Find a pair after `pause_s`; workers in `avoid` failed this request and are taken only for want of others.

    `held` names workers that the last attempt left prompt tokens on, and how many. `on_trial`: a worker may have died
    of the request; let no other such request near it until it has got somewhere, or nobody knows whose fault the next
    death is.
    """

    attempt: int
    pause_s: float
    avoid: frozenset[str]
    held: tuple[tuple[str, int], ...] = ()
    on_trial: bool = False


@dataclass(frozen=True, slots=True)
class StartDecode:
    attempt: int
    placement: Placement
    emitted: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class StartPrefill:
    attempt: int
    placement: Placement
    skip: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Drop:
    """End what is left of the attempt's streams."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DropDecode:
    """End the attempt's decode stream and keep its prefill stream, which keeps the prompt's pages."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Acquit:
    """The attempt has got so far that its workers will not die of the request any more."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Deliver:
    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """The answer goes on elsewhere. Seconds from the fault to the prompt's pages, and from there to the next token."""

    pages_s: float
    replay_s: float


@dataclass(frozen=True, slots=True)
class Complete:
    finished: Finished


@dataclass(frozen=True, slots=True)
class Fail:
    """The request is over without an answer, or in the middle of one."""

    error: PenumbraError


@dataclass(frozen=True, slots=True)
class Retry:
    """Another attempt follows because of `error`. Says so to logs and metrics; asks for nothing."""

    attempt: int
    error: PenumbraError


RelayAction = (
    Place | StartDecode | StartPrefill | Drop | DropDecode | Acquit | Deliver | Moved | Complete | Fail | Retry
)


class RelayCore:
    """The request's one owner. Every event of an attempt other than the current one is ignored."""

    def __init__(self, request: RelayRequest, limits: RelayLimits) -> None:
        self._request = request
        self._limits = limits
        self._random = random.Random(request.request_id)
        self._attempt = 0
        self._placement: Placement | None = None
        self._admitted = False
        self._prefill_done = False
        self._drawing = False  # this attempt has brought a token
        self._decoding = False  # this attempt has all it needs of its prefill worker
        self._computed = 0  # of the prompt, by this attempt's prefill worker
        self._emitted: list[int] = []
        self._migrations = 0
        self._failures = 0  # before the first token
        self._drains = 0
        self._deaths = 0  # of workers, of which this request may be the cause
        self._in_company = False  # of other such requests, on this attempt's workers
        self._drawn = 0  # tokens of this attempt
        self._first_here = False  # the attempt brought token 0, which is drawn by prefill
        self._computing = False  # its prefill worker has begun with the prompt
        self._place_until = 0.0
        self._moving_since: float | None = None
        self._replaying_since: float | None = None
        self._place_again: Place | None = None
        self._holding: int | None = None  # an earlier attempt whose prefill stream still keeps the prompt's pages
        self.cached_tokens = 0  # of the prompt, as the prefill worker of the first token's attempt said
        self._avoid: set[str] = set()
        self._gaps: deque[float] = deque(maxlen=GAP_WINDOW)
        self._slow_gaps = 0  # how many more gaps the last slow one is among them
        self._last_token_at = 0.0
        self._deadline: tuple[float, Role, str, float] | None = None  # when, by whom, what, and after how long
        self.done = False

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def _local(self) -> bool:
        """Whether the decode worker computes the prompt itself."""
        return self._placement is not None and self._placement.prefill is None

    @property
    def num_delivered(self) -> int:
        return len(self._emitted)

    @property
    def migrations(self) -> int:
        """How often the answer moved to other workers in its middle."""
        return self._migrations

    def next_deadline(self) -> float | None:
        """When a `Ticked` is due, monotonic seconds."""
        return None if self._deadline is None else self._deadline[0]

    def step(self, now: float, event: RelayEvent) -> list[RelayAction]:
        if self.done:
            return []
        match event:
            case Said(attempt, role, said):
                if attempt != self._attempt:
                    return []
                return self._decode_said(now, said) if role is Role.DECODE else self._prefill_said(now, said)
            case Begun():
                self._attempt = 1
                return [Place(1, 0.0, frozenset())]
            case Ticked():
                if self._deadline is None or now < self._deadline[0]:
                    return []
                _, role, what, seconds = self._deadline
                return self._fault(now, role, DeadlineExceeded(f"{what} within {seconds:.3g} s."))
            case _ if event.attempt != self._attempt:
                return []
            case Placed(attempt, placement, in_company):
                self._placement, self._in_company = placement, in_company
                self._wait(now, self._limits.admission_s, Role.DECODE, "The decode worker did not admit the request")
                return [StartDecode(attempt, placement, tuple(self._emitted))]
            case NotPlaced(_, error):
                # Who has lost a worker waits for another: it may be starting again. Who has had none is told so.
                if error.retryable and now < self._place_until and self._place_again is not None:
                    return [replace(self._place_again, pause_s=PLACE_AGAIN_S)]
                return self._end(Fail(error))
            case Leaving():
                if self._drains >= MAX_DRAINS or self._placement is None:
                    return []
                if self._emitted and self._request.sampling.max_tokens - len(self._emitted) <= FINISH_TOKENS:
                    return []  # sooner done than moved
                worker_id = self._placement.decode.worker_id
                return self._fault(now, Role.DECODE, Draining(f"Decode worker {worker_id} is going away."))
            case Broke(_, role, error):
                if role is Role.PREFILL and (self._prefill_done or self._decoding):
                    return []
                error = error or WorkerLost(f"The {role} worker ended its stream without a result.")
                return self._fault(now, role, error)

    def _decode_said(self, now: float, said: StartEvent | RunEvent) -> list[RelayAction]:
        match said:
            case Tokens() if self._admitted:
                return [*self._release(), *self._tokens(now, said)]
            case Admitted() if not self._admitted and self._placement is not None:
                if said.resident_prefix > len(self._request.prompt):
                    return self._lied(now, f"to hold {said.resident_prefix} tokens of {len(self._request.prompt)}")
                self._admitted = True
                if self._placement.prefill is None:
                    self.cached_tokens = said.resident_prefix
                    self._wait(now, self._limits.prefill_silence_s, Role.DECODE, SILENT_DECODE)
                    return []
                self._wait(now, self._limits.prefill_queue_s, Role.PREFILL, "The prefill worker did not start")
                return [StartPrefill(self._attempt, self._placement, said.resident_prefix, said.secret)]
            case Fetching():
                return []
            case Progress() if self._admitted and self._local and not self._decoding:
                if not self._emitted:
                    self.cached_tokens = said.cached
                self._wait(now, self._limits.prefill_silence_s, Role.DECODE, SILENT_DECODE)
                return []
            case Replaying() if self._admitted and self._emitted:
                self._decoding = True
                if self._replaying_since is None:
                    self._replaying_since = now
                self._wait(now, self._limits.prefill_silence_s, Role.DECODE, "The decode worker replayed nothing")
                return self._release()
            case Finished() if self._emitted:
                return self._finished(now, said)
            case Failed():
                return self._failed(now, Role.DECODE, said)
            case _:
                return self._lied(now, f"{type(said).__name__} out of turn")

    def _prefill_said(self, now: float, said: StartEvent | RunEvent) -> list[RelayAction]:
        if isinstance(said, Progress):
            self._computed, self._computing = said.done, True
        if not self._emitted:
            if isinstance(said, Progress):
                self.cached_tokens = said.cached
            elif isinstance(said, RunFinished):
                self.cached_tokens = said.cached_tokens
        if self._decoding:
            return []  # decoding needs nothing more of the prefill worker; its stream ends by itself
        match said:
            case Progress():
                self._wait(now, self._limits.prefill_silence_s, Role.PREFILL, "The prefill worker fell silent")
                return self._release()
            case RunFinished():
                self._prefill_done = True
                self._wait(now, self._limits.prefill_silence_s, Role.DECODE, "The decode worker gave no first token")
                return self._release()
            case Failed():
                return self._failed(now, Role.PREFILL, said)
            case _:
                return self._fault(now, Role.PREFILL, WorkerLost(f"The prefill worker sent {type(said).__name__}."))

    def _tokens(self, now: float, said: Tokens) -> list[RelayAction]:
        if said.attempt != self._attempt:
            return []  # replayed by a worker for an attempt we gave up
        fresh = said.tokens
        if fresh[0].index < len(self._emitted):
            fresh = tuple(token for token in fresh if token.index >= len(self._emitted))
        for index, token in enumerate(fresh, start=len(self._emitted)):
            if token.index != index:
                return self._lied(now, f"token {token.index} where {index} was due")
            if index >= self._request.sampling.max_tokens:
                return self._lied(now, f"more than the {self._request.sampling.max_tokens} tokens asked for")
            if token.token_id >= self._request.vocab_size or (
                token.top and not all(0 <= other < self._request.vocab_size for other, _ in token.top)
            ):
                return self._lied(now, f"a token id outside the vocabulary of {self._request.vocab_size}")
            if not math.isfinite(token.logprob):
                return self._lied(now, "a log probability that is not a number")
        if not fresh:
            return []
        allowed, factor = self._limits.token_silence_s, self._limits.token_silence_factor
        if self._drawing:
            gap = (now - self._last_token_at) / len(fresh)
            self._gaps.append(gap)
            self._slow_gaps = GAP_WINDOW if factor * gap > allowed else max(0, self._slow_gaps - 1)
        self._decoding = self._drawing = True
        harmless = self._deaths > 0 and self._drawn <= self._first_here
        self._drawn += len(fresh)
        self._first_here |= not self._emitted
        self._last_token_at = now
        self._emitted.extend(token.token_id for token in fresh)
        # With every token, so the median is taken only where it can matter.
        if self._slow_gaps:
            allowed = max(allowed, factor * statistics.median(self._gaps))
        self._wait(now, allowed, Role.DECODE, "The decode worker stopped in the middle of the answer")
        acquitted = [Acquit(self._attempt)] if harmless and self._drawn > self._first_here else []
        if self._moving_since is None:
            return [Deliver(fresh), *acquitted]
        pages_at = now if self._replaying_since is None else self._replaying_since
        moved = Moved(pages_at - self._moving_since, now - pages_at)
        self._moving_since = None
        return [Deliver(fresh), moved, *acquitted]

    def _finished(self, now: float, said: Finished) -> list[RelayAction]:
        count, most = len(self._emitted), self._request.sampling.max_tokens
        if said.completion_tokens != count:
            return self._lied(now, f"{said.completion_tokens} tokens after sending {count}")
        if said.reason is FinishReason.LENGTH and count != most:
            return self._lied(now, f"the limit of {most} reached at {count} tokens")
        # What a later attempt found in a cache is not what the client's prompt found there.
        return self._end(Complete(replace(said, cached_tokens=self.cached_tokens) if self._migrations else said))

    def _failed(self, now: float, role: Role, said: Failed) -> list[RelayAction]:
        error = error_from_code(said.code, said.message)
        return self._fault(now, role, error, retryable=said.retryable)

    def _lied(self, now: float, what: str) -> list[RelayAction]:
        return self._fault(now, Role.DECODE, WorkerLost(f"The decode worker reported {what}."))

    def _fault(
        self, now: float, role: Role, error: PenumbraError, *, retryable: bool | None = None
    ) -> list[RelayAction]:
        """The attempt is over because of the worker in `role`: go on elsewhere if that is still possible."""
        retryable = error.retryable if retryable is None else retryable
        if isinstance(error, Draining) and self._drains < MAX_DRAINS:
            self._drains += 1  # nobody failed
        elif self._emitted:
            retryable = retryable and self._migrations < self._limits.migration_limit
            self._migrations += 1
        else:
            retryable = retryable and self._failures + 1 < self._limits.max_attempts
            self._failures += 1
        # Of two that were on trial together, one may be innocent.
        self._deaths += self._is_to_blame(role, error) and not (self._deaths and self._in_company)
        if self._deaths >= DEADLY:
            return self._end(Fail(RequestQuarantined(f"{DEADLY} workers died of this request; the last said: {error}")))
        if not retryable:
            return self._end(Fail(error))
        if isinstance(error, TransferFailed) and self._placement is not None:
            # The memory of either, or what is between them: the next attempt has neither, if it can.
            self._avoid.add(self._placement.decode.worker_id)
            role = Role.PREFILL
        held: list[tuple[str, int]] = []
        given_up, done = self._attempt, [*self._release()]
        if self._placement is not None:
            decode, prefill = self._placement.decode.worker_id, self._placement.prefill
            by_decode = role is Role.DECODE or prefill is None
            self._avoid.add(decode if by_decode or prefill is None else prefill.worker_id)
            if not by_decode:
                # The decode worker keeps the pages that had arrived.
                held.append((decode, self._computed // PAGE_TOKENS * PAGE_TOKENS))
            elif prefill is not None and self._prefill_done:
                held.append((prefill.worker_id, len(self._request.prompt)))
                self._holding = given_up
        self._attempt += 1
        self._placement = None
        self._admitted = self._prefill_done = self._decoding = self._drawing = False
        self._computing = self._first_here = False
        self._drawn = 0
        self._computed = 0
        if not self._emitted:
            self.cached_tokens = 0
        self._deadline = None
        self._place_until = now + self._limits.migration_patience_s
        self._replaying_since = None
        if self._emitted and self._moving_since is None:
            self._moving_since = now
        pause = self._random.uniform(0, RETRY_PAUSE_S * 2 ** min(given_up - 1, 4))
        self._place_again = Place(self._attempt, pause, frozenset(self._avoid), tuple(held), self._deaths > 0)
        end = DropDecode(given_up) if self._holding == given_up else Drop(given_up)
        return [*done, end, Retry(given_up, error), self._place_again]

    def _is_to_blame(self, role: Role, error: PenumbraError) -> bool:
        """Whether a worker died when it had begun with this request and before it got anywhere.

        Requests that only were there when a worker died had waited, or had drawn tokens.
        """
        if not isinstance(error, WorkerLost):
            return False
        if role is Role.PREFILL:
            return self._computing and not self._prefill_done and not self._emitted
        # With its pages there it is in the next step, whether or not anything was heard of that.
        return (self._decoding or self._prefill_done) and self._drawn == self._first_here

    def _release(self) -> list[RelayAction]:
        """The pages an earlier attempt kept have been taken over, or nobody will come for them."""
        held, self._holding = self._holding, None
        return [] if held is None else [Drop(held)]

    def _end(self, last: Complete | Fail) -> list[RelayAction]:
        self.done = True
        self._deadline = None
        return [*self._release(), Drop(self._attempt), last]

    def _wait(self, now: float, seconds: float, role: Role, what: str) -> None:
        self._deadline = (now + seconds, role, what, seconds)
