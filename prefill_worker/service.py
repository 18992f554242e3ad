"""gRPC Prefill and Pages: thin shells around the prefill core and the claim table.

Everything here runs on the event loop. The claim table lives here and not on the engine thread, so a long
forward pass delays neither a claim nor its renewal. A run's pages are dropped in the engine only after the
table freed them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from engine.batch import Sampled
from engine.loop import EngineLoop, StepRunner
from kvtransfer.fabric import active_rdma_ports
from kvtransfer.owner import ClaimLimits, ClaimTable, Freed
from kvtransfer.plan import item_bytes, token_bytes
from prefill_worker.scheduler import (
    Crowded,
    Drop,
    Ended,
    Lend,
    Lent,
    Offered,
    PrefillAction,
    PrefillCore,
    PrefillEvent,
    PrefixesChanged,
    Progressed,
    Submit,
    TakeBack,
)
from wire import convert
from wire.errors import Cancelled, Draining, LayoutMismatch, NumericalError, Overloaded, PenumbraError, WorkerLost
from wire.failpoints import failpoint
from wire.rpc import Context, Server, error_from_code
from wire.telemetry import WorkerMetrics
from wire.tracing import current_span
from wire.types import (
    AttemptId,
    Failed,
    OwnerCard,
    PageClass,
    PageGroup,
    PageOffer,
    PrefillTimes,
    PrefixEvent,
    Progress,
    Role,
    RunEvent,
    RunFinished,
    WorkerInfo,
)
from wire.v1 import kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

SWEEP_S = 0.25
CLAIM_POLL_S = 1.0
"""A claim's stream looks at its claim at least this often, so an expiry is told even if nothing else happens.
"""
ENGINE_STOP_S = 10.0
SICK_AFTER = 3
"""Prompts in a row whose numbers were none: then it is the worker, not they."""
LEND_S = 60.0
"""How long pages are lent for measuring, and how long the engine may take to find them."""


@dataclass(slots=True)
class _Begun:
    """When a run arrived and when its turn came, in monotonic seconds."""

    arrived: float
    turn: float | None = None

    def times(self, now_s: float) -> PrefillTimes:
        turn = now_s if self.turn is None else self.turn
        return PrefillTimes(queue_us=round((turn - self.arrived) * 1e6), compute_us=round((now_s - turn) * 1e6))


class _Chunks:
    """A runner as the prefill core knows it: a token, or none, for each segment."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.prepare = runner.prepare

    def execute(self, plan: Any) -> list[Sampled | None]:
        return [drawn.tokens[0] if drawn.tokens else None for drawn in self._runner.execute(plan)]


class PrefillService(worker_pb2_grpc.PrefillServicer, kv_pb2_grpc.PagesServicer):
    """Owns the engine thread of a prefill worker; implements `wire.worker.WorkerService`.

    `publish` is called on the event loop with what the prefix tree stored and removed, and must not block.
    `held_bytes` of prompts that have been read stay for another reader, for as long as their callers ask for it.
    `hold_grammar(g)` keeps g compiled for the engine; entering raises InvalidRequest if it does not compile.
    """

    def __init__(
        self,
        core: PrefillCore,
        runner: StepRunner,
        card: OwnerCard,
        metrics: WorkerMetrics,
        *,
        model: str,
        max_context: int,
        held_bytes: int = 0,
        publish: Callable[[Sequence[PrefixEvent]], None] = lambda events: None,
        hold_grammar: Callable[[str], contextlib.AbstractAsyncContextManager[None]] = lambda _: (
            contextlib.nullcontext()
        ),
    ) -> None:
        self.draining = False
        self._rdma_ports = active_rdma_ports()
        self._hold_grammar = hold_grammar
        self._broken: str | None = None
        self._card = card
        self._model = model
        self._max_context = max_context
        self._publish_prefixes = publish
        self._metrics = metrics
        metrics.introduce(card.worker_id, Role.PREFILL, model)
        self._table = ClaimTable(card, ClaimLimits(held_bytes=held_bytes))
        self._loop = asyncio.get_running_loop()
        self._engine: EngineLoop[PrefillEvent, PrefillAction] = EngineLoop(
            core,
            _Chunks(runner),
            emit=lambda actions: self._post(self._apply, actions),
            on_crash=lambda error, ended: self._post(self._on_crash, error, ended),
            on_step=metrics.step_time.observe,
        )
        self._total_tokens = self._engine.load.free_tokens  # nothing is held yet
        self._kv_token_bytes = token_bytes(card.classes)
        self._lent: dict[str, asyncio.Future[PageGroup | None]] = {}  # what streams of `Lend` wait for
        self._runs: dict[AttemptId, asyncio.Queue[RunEvent | None]] = {}  # None: its pages are gone
        self._not_finite = 0
        self._to_hold: set[AttemptId] = set()  # of those, where the caller asks for it
        self._begun: dict[AttemptId, _Begun] = {}
        self._changed: dict[AttemptId, list[asyncio.Event]] = {}  # of the claims of a run

    # The worker's frame.

    @property
    def broken(self) -> str | None:
        return self._broken

    def add_to(self, server: Server) -> None:
        server.add(worker_pb2_grpc.add_PrefillServicer_to_server, self)
        server.add(kv_pb2_grpc.add_PagesServicer_to_server, self)

    def is_idle(self) -> bool:
        counts = self._table.counts()
        return counts.runs == counts.held and all(self._table.is_held(run) for run in self._runs)

    def info(self, address: str) -> WorkerInfo:
        load = self._engine.load
        return WorkerInfo(
            worker_id=self._card.worker_id,
            role=Role.PREFILL,
            address=address,
            epoch=self._card.epoch,
            model=self._model,
            signature=self._card.signature,
            draining=self.draining or self._broken is not None,
            max_context=self._max_context,
            free_tokens=load.free_tokens,
            total_tokens=self._total_tokens,
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            queued_depth=load.queued_depth,
            prefill_token_ns=load.prefill_token_ns,
            prefill_depth_ns=load.prefill_depth_ns,
            kv_token_bytes=self._kv_token_bytes,
            rdma_ports=self._rdma_ports,
            **load.full_pages(),
        )

    async def run(self) -> None:
        self._engine.start()
        try:
            while True:
                self._free(self._table.expire(time.monotonic()))
                while self.draining and (freed := self._table.make_room(time.monotonic())):
                    self._free(freed)  # nobody will come for them here
                self._publish()
                await asyncio.sleep(SWEEP_S)
        finally:
            if not await asyncio.to_thread(self._engine.stop, ENGINE_STOP_S):
                log.error("engine_stuck", waited_s=ENGINE_STOP_S)

    # Prefill.

    async def Run(self, request: worker_pb2.RunRequest, context: Context) -> AsyncIterator[worker_pb2.RunEvent]:
        run_request = convert.run_request_from_wire(request)
        run = AttemptId(run_request.request_id, run_request.attempt)
        self._check_open()
        arrived = time.monotonic()
        overtaken = self._table.expect(arrived, run, run_request.secret, run_request.skip)
        events = self._runs[run] = asyncio.Queue()
        self._begun[run] = _Begun(arrived)
        if run_request.hold:
            self._to_hold.add(run)
        self._notify(run)
        computed, ended = -1, False
        try:
            async with self._hold_grammar(run_request.sampling.grammar):
                failpoint("prefill.run")
                self._engine.post(Submit(run_request))
                # Only now: the engine may go on with what an earlier attempt has computed.
                self._free(overtaken)
                overtaken = []
                while (event := await events.get()) is not None:
                    ended = ended or not isinstance(event, Progress)
                    if isinstance(event, Progress):
                        if computed < 0:
                            self._metrics.queue_time.observe(time.monotonic() - arrived)
                        self._metrics.prompt_tokens.inc(event.done - event.cached - max(computed, 0))
                        computed = event.done - event.cached
                    elif isinstance(event, RunFinished):
                        failpoint("prefill.finished")
                        current_span().set(prompt_tokens=event.prompt_tokens, cached_tokens=event.cached_tokens)
                        self._metrics.prefix_queries.inc(event.prompt_tokens)
                        self._metrics.prefix_hits.inc(event.cached_tokens)
                    yield convert.run_event_to_wire(event)
                    if isinstance(event, Progress):
                        failpoint("prefill.progress", run_request.prompt[-1])
                    if isinstance(event, Failed) or (ended and not self._table.is_held(run)):
                        return
        finally:
            del self._runs[run], self._begun[run]
            self._to_hold.discard(run)
            self._free(overtaken)
            if ended:
                self._free(self._table.let_go(time.monotonic(), run))
            else:
                error = Cancelled(f"run {run} was cancelled by its router")
                self._free(self._table.revoke(time.monotonic(), run, error), cancelled_s=time.monotonic())

    # Pages.

    async def Claim(self, request: kv_pb2.ClaimRequest, context: Context) -> AsyncIterator[kv_pb2.PageOffer]:
        claim = convert.claim_request_from_wire(request)
        if self._broken is not None:
            raise WorkerLost(self._broken)
        run, claim_id = AttemptId(claim.request_id, claim.attempt), secrets.token_hex(16)
        self._table.open(time.monotonic(), claim_id, claim)
        changed = asyncio.Event()
        self._changed.setdefault(run, []).append(changed)
        next_seq = 0
        try:
            while True:
                changed.clear()
                offers = self._table.offers(claim_id, next_seq)
                if offers is None:
                    return
                for offer in offers:
                    if offer.seq > 1:
                        failpoint("prefill.offer")
                    yield convert.page_offer_to_wire(offer)
                    next_seq = offer.seq + 1
                if not offers:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(CLAIM_POLL_S):
                            await changed.wait()
        finally:
            self._table.broken(time.monotonic(), claim_id)
            self._changed[run].remove(changed)
            if not self._changed[run]:
                del self._changed[run]

    async def Release(self, request: kv_pb2.ReleaseRequest, context: Context) -> kv_pb2.ReleaseReply:
        valid, freed = self._table.release(time.monotonic(), request.claim_id, request.secret)
        self._free(freed)
        return kv_pb2.ReleaseReply(valid=valid)

    async def Lend(self, request: kv_pb2.LendRequest, context: Context) -> AsyncIterator[kv_pb2.PageOffer]:
        self._check_open()
        if request.signature != self._card.signature:
            raise LayoutMismatch(
                f"reader {request.reader_id[:80]} has page layout {request.signature[:12]}, this worker "
                f"{self._card.signature[:12]}. Serve both with the same checkpoint, --kv-layout and version."
            )
        page_bytes = max(1, sum(item_bytes(cls) for cls in self._card.classes if cls.name is PageClass.FULL))
        lend_id = secrets.token_hex(16)
        lent = self._lent[lend_id] = self._loop.create_future()
        try:
            self._engine.post(Lend(lend_id, max(1, request.num_bytes // page_bytes)))
            yield convert.page_offer_to_wire(PageOffer(seq=0, claim_id=lend_id, owner=self._card))
            async with asyncio.timeout(LEND_S):
                group = await lent
            if group is None:
                raise Overloaded(f"worker {self._card.worker_id} has no page to lend now; try again")
            yield convert.page_offer_to_wire(PageOffer(seq=1, claim_id=lend_id, groups=(group,)))
            await asyncio.sleep(LEND_S)  # the reader ends the stream when it has read
        finally:
            del self._lent[lend_id]
            self._engine.post(TakeBack(lend_id))

    # Between the table, the engine and the open calls.

    def _check_open(self) -> None:
        if self._broken is not None:
            raise WorkerLost(self._broken)
        if self.draining:
            raise Draining(f"prefill worker {self._card.worker_id} is going away; use another")

    def _post(self, call: Any, *args: Any) -> None:
        """From the engine thread to the event loop. Once that is closed nobody is left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _apply(self, actions: list[PrefillAction]) -> None:
        now_s = time.monotonic()
        for action in actions:
            match action:
                case Progressed(run, progress):
                    if (begun := self._begun.get(run)) is not None and begun.turn is None:
                        begun.turn = now_s
                    self._tell(run, progress)
                case Offered(run, groups, tail):
                    if tail is not None and (begun := self._begun.get(run)) is not None:
                        tail = replace(tail, times=begun.times(now_s))
                    self._table.offer(now_s, run, groups, tail)
                    self._notify(run)
                case Ended(run, RunFinished() as outcome):
                    self._not_finite = 0
                    self._table.finished(now_s, run)
                    if run in self._to_hold and not self.draining:
                        self._table.hold(run)
                    self._tell(run, outcome)
                case Ended(run, Failed() as outcome):
                    self._not_finite += outcome.code == NumericalError.code
                    if self._not_finite >= SICK_AFTER and self._broken is None:
                        name = self._card.worker_id
                        self._broken = f"prefill worker {name} computes no numbers any more and is restarting"
                    log.warning("run_failed", run=str(run), code=outcome.code, error=outcome.message)
                    self._tell(run, outcome)
                    error = error_from_code(outcome.code, outcome.message)
                    self._free(self._table.revoke(now_s, run, error))
                case Lent(lend_id, group):
                    if (waiting := self._lent.get(lend_id)) is not None and not waiting.done():
                        waiting.set_result(group)
                case PrefixesChanged(events):
                    self._publish_prefixes(events)
                case Crowded():
                    self._free(self._table.make_room(now_s))

    def _free(self, freed: list[Freed], cancelled_s: float | None = None) -> None:
        """The table let these runs go: tell the engine, and whoever still listens. `cancelled_s`: when nobody wanted
        them any more, if that is why.
        """

        def done() -> None:
            if cancelled_s is not None:
                self._metrics.cancel_time.observe(time.monotonic() - cancelled_s)

        for run, error in freed:
            self._engine.post_then(Drop(run), done)
            self._notify(run)
            self._tell(run, None if error is None else convert.failed_from_error(error))

    def _tell(self, run: AttemptId, event: RunEvent | None) -> None:
        if run in self._runs:
            self._runs[run].put_nowait(event)

    def _notify(self, run: AttemptId) -> None:
        for changed in self._changed.get(run, ()):
            changed.set()

    def _on_crash(self, error: BaseException, ended: bool) -> None:
        log.error("engine_crashed", ended=ended, exc_info=error)
        self._broken = f"prefill worker {self._card.worker_id} had an internal fault and is restarting"
        if ended:
            # No engine is left to end these, and no page it held can be trusted to stay.
            lost: PenumbraError = WorkerLost(self._broken)
            for run in list(self._runs):
                self._tell(run, convert.failed_from_error(lost))
            for run in self._table.runs():
                self._free(self._table.revoke(time.monotonic(), run, lost))

    def _publish(self) -> None:
        load, metrics = self._engine.load, self._metrics
        metrics.running.set(load.running)
        metrics.waiting.set(load.waiting)
        metrics.queued_tokens.set(load.queued_tokens)
        metrics.claims.set(self._table.counts().open_claims)
        for page_class, counts in load.pages.items():
            metrics.set_pages(
                page_class,
                free=counts.free,
                used=counts.used - counts.evictable,
                cached=counts.evictable,
                quarantined=counts.quarantined,
            )
