"""gRPC Decode: a thin shell around the decode core, and the claims it follows at other workers.

Everything here runs on the event loop. Offers and read results go to the core as events; what it decides
comes back as actions: messages for the router, claims to open and close, reads to submit and cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import structlog

from decode_worker.admission import Place
from decode_worker.first_token import FirstTokenClock
from decode_worker.kept import MOST_KEPT, KeptAnswer
from decode_worker.links import Links
from decode_worker.preemption import PageMemory, restore, save
from decode_worker.probe import Prober
from decode_worker.scheduler import (
    Borrowed,
    Cancel,
    CancelRead,
    ClaimEnded,
    CloseClaim,
    DecodeAction,
    DecodeCore,
    DecodeEvent,
    Emit,
    OfferArrived,
    OpenClaim,
    PrefixesChanged,
    ReadEnded,
    Restore,
    Restored,
    Save,
    Saved,
    Settled,
    Start,
    SubmitRead,
)
from engine.loop import EngineLoop, StepRunner
from kvtransfer.fabric import active_rdma_ports
from kvtransfer.plan import token_bytes
from kvtransfer.reader import Reader, ReadResult
from wire import convert
from wire.errors import Draining, NumericalError, PenumbraError, StaleAttempt, StreamGone, TransferFailed, WorkerLost
from wire.failpoints import failpoint
from wire.rpc import Context, Server, error_from_rpc, open_channel
from wire.telemetry import WorkerMetrics
from wire.tracing import NO_SPAN, Span, current_span
from wire.types import (
    Admitted,
    Attached,
    AttemptId,
    ClaimRequest,
    Failed,
    Finished,
    PrefixEvent,
    Role,
    StartEvent,
    StartRequest,
    Tokens,
    WorkerInfo,
)
from wire.v1 import kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

PUBLISH_S = 0.25
RELEASE_TIMEOUT_S = 5.0
"""A release that is not heard costs nothing but the owner's patience with the broken stream."""
MAX_IDLE_CHANNELS = 64
RECENT_WEIGHT = 0.9
"""What is left of a measurement's weight after each further one: the last twenty make up nearly all of a mean."""
STOP_S = 10.0
SICK_AFTER = 3
"""Requests in a row whose numbers were none, with no token of anybody in between: then it is the worker, not they."""


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Owns the engine thread of a decode worker and its claims; implements `wire.worker.WorkerService`.

    `reader_results` and `reader_settled` are the reader's callbacks; `attach` gives it the reader that calls
    them. `publish` is called on the event loop with what the prefix tree stored and removed, and must not block.
    `hold_grammar(g)` keeps g compiled for the engine; entering raises InvalidRequest if it does not compile.
    """

    def __init__(
        self,
        core: DecodeCore,
        runner: StepRunner,
        memory: PageMemory,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        epoch: int,
        model: str,
        signature: str,
        max_context: int,
        local_prefill: bool = False,
        publish: Callable[[Sequence[PrefixEvent]], None] = lambda events: None,
        hold_grammar: Callable[[str], contextlib.AbstractAsyncContextManager[None]] = lambda _: (
            contextlib.nullcontext()
        ),
    ) -> None:
        self.draining = False
        self._rdma_ports = active_rdma_ports()
        self._hold_grammar = hold_grammar
        self._broken: str | None = None
        self._worker_id = worker_id
        self._epoch = epoch
        self._model = model
        self._signature = signature
        self._max_context = max_context
        self._local_prefill = local_prefill
        self._memory = memory
        self._publish_prefixes = publish
        self._metrics = metrics
        metrics.introduce(worker_id, Role.DECODE, model)
        self._loop = asyncio.get_running_loop()
        self._engine: EngineLoop[DecodeEvent, DecodeAction] = EngineLoop(
            core,
            runner,
            emit=lambda actions: self._post(self._apply, actions),
            on_crash=lambda error, ended: self._post(self._on_crash, error, ended),
            on_step=metrics.step_time.observe,
            perform=self._perform,
            planner=core,
        )
        self._total_tokens = self._engine.load.free_tokens  # nothing is held yet
        self._kv_token_bytes = token_bytes(core.classes)
        self._max_requests = core.max_requests
        self._reads = Recent()
        self._exposed = Recent()
        self._not_finite = 0
        self._quarantined_total = 0
        self._preemptions_total = 0
        self._drafts_total = self._kept_total = self._drafted_steps_total = 0
        self._reader: Reader | None = None
        self._links = Links()
        self._runs: dict[AttemptId, asyncio.Queue[StartEvent]] = {}
        self._kept: dict[AttemptId, KeptAnswer] = {}
        self._unended: set[AttemptId] = set()  # the engine's
        self._clocks: dict[str, FirstTokenClock] = {}  # of the open calls, by the run's name
        self._spans: dict[AttemptId, Span] = {}  # of those calls
        self._claims: dict[AttemptId, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None  # parent of every claim's tasks, while `run` runs
        self._channels = _Channels()
        self._prober = Prober(
            self._engine.post, self._channels.use, core.classes, worker_id=worker_id, signature=signature
        )

    # The worker's frame.

    @property
    def broken(self) -> str | None:
        return self._broken

    def add_to(self, server: Server) -> None:
        server.add(worker_pb2_grpc.add_DecodeServicer_to_server, self)

    def is_idle(self) -> bool:
        return not self._runs and all(kept.end is not None for kept in self._kept.values())

    def info(self, address: str) -> WorkerInfo:
        load = self._engine.load
        return WorkerInfo(
            worker_id=self._worker_id,
            role=Role.DECODE,
            address=address,
            epoch=self._epoch,
            model=self._model,
            signature=self._signature,
            draining=self.draining or self._broken is not None,
            max_context=self._max_context,
            free_tokens=load.free_tokens,
            total_tokens=self._total_tokens,
            running=load.running,
            waiting=load.waiting,
            max_requests=self._max_requests,
            queued_tokens=load.queued_tokens,
            prefill_token_ns=load.prefill_token_ns,
            prefill_depth_ns=load.prefill_depth_ns,
            transfer_bytes_per_s=int(self._reads.mean),
            exposed_us=int(self._exposed.mean * 1e6),
            kv_token_bytes=self._kv_token_bytes,
            local_prefill=self._local_prefill,
            computing_tokens=load.computing_tokens,
            read_bytes=self._links.read_bytes,
            reading_bytes=self._links.reading_bytes,
            links=self._links.report(),
            rdma_ports=self._rdma_ports,
            **load.full_pages(),
        )

    def attach(self, reader: Reader) -> None:
        self._reader = reader

    async def run(self) -> None:
        assert self._reader is not None, "attach the reader first"
        self._engine.start()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    self._publish()
                    await asyncio.sleep(PUBLISH_S)
        finally:
            self._tasks = None
            if not await asyncio.to_thread(self._engine.stop, STOP_S):
                log.error("engine_stuck", waited_s=STOP_S)
            await self._channels.close()

    # Decode.

    async def Start(self, request: worker_pb2.StartRequest, context: Context) -> AsyncIterator[worker_pb2.StartEvent]:
        start = convert.start_request_from_wire(request)
        run = AttemptId(start.request_id, start.attempt)
        if self._broken is not None:
            raise WorkerLost(self._broken)
        if self.draining:
            raise Draining(f"decode worker {self._worker_id} is going away; use another")
        if run in self._runs or run in self._kept:
            raise StaleAttempt(f"run {run} is here already; retry with a new attempt")
        failpoint("decode.start")
        arrived, answered, ended = time.monotonic(), False, False
        kept = self._keep(run, start)
        events = self._runs[run] = asyncio.Queue()
        clock = self._clocks[str(run)] = FirstTokenClock(arrived)
        span = self._spans[run] = current_span()
        try:
            async with self._carry(start) if kept is None else _reading(kept):
                while not ended:
                    for event in _merged(await events.get(), events):
                        ended = isinstance(event, Finished | Failed)
                        now = time.monotonic()
                        if isinstance(event, Admitted):
                            clock.admitted(now)
                            self._metrics.queue_time.observe(now - arrived)
                            self._metrics.prefix_queries.inc(len(start.prompt))
                            self._metrics.prefix_hits.inc(event.resident_prefix)
                        elif isinstance(event, Finished):
                            failpoint("decode.finished")
                        elif isinstance(event, Tokens):
                            if event.tokens[-1].index > 0:
                                failpoint("decode.tokens", start.prompt[-1])
                            if not answered:
                                answered = True
                                times = clock.times(now)
                                span.set(admit_us=times.admit_us, pages_us=times.pages_us)
                                span.set(transfer_us=times.transfer_us, emit_us=times.emit_us)
                                event = replace(event, times=times)
                                if (exposed := clock.exposed_s(now)) is not None:
                                    self._metrics.transfer_exposed.observe(exposed)
                                    self._exposed.add(exposed, 1)
                            self._metrics.generation_tokens.inc(len(event.tokens))
                        yield convert.start_event_to_wire(event)
                        if ended:
                            break
        finally:
            del self._runs[run]
            del self._clocks[str(run)], self._spans[run]

    async def Attach(self, request: worker_pb2.AttachRequest, context: Context) -> AsyncIterator[worker_pb2.StartEvent]:
        attach = convert.attach_request_from_wire(request)
        run = AttemptId(attach.request_id, attach.attempt)
        kept = self._kept.get(run) if attach.epoch == self._epoch else None
        if kept is None:
            raise StreamGone(f"no answer of run {run} is kept here")
        with kept.reading():
            yield convert.start_event_to_wire(Attached(context=kept.request.context))
            async with contextlib.aclosing(kept.read(attach.attempt)) as events:
                async for event in events:
                    yield convert.start_event_to_wire(event)

    @contextlib.asynccontextmanager
    async def _carry(self, start: StartRequest) -> AsyncIterator[None]:
        """The run is the engine's for the length of the block, or until it ends by itself."""
        async with self._hold_grammar(start.sampling.grammar):
            self._unended.add(AttemptId(start.request_id, start.attempt))
            self._engine.post(Start(start, secrets.token_bytes(16)))
            try:
                yield
            finally:
                # Of a run that has ended the engine knows nothing any more, and takes no notice.
                run = AttemptId(start.request_id, start.attempt)
                cancelled = time.monotonic()

                self._engine.post_then(Cancel(run), lambda: self._post(self._gone, run, time.monotonic() - cancelled))

    def _gone(self, run: AttemptId, seconds: float) -> None:
        """The engine has given the run up, so long after its reader left; if it had not ended by itself."""
        if run in self._unended:
            self._unended.discard(run)
            self._metrics.cancel_time.observe(seconds)

    def _keep(self, run: AttemptId, start: StartRequest) -> KeptAnswer | None:
        """Let the run outlive its call, if that was asked and there is room for it."""
        if not start.keep_s or len(self._kept) >= MOST_KEPT or self._tasks is None:
            return None
        kept = self._kept[run] = KeptAnswer(start)
        self._tasks.create_task(self._keep_alive(run, kept), name=f"keep {run}")
        return kept

    async def _keep_alive(self, run: AttemptId, kept: KeptAnswer) -> None:
        try:
            async with self._carry(kept.request):
                await kept.abandoned()
        except PenumbraError as error:  # a grammar that does not compile
            self._emit(run, convert.failed_from_error(error))
            await kept.abandoned()
        finally:
            del self._kept[run]

    async def Probe(self, request: worker_pb2.ProbeRequest, context: Context) -> worker_pb2.ProbeReply:
        if self._broken is not None:
            raise WorkerLost(self._broken)
        assert self._reader is not None
        source = convert.worker_ref_from_wire(request.source)
        return convert.probe_reply_to_wire(await self._prober.probe(self._reader, source, request.num_bytes))

    # The engine's thread.

    def _perform(self, action: DecodeAction) -> DecodeEvent | None:
        """Copies between the pools and host memory: nobody else may touch the pools meanwhile."""
        match action:
            case Save(run, items):
                return Saved(run, save(self._memory, items))
            case Restore(run, items, pages):
                return Restored(run, restore(self._memory, items, pages))
            case _:
                return None

    # The reader's thread.

    def reader_results(self, result: ReadResult) -> None:
        if self._prober.takes(result):
            return
        run, _, _ = result.job_id.rpartition("/")  # a job is named after its run and its offer
        if result.ok and (clock := self._clocks.get(run)) is not None:
            clock.landed(time.monotonic())
        self._engine.post(ReadEnded(result))
        self._links.ended(result)
        if result.ok:
            self._metrics.transfer_bytes.inc(result.num_bytes)
            self._metrics.transfer_time.observe(result.seconds)
            if result.num_bytes and result.seconds:
                self._metrics.transfer_speed.observe(result.num_bytes / result.seconds / 1e9)
            self._reads.add(result.num_bytes, result.seconds)
        else:
            self._metrics.transfer_failures.labels(result.error.code if result.error else "unknown").inc()

    def reader_settled(self, places: tuple[Place, ...]) -> None:
        self._engine.post(Settled(places))

    # Between the engine, the reader, the claims and the open calls.

    def _post(self, call: Any, *args: Any) -> None:
        """From the engine thread to the event loop. Once that is closed nobody is left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _emit(self, run: AttemptId, event: StartEvent) -> None:
        if isinstance(event, Finished | Failed):
            self._unended.discard(run)
        if run in self._runs:
            self._runs[run].put_nowait(event)
        if run in self._kept:
            self._kept[run].add(event)

    def _apply(self, actions: list[DecodeAction]) -> None:
        assert self._reader is not None
        for action in actions:
            match action:
                case Emit(run, event):
                    self._doubt(event)
                    if isinstance(event, Failed):
                        log.warning("run_failed", run=str(run), code=event.code, error=event.message)
                    self._emit(run, event)
                case SubmitRead(job):
                    self._links.submitted(job)
                    try:
                        self._reader.submit(job)
                        failpoint("decode.read")
                    except PenumbraError as error:
                        # Only a reader that has ended refuses, and it ends before its worker only by a fault.
                        self._broken = f"decode worker {self._worker_id} can not read pages and is restarting"
                        self.reader_results(ReadResult(job_id=job.job_id, ok=False, error=error))
                case CancelRead(job_id):
                    self._reader.cancel(job_id)
                case OpenClaim(run):
                    self._spawn(run, self._follow_claim(action))
                case CloseClaim(run):
                    self._close_claim(action)
                case Borrowed():
                    self._prober.borrowed(action)
                case PrefixesChanged(events):
                    self._publish_prefixes(events)

    def _doubt(self, event: StartEvent) -> None:
        """A worker none of whose numbers are any leaves the pool; it checks itself when it starts again."""
        if isinstance(event, Tokens):
            if event.tokens[-1].index > 0:  # drawn here
                self._not_finite = 0
        elif isinstance(event, Failed) and event.code == NumericalError.code:
            self._not_finite += 1
            if self._not_finite >= SICK_AFTER and self._broken is None:
                self._broken = f"decode worker {self._worker_id} computes no numbers any more and is restarting"

    def _spawn(self, run: AttemptId, work: Any) -> None:
        if self._tasks is None:  # stopping: the frame has ended every call already
            work.close()
            return
        task = self._claims[run] = self._tasks.create_task(work, name=f"claim {run}")
        task.add_done_callback(lambda done: self._claims.pop(run, None) if self._claims.get(run) is done else None)

    def _close_claim(self, close: CloseClaim) -> None:
        following = self._claims.pop(close.run, None)
        if close.claim_id is None:
            # Nothing was offered, so nothing is held for us but our place in line; the broken stream gives
            # that up.
            if following is not None:
                following.cancel()
        else:
            self._spawn(close.run, self._release(close, following))

    async def _follow_claim(self, claim: OpenClaim) -> None:
        """Hand every offer to the core until the stream ends, and then say why."""
        request = ClaimRequest(
            request_id=claim.run.request_id,
            attempt=claim.run.attempt,
            from_token=claim.from_token,
            secret=claim.secret,
            reader_id=self._worker_id,
            reader_epoch=self._epoch,
            signature=self._signature,
        )
        source = claim.source.worker_id
        span = self._spans.get(claim.run, NO_SPAN)
        try:
            async with self._channels.use(claim.source.address) as channel:
                offers = _pages(channel).Claim(convert.claim_request_to_wire(request), metadata=span.metadata())
                async for message in offers:
                    offer = convert.page_offer_from_wire(message)
                    if offer.tail is not None and (clock := self._clocks.get(str(claim.run))) is not None:
                        clock.last_offer(time.monotonic(), offer.tail.times)
                    self._engine.post(OfferArrived(claim.run, offer))
            error: PenumbraError = WorkerLost(f"worker {source} ended its offers for {claim.run} early")
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
        except PenumbraError as failure:
            error = failure
        if not error.retryable or isinstance(error, WorkerLost):
            # Whatever the owner holds against the claim or died of, the request may well succeed elsewhere; and it is
            # not this worker that was lost.
            error = TransferFailed(f"worker {source} ended the claim of {claim.run}: {error}")
        self._engine.post(ClaimEnded(claim.run, error))

    async def _release(self, close: CloseClaim, following: asyncio.Task[None] | None) -> None:
        """Release while the stream still lives: to the owner a broken stream means a reader in trouble."""
        try:
            async with self._channels.use(close.source.address) as channel:
                request = kv_pb2.ReleaseRequest(claim_id=close.claim_id, secret=close.secret)
                await _pages(channel).Release(request, timeout=RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            log.info("release_unheard", run=str(close.run), error=str(error_from_rpc(failure)))
        finally:
            if following is not None:
                following.cancel()

    def _on_crash(self, error: BaseException, ended: bool) -> None:
        log.error("engine_crashed", ended=ended, exc_info=error)
        self._broken = f"decode worker {self._worker_id} had an internal fault and is restarting"
        if ended:
            for run in [*self._runs, *self._kept]:
                self._emit(run, convert.failed_from_error(WorkerLost(self._broken)))
            for claim in list(self._claims.values()):
                claim.cancel()

    def _publish(self) -> None:
        load, metrics = self._engine.load, self._metrics
        metrics.running.set(load.running)
        metrics.reading_bytes.set(self._links.reading_bytes)
        metrics.waiting.set(load.waiting)
        metrics.queued_tokens.set(load.queued_tokens)
        metrics.quarantined.inc(load.quarantined_total - self._quarantined_total)
        self._quarantined_total = load.quarantined_total
        metrics.preemptions.inc(load.preemptions_total - self._preemptions_total)
        self._preemptions_total = load.preemptions_total
        metrics.draft_tokens.inc(load.drafts_total - self._drafts_total)
        metrics.kept_drafts.inc(load.drafts_kept_total - self._kept_total)
        if steps := load.drafted_steps_total - self._drafted_steps_total:
            metrics.accept_length.set(1 + (load.drafts_kept_total - self._kept_total) / steps)
        self._drafts_total, self._kept_total = load.drafts_total, load.drafts_kept_total
        self._drafted_steps_total = load.drafted_steps_total
        metrics.host_bytes.set(load.host_bytes)
        for page_class, counts in load.pages.items():
            metrics.set_pages(
                page_class,
                free=counts.free,
                used=counts.used - counts.evictable,
                quarantined=counts.quarantined,
                cached=counts.evictable,
            )


class Recent:
    """A ratio of two sums in which older parts count ever less: bytes over seconds, seconds over occasions."""

    def __init__(self) -> None:
        self._amount = self._of = 0.0

    def add(self, amount: float, of: float) -> None:
        self._amount = RECENT_WEIGHT * self._amount + amount
        self._of = RECENT_WEIGHT * self._of + of

    @property
    def mean(self) -> float:
        """0 before anything was added."""
        return self._amount / self._of if self._of else 0.0


@contextlib.asynccontextmanager
async def _reading(kept: KeptAnswer) -> AsyncIterator[None]:
    with kept.reading():
        yield


def _pages(channel: grpc.aio.Channel) -> Any:
    return kv_pb2_grpc.PagesStub(channel)  # type: ignore[no-untyped-call]


def _merged(first: StartEvent, rest: asyncio.Queue[StartEvent]) -> list[StartEvent]:
    """Everything that is ready, neighbouring tokens in one message. Never waits."""
    events = [first]
    while not rest.empty():
        event, last = rest.get_nowait(), events[-1]
        if isinstance(event, Tokens) and isinstance(last, Tokens):
            events[-1] = Tokens(attempt=last.attempt, tokens=last.tokens + event.tokens)
        else:
            events.append(event)
    return events


class _Channels:
    """One channel per owner, kept open between claims; of the unused ones only so many."""

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}
        self._users: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        channel = self._open.get(address)
        if channel is None:
            channel = self._open[address] = open_channel(address)
        self._users[address] += 1
        try:
            yield channel
        finally:
            self._users[address] -= 1
            idle = [a for a in self._open if not self._users[a]]
            for address_to_close in idle[: max(0, len(idle) - MAX_IDLE_CHANNELS)]:
                del self._users[address_to_close]
                await self._open.pop(address_to_close).close(None)

    async def close(self) -> None:
        for channel in self._open.values():
            await channel.close(None)
        self._open.clear()
