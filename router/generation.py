"""One running answer and its client: relayed tokens become bytes until either of the two has had enough.

An answer's status line is sent with its first bytes, so that what goes wrong before has a status of its own. A stream's
first bytes are its first token's, or those that tell a client that it still waits for one: after `sse_keepalive_s` of
silence, or with the first progress a client asked to see. An error after that is one more event, the last.

Nothing of an answer that is not streamed is known before all of it is. But proxies give up on a silent connection after
a minute, and a long prompt takes longer. So after `json_keepalive_s` the status line goes out, and blank lines follow,
which JSON allows in front of a value. An error after that is told in the body and the body left incomplete, so that
nobody takes it for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.admission import Admission, Wishes
from router.answers import Answer, Json, Usage, merged, usage_chunk
from router.attempts import Moved, RelayEvent, RelayLimits, RelayRequest, Said
from router.client import ClientGone, put, until_gone
from router.dialects import Dialect, dump
from router.fleet import Fleet
from router.intake import Prepared
from router.live import LiveRequests
from router.mirror import PrefixMirror
from router.placement import Placement
from router.quarantine import Quarantine
from router.quota import Stay
from router.relay import Relay, relay
from router.streams import Keeping, StreamId, pack
from router.timeline import PromptProgress, Timeline
from wire.errors import PenumbraError
from wire.telemetry import RouterMetrics
from wire.tracing import Span, Tracer
from wire.types import FinishReason, Progress, TokenEvent

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What all running answers share."""

    fleet: Fleet
    mirror: PrefixMirror
    limits: RelayLimits
    admission: Admission
    metrics: RouterMetrics
    requests: LiveRequests
    tracer: Tracer
    client_stall_s: float
    sse_keepalive_s: float
    json_keepalive_s: float
    quarantine: Quarantine = field(default_factory=Quarantine)


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One of a request's answers on its way."""

    request: RelayRequest
    answer: Answer
    timeline: Timeline
    usage: Usage | None = None  # once it is complete

    def used(self, cached_tokens: int) -> Usage:
        """So far."""
        prompt_tokens = len(self.request.prompt)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.answer.num_tokens,
            cached_tokens=min(cached_tokens, prompt_tokens),
        )

    def timing(self) -> dict[str, float]:
        line, num_tokens = self.timeline, self.answer.num_tokens
        if line.first_token is None or line.last_token is None:
            return {}
        fields = {"ttft_ms": round((line.first_token - line.arrived) * 1e3, 1)}
        if num_tokens > 1:
            fields["tpot_ms"] = round((line.last_token - line.first_token) * 1e3 / (num_tokens - 1), 2)
        return fields | {f"{part}_ms": round((end - begin) * 1e3, 1) for part, begin, end in line.parts()}


class Generation(Response):
    """A response that is still being generated. It ends within its own call, however that call ends."""

    def __init__(
        self,
        serving: Serving,
        dialect: Dialect,
        prepared: Prepared,
        stay: Stay,
        wishes: Wishes,
        *,
        timeline: Timeline,
        span: Span,
        client_request_id: str,
        keeping: Keeping | None = None,
    ) -> None:
        """`span` is the request's, and ends with it."""
        self._serving = serving
        self._dialect = dialect
        self._prepared = prepared
        self._stay = stay
        self._wishes = wishes
        self._keeping = keeping
        self._heard = 0  # tokens that the client has been sent
        self._drawn = asyncio.Event()  # the first token is here
        self._feed: Relay | None = None
        self._choices = [
            _Choice(request=request, answer=answer, timeline=timeline if i == 0 else timeline.fork())
            for i, (request, answer) in enumerate(prepared.choices)
        ]
        self._span = span
        self._client_id = client_request_id
        # A stream may show its prompt's progress; the choices share the prompt, and the first one's tells.
        self._shown = prepared.progress if prepared.stream else None
        self._began = False  # the status line is out
        self._num_events = 0
        self._placements: dict[str, Placement] = {}  # where each choice went last
        self._sending = asyncio.Lock()
        self._sent_at = time.monotonic()  # when we last wrote to the client
        self._writing = False  # and whether that write still waits for it
        self._progressed = asyncio.Event()  # the prompt has, and the client wants to know
        self._prompt_there = asyncio.Event()  # on a decode worker: the first choice has its first token
        self._failure: BaseException | None = None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._serving.admission.running():
                async with asyncio.TaskGroup() as tasks:
                    work = tasks.create_task(self._answer(send))
                    watch = tasks.create_task(until_gone(receive))
                    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        scope["state"]["client_gone"] = True
                        if self._keeping is not None:
                            await self._hand_over(work, self._keeping.keep_s)
                    work.cancel()
                    watch.cancel()
        finally:
            self._end_span(scope["state"])
        if scope["state"].get("client_gone"):
            self._serving.metrics.disconnected.inc()
            self._log("request_cancelled")

    async def _hand_over(self, work: asyncio.Task[None], keep_s: int) -> None:
        """Go on without the client until there is something for a decode worker to keep: from then on it does."""
        drawn = asyncio.create_task(self._drawn.wait())
        try:
            await asyncio.wait({work, drawn}, timeout=keep_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drawn.cancel()
        self._log("request_kept", keep_s=keep_s)

    def _end_span(self, state: Mapping[str, Any]) -> None:
        first, span = self._choices[0], self._span
        for part in first.timeline.parts():
            span.part(*part)
        if first.timeline.first_token is not None and first.timeline.last_token is not None:
            span.part("tokens", first.timeline.first_token, first.timeline.last_token)
        span.set(prompt_tokens=len(first.request.prompt), completion_tokens=first.answer.num_tokens)
        gone = asyncio.CancelledError() if state.get("client_gone") else None
        failure, self._failure = self._failure, None  # its traceback knows us: kept, it would be a circle
        span.end(failure or gone)

    async def _answer(self, send: Send) -> None:
        """Everything from placement to the last byte. Never raises but when cancelled."""
        try:
            await self._relay(send)
        except ClientGone:
            self._failure = asyncio.CancelledError()
            self._serving.metrics.disconnected.inc()
            self._log("request_cancelled", reason="the client stopped reading")
        except PenumbraError as error:
            await self._fail(send, error)
        except Exception:
            log.exception("request_crashed", request_id=self._choices[0].request.request_id)
            await self._fail(send, PenumbraError("The router failed on this request; its log has the details."))

    async def _fail(self, send: Send, error: PenumbraError) -> None:
        self._failure = error
        self._serving.metrics.errors.labels(error.code).inc()
        self._log("request_failed", error_code=error.code, error=str(error))
        await self._send_error(send, error)

    async def _relay(self, send: Send) -> None:
        prepared, choices, metrics = self._prepared, self._choices, self._serving.metrics
        metrics.prompt_tokens.inc(len(choices[0].request.prompt))
        await self._together([self._follow(choice, send) for choice in choices], beside=self._keep_alive(send))
        metrics.e2e.observe(time.monotonic() - choices[0].timeline.arrived)
        if prepared.stream and not prepared.include_usage:
            await self._send_events(send, [], done=True)
            return
        whole = merged([choice.answer.response(choice.usage) for choice in choices if choice.usage is not None])
        if prepared.stream:
            await self._send_events(send, [usage_chunk(whole)], done=True)
        else:
            self._add_timeline(whole)
            await self._send(send, dump(whole), more=False)

    async def _together(self, parts: list[Coroutine[Any, Any, None]], *, beside: Coroutine[Any, Any, None]) -> None:
        """Run all parts, and `beside` as long as they run. The first to fail ends the others, and its error is the one
        raised.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                company = tasks.create_task(beside)
                await asyncio.wait([tasks.create_task(part) for part in parts])
                company.cancel()
        except* Exception as failures:
            error = failures.exceptions[0]
        else:
            return
        try:
            raise error
        finally:
            del error  # its traceback knows this frame

    async def _follow(self, choice: _Choice, send: Send) -> None:
        """Relay one choice to its end."""
        serving, prepared, answer = self._serving, self._prepared, choice.answer
        request, timeline = choice.request, choice.timeline
        shown = self._shown if choice is self._choices[0] else None

        def on_retry(attempt: int, error: PenumbraError) -> None:
            serving.metrics.retries.labels(error.code).inc()
            self._log("attempt_failed", choice, attempt=attempt, error_code=error.code, error=str(error))

        def on_place(placement: Placement) -> None:
            turn.placed()
            self._stay.used = max(self._stay.used, len(request.prompt))
            self._placements[request.request_id] = placement
            serving.metrics.placements.labels(placement.decision, placement.reason.value).inc()

        def on_moved(moved: Moved) -> None:
            serving.metrics.moved.labels("pages").observe(moved.pages_s)
            serving.metrics.moved.labels("replay").observe(moved.replay_s)

        def watch(now: float, event: RelayEvent) -> None:
            timeline.saw(now, event)
            if shown is not None and isinstance(event, Said) and isinstance(event.event, Progress):
                self._progressed.set()

        with serving.requests.follow(request, timeline) as live:
            async with contextlib.AsyncExitStack() as held:
                if choice is not self._choices[0]:
                    # The prompt's pages travel once: by then they are shared, and this choice finds them.
                    await self._prompt_there.wait()
                turn = await held.enter_async_context(serving.admission.turn(request, self._stay.tenant, self._wishes))
                timeline.ended("queue", time.monotonic())
                tokens = await held.enter_async_context(
                    relay(
                        serving.fleet,
                        request,
                        serving.limits,
                        serving.mirror,
                        on_retry=on_retry,
                        on_place=on_place,
                        watch=watch,
                        span=self._span,
                        quarantine=serving.quarantine,
                        on_moved=on_moved,
                    )
                )
                live.feed = self._feed = tokens
                async for batch in tokens:
                    turn.computed()
                    self._prompt_there.set()
                    live.generated_tokens += len(batch)
                    opening: list[Json] = []
                    if self._measure(choice, batch):
                        opening = [] if shown is None else self._progress(shown)
                        opening += answer.opening(choice.used(tokens.cached_tokens))
                    if self._keeping is not None:
                        await self._keep(self._keeping)
                    # An answer that may be taken up again is told token by token, each with its place.
                    for part in [batch] if self._keeping is None else [(token,) for token in batch]:
                        chunks = opening + answer.push(part)
                        opening = []
                        self._heard = part[-1].index + 1
                        if prepared.stream and chunks:
                            await self._send_events(send, chunks)
                        if answer.stopped:
                            break
                    if answer.stopped:
                        break
        finished = tokens.finished
        choice.usage = usage = choice.used(tokens.cached_tokens)
        reason = FinishReason.STOP if finished is None else finished.reason
        last = answer.close(reason, usage)
        serving.metrics.cached_tokens.inc(usage.cached_tokens)
        self._count(choice, usage, reason)
        placed = tokens.placement
        self._log(
            "request_done",
            choice,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=reason.value,
            attempts=tokens.attempts,
            prefill=placed and placed.prefill and placed.prefill.worker_id,
            decode=placed and placed.decode.worker_id,
            placement=placed and f"{placed.decision}/{placed.reason.value}",
        )
        if prepared.stream and last:
            await self._send_events(send, last)

    def _count(self, choice: _Choice, usage: Usage, reason: FinishReason) -> None:
        """An answer came to its end."""
        metrics, line = self._serving.metrics, choice.timeline
        metrics.success.labels(reason.value).inc()
        metrics.request_prompt_tokens.observe(usage.prompt_tokens)
        metrics.request_generation_tokens.observe(usage.completion_tokens)
        if line.first_token is not None and line.last_token is not None and usage.completion_tokens > 1:
            metrics.tpot.observe((line.last_token - line.first_token) / (usage.completion_tokens - 1))

    def _measure(self, choice: _Choice, batch: tuple[TokenEvent, ...]) -> bool:
        """Whether these are the first tokens."""
        now, metrics, line = time.monotonic(), self._serving.metrics, choice.timeline
        before = line.last_token
        first = line.delivered(now)
        metrics.generation_tokens.inc(len(batch))
        self._stay.used += len(batch)
        if before is None:
            metrics.ttft.observe(now - line.arrived)
            for part, begin, end in line.parts():
                metrics.stage.labels(part).observe(end - begin)
        else:
            gap = (now - before) / len(batch)
            for _ in batch:
                metrics.itl.observe(gap)
        return first

    def _log(self, event: str, choice: _Choice | None = None, **fields: object) -> None:
        choice = choice or self._choices[0]
        log.info(
            event,
            request_id=choice.request.request_id,
            client_request_id=self._client_id,
            prompt_tokens=len(choice.request.prompt),
            **choice.timing(),
            **fields,
        )

    # Waiting

    async def _keep_alive(self, send: Send) -> None:
        """Tell the client, whenever it has heard nothing for long enough, that it still waits for something; and how
        far its prompt is, whenever that changes and it asked. Until cancelled.

        Raises ClientGone for a client that has read nothing for too long, while our writes wait for it.
        """
        stream, shown, stall_s = self._prepared.stream, self._shown, self._serving.client_stall_s
        interval = self._serving.sse_keepalive_s if stream else self._serving.json_keepalive_s
        sign = self._dialect.keepalive if stream else b"\n"
        while True:
            if self._writing:
                due = self._sent_at + stall_s
            else:
                # A write may begin and stall at any time.
                due = min(time.monotonic() + stall_s, self._sent_at + interval if interval else math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - time.monotonic()):
                    await self._progressed.wait()
            now = time.monotonic()
            if self._writing:
                self._progressed.clear()
                if now >= self._sent_at + stall_s:
                    raise ClientGone
            elif shown is not None and self._progressed.is_set():
                self._progressed.clear()
                if self._choices[0].timeline.first_token is None:
                    await self._send_events(send, self._progress(shown), timed=True)
            elif interval and now >= self._sent_at + interval:
                await self._send(send, sign, timed=True)

    def _progress(self, shown: Callable[[PromptProgress], Json]) -> list[Json]:
        progress = self._choices[0].timeline.progress(time.monotonic())
        return [] if progress is None else [shown(progress)]

    def _add_timeline(self, body: Json) -> None:
        """To what tells the usage, which in each protocol's stream is one of the last events, if that was asked."""
        if self._prepared.return_timeline:
            usage = body.get("usage") or (body.get("response") or {}).get("usage")
            if usage is not None:
                usage["timeline"] = self._choices[0].timeline.to_json()

    # Bytes

    async def _send_events(self, send: Send, chunks: list[Json], *, done: bool = False, timed: bool = False) -> None:
        self._num_events += len(chunks)
        for chunk in chunks:
            self._add_timeline(chunk)
        stream = self._stream(self._heard) if self._heard else None
        if stream is not None and self._keeping is not None:
            body = pack(self._dialect, chunks, self._keeping.sign(stream))
        else:
            body = b"".join(map(self._dialect.event, chunks))
        await self._send(send, body + (self._dialect.done if done else b""), more=not done, timed=timed)

    async def _keep(self, keeping: Keeping) -> None:
        """With the first token: from now on there is something to go on with."""
        if not self._drawn.is_set() and (stream := self._stream(0)) is not None:
            self._drawn.set()
            await keeping.told(stream)

    def _stream(self, index: int) -> StreamId | None:
        """Where the answer is from this token on, if it is kept anywhere."""
        feed = self._feed
        if self._keeping is None or feed is None or feed.placement is None:
            return None
        decode = feed.placement.decode
        return StreamId(
            request_id=self._choices[0].request.request_id,
            worker_id=decode.worker_id,
            epoch=decode.epoch,
            attempt=feed.attempts,
            index=index,
        )

    async def _send_error(self, send: Send, error: PenumbraError) -> None:
        try:
            if not self._began:
                response = self._dialect.refusal(error)
                head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
                await self._put(send, head)
                await self._put(send, {"type": "http.response.body", "body": response.body})
            elif self._prepared.stream:
                # The stream ends here and without its closing words, so that no client takes half an answer for a
                # whole one.
                body = self._dialect.event(self._dialect.error_event(error, self._num_events))
                await self._put(send, {"type": "http.response.body", "body": body, "more_body": False})
            else:
                # The server closes the connection of a body that stays incomplete.
                body = dump(self._dialect.error_body(error))
                await self._put(send, {"type": "http.response.body", "body": body, "more_body": True})
        except ClientGone:
            self._log("request_cancelled", reason="the client stopped reading")

    async def _send(self, send: Send, body: bytes, *, more: bool = True, timed: bool = False) -> None:
        """`timed`: not while `_keep_alive` watches, or by itself."""
        # One choice at a time, and none before the status line.
        async with self._sending:
            self._sent_at = time.monotonic()
            if not self._began:
                kind = b"text/event-stream; charset=utf-8" if self._prepared.stream else b"application/json"
                headers = [(b"content-type", kind), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                if (placed := self._placements.get(self._choices[0].request.request_id)) is not None:
                    headers.append((b"x-penumbra-placement", _told(placed).encode()))
                headers += [(name.encode(), value.encode()) for name, value in self._stay.headers().items()]
                if not more:
                    headers.append((b"content-length", str(len(body)).encode()))
                await self._put(send, {"type": "http.response.start", "status": 200, "headers": headers})
                self._began = True
            message = {"type": "http.response.body", "body": body, "more_body": more}
            if timed or not more:
                await self._put(send, message)
                return
            # Watched over by `_keep_alive`: a timer of its own would cost as much as the rest of it.
            self._writing = True
            try:
                await send(message)
            except OSError as error:
                raise ClientGone from error
            finally:
                self._writing = False

    async def _put(self, send: Send, message: Message) -> None:
        await put(send, message, self._serving.client_stall_s)


def _told(placement: Placement) -> str:
    """`x-penumbra-placement`: what was decided, why, and the workers."""
    parts = [f"{placement.decision}; reason={placement.reason.value}"]
    if placement.prefill is not None:
        parts.append(f"prefill={placement.prefill.worker_id}")
    parts.append(f"decode={placement.decode.worker_id}; expected_ms={placement.expected_s * 1e3:.0f}")
    return "; ".join(parts)
