"""One running answer and its client: relayed tokens become bytes until either of the two has had enough.

The status line of a stream is sent with its first token, so everything that goes wrong before then still has a
status of its own. After it an error is one more event, the last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.admission import Admission
from router.answers import Answer, Json, Usage, merged, usage_chunk
from router.dialects import Dialect, dump
from router.fleet import Fleet
from router.intake import Prepared
from router.live import LiveRequests
from router.mirror import PrefixMirror
from router.placement import Placement
from router.relay import RelayLimits, RelayRequest, relay
from wire.errors import PenumbraError
from wire.telemetry import RouterMetrics
from wire.types import FinishReason, TokenEvent

log = structlog.get_logger()


class _ClientGone(Exception):
    """The client left or stopped reading; there is nobody to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What all running answers share."""

    fleet: Fleet
    mirror: PrefixMirror
    limits: RelayLimits
    admission: Admission
    metrics: RouterMetrics
    requests: LiveRequests
    client_stall_s: float


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One of a request's answers on its way. Times are monotonic seconds."""

    request: RelayRequest
    answer: Answer
    arrived: float
    first_token: float | None = None
    last_token: float | None = None
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
        if self.first_token is None or self.last_token is None:
            return {}
        fields = {"ttft_ms": round((self.first_token - self.arrived) * 1e3, 1)}
        num_tokens = self.answer.num_tokens
        if num_tokens > 1:
            fields["tpot_ms"] = round((self.last_token - self.first_token) * 1e3 / (num_tokens - 1), 2)
        return fields


class Generation(Response):
    """A response that is still being generated. It ends within its own call, however that call ends."""

    def __init__(
        self, serving: Serving, dialect: Dialect, prepared: Prepared, *, arrived: float, client_request_id: str
    ) -> None:
        self._serving = serving
        self._dialect = dialect
        self._prepared = prepared
        self._choices = [
            _Choice(request=request, answer=answer, arrived=arrived) for request, answer in prepared.choices
        ]
        self._client_id = client_request_id
        self._began = False  # the status line is out
        self._num_events = 0
        self._placements: dict[str, Placement] = {}  # where each choice went last
        self._sending = asyncio.Lock()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._serving.admission.running():
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._answer(send))
                watch = tasks.create_task(_until_gone(receive))
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    scope["state"]["client_gone"] = True
                work.cancel()
                watch.cancel()
        if scope["state"].get("client_gone"):
            self._log("request_cancelled")

    async def _answer(self, send: Send) -> None:
        """Everything from placement to the last byte. Never raises but when cancelled."""
        try:
            await self._relay(send)
        except _ClientGone:
            self._log("request_cancelled", reason="the client stopped reading")
        except PenumbraError as error:
            self._serving.metrics.errors.labels(error.code).inc()
            self._log("request_failed", error_code=error.code, error=str(error))
            await self._send_error(send, error)
        except Exception:
            log.exception("request_crashed", request_id=self._choices[0].request.request_id)
            self._serving.metrics.errors.labels(PenumbraError.code).inc()
            await self._send_error(send, PenumbraError("The router failed on this request; its log has the details."))

    async def _relay(self, send: Send) -> None:
        prepared, choices, metrics = self._prepared, self._choices, self._serving.metrics
        metrics.prompt_tokens.inc(len(choices[0].request.prompt))
        await self._together([self._follow(choice, send) for choice in choices])
        metrics.e2e.observe(time.monotonic() - choices[0].arrived)
        if prepared.stream and not prepared.include_usage:
            await self._send_events(send, [], done=True)
            return
        whole = merged([choice.answer.response(choice.usage) for choice in choices if choice.usage is not None])
        if prepared.stream:
            await self._send_events(send, [usage_chunk(whole)], done=True)
        else:
            await self._send(send, dump(whole), content_type=b"application/json", more=False)

    async def _together(self, parts: list[Coroutine[Any, Any, None]]) -> None:
        """Run all parts. The first to fail ends the others, and its error is the one raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for part in parts:
                    tasks.create_task(part)
        except* Exception as failures:
            error = failures.exceptions[0]
        else:
            return
        raise error

    async def _follow(self, choice: _Choice, send: Send) -> None:
        """Relay one choice to its end."""
        serving, prepared, answer = self._serving, self._prepared, choice.answer
        request = choice.request

        def on_retry(attempt: int, error: PenumbraError) -> None:
            serving.metrics.retries.labels(error.code).inc()
            self._log("attempt_failed", choice, attempt=attempt, error_code=error.code, error=str(error))

        def on_place(placement: Placement) -> None:
            self._placements[request.request_id] = placement
            serving.metrics.placements.labels(placement.decision, placement.reason.value).inc()

        with serving.requests.follow(request, choice.arrived) as live:
            async with relay(
                serving.fleet, request, serving.limits, serving.mirror, on_retry=on_retry, on_place=on_place
            ) as tokens:
                live.feed = tokens
                async for batch in tokens:
                    self._measure(choice, batch)
                    live.tokens(time.monotonic(), len(batch))
                    opening = answer.opening(choice.used(tokens.cached_tokens)) if answer.num_tokens == 0 else []
                    chunks = opening + answer.push(batch)
                    if prepared.stream and chunks:
                        await self._send_events(send, chunks)
                    if answer.stopped:
                        break
        finished = tokens.finished
        choice.usage = usage = choice.used(tokens.cached_tokens)
        reason = FinishReason.STOP if finished is None else finished.reason
        last = answer.close(reason, usage)
        serving.metrics.cached_tokens.inc(usage.cached_tokens)
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

    def _measure(self, choice: _Choice, batch: tuple[TokenEvent, ...]) -> None:
        now, metrics = time.monotonic(), self._serving.metrics
        metrics.generation_tokens.inc(len(batch))
        if choice.last_token is None:
            choice.first_token = now
            metrics.ttft.observe(now - choice.arrived)
        else:
            for _ in batch:
                metrics.itl.observe((now - choice.last_token) / len(batch))
        choice.last_token = now

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

    # Bytes

    async def _send_events(self, send: Send, chunks: list[Json], *, done: bool = False) -> None:
        self._num_events += len(chunks)
        body = b"".join(map(self._dialect.event, chunks)) + (self._dialect.done if done else b"")
        await self._send(send, body, content_type=b"text/event-stream; charset=utf-8", more=not done)

    async def _send_error(self, send: Send, error: PenumbraError) -> None:
        try:
            if not self._began:
                response = self._dialect.refusal(error)
                head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
                await self._put(send, head)
                await self._put(send, {"type": "http.response.body", "body": response.body})
            else:
                # The stream ends here and without its closing words, so that no client takes half an answer for a
                # whole one.
                body = self._dialect.event(self._dialect.error_event(error, self._num_events))
                await self._put(send, {"type": "http.response.body", "body": body, "more_body": False})
        except _ClientGone:
            self._log("request_cancelled", reason="the client stopped reading")

    async def _send(self, send: Send, body: bytes, *, content_type: bytes, more: bool) -> None:
        # One choice at a time, and none before the status line.
        async with self._sending:
            if not self._began:
                headers = [
                    (b"content-type", content_type),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ]
                if (placed := self._placements.get(self._choices[0].request.request_id)) is not None:
                    headers.append((b"x-penumbra-placement", _told(placed).encode()))
                if not more:
                    headers.append((b"content-length", str(len(body)).encode()))
                await self._put(send, {"type": "http.response.start", "status": 200, "headers": headers})
                self._began = True
            await self._put(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _put(self, send: Send, message: Message) -> None:
        """A client that does not read fills the socket; the write then waits for it, but not for ever."""
        try:
            async with asyncio.timeout(self._serving.client_stall_s):
                await send(message)
        except (TimeoutError, OSError) as error:
            raise _ClientGone from error


def _told(placement: Placement) -> str:
    """`x-penumbra-placement`: what was decided, why, and the workers."""
    parts = [f"{placement.decision}; reason={placement.reason.value}"]
    if placement.prefill is not None:
        parts.append(f"prefill={placement.prefill.worker_id}")
    parts.append(f"decode={placement.decode.worker_id}; expected_ms={placement.expected_s * 1e3:.0f}")
    return "; ".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
