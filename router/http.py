"""The HTTP door: OpenAI-style routes, server-sent events, and an answer to everything a client may send.

A request goes: `_read_body` -> a thread (`schema`, `chat`: JSON to token ids) -> `_Generation`, which runs the relay
while it watches for the client to leave. The status line of a stream is sent with its first token, so everything
that goes wrong before then still has a status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.chat import Answer, ChatPrompt, Header, Text, Usage, draw_seed
from router.config import ModelFacts, RouterConfig
from router.fleet import Fleet, WorkerView
from router.mirror import PrefixMirror
from router.placement import capacity, choose
from router.relay import RelayLimits, RelayRequest, relay
from router.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Json,
    TokenizeBody,
    one_prompt,
    parse_body,
    token_ids,
)
from wire.errors import BodyTooLarge, Draining, InvalidRequest, ModelNotFound, Overloaded, PenumbraError
from wire.events import cut
from wire.prefix import namespace, pack_tokens, packed_page_hashes
from wire.telemetry import RouterMetrics
from wire.types import FinishReason, SamplingParams, TokenEvent

COMPLETION_MAX_TOKENS = 16
"""What OpenAI generates for a completion that does not say."""

LONG_BODY_BYTES = 64 << 10
"""Bodies above this are prepared on threads of their own, so that short requests never queue behind a long one."""

LINGER_S = 2.0
"""How long a refused body may go on arriving before the connection closes."""

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

T = TypeVar("T")

log = structlog.get_logger()


class UnsupportedMedia(PenumbraError):
    code = "unsupported_media_type"
    http_status = 415


class BodyStalled(PenumbraError):
    code = "request_timeout"
    http_status = 408


class _ClientGone(Exception):
    """The client left or stopped reading; there is nobody to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request ready to be placed: for each choice ids for the workers, and the answer that turns theirs into text."""

    choices: tuple[tuple[RelayRequest, Answer], ...]
    stream: bool
    include_usage: bool


class Front:
    """The routes and what they share. `app` is the ASGI application; `draining` refuses new work."""

    def __init__(
        self,
        config: RouterConfig,
        facts: ModelFacts,
        text: Text,
        fleet: Fleet,
        mirror: PrefixMirror,
        metrics: RouterMetrics,
        registry: CollectorRegistry,
    ) -> None:
        self._config = config
        self._facts = facts
        self._text = text
        self._fleet = fleet
        self._mirror = mirror
        self._limits = RelayLimits.of(config)
        self._registry = registry
        self._metrics = metrics
        self._lanes = {
            long: ThreadPoolExecutor(2, thread_name_prefix="prepare-long" if long else "prepare")
            for long in (False, True)
        }
        self._running = 0
        self._started = int(time.time())
        self.draining = False
        self.app = _Door(self._routes(), self._metrics)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        self._text.close()

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        app.add_exception_handler(PenumbraError, _on_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_crash)
        get: dict[str, Callable[[Request], Any]] = {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/readiness": self._readiness,
            "/readyz": self._readiness,
            "/metrics": self._show_metrics,
            "/workers": self._workers,
            "/version": self._version,
        }
        get |= dict.fromkeys(("/health", "/healthz", "/liveness", "/livez", "/live"), self._liveness)
        post: dict[str, Callable[[Request], Any]] = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        for method, routes in (("GET", get), ("POST", post)):
            for path, endpoint in routes.items():
                app.add_api_route(path, endpoint, methods=[method], response_model=None)
        return app

    # Generation

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, self._prepare_completion)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, self._prepare_chat)

    async def _generate(self, request: Request, prepare: Callable[[bytes, int], Prepared]) -> Response:
        arrived = time.monotonic()
        self._admit()
        raw = await self._read_body(request)
        # Another look: reading took as long as the client liked.
        self._admit()
        prepared = await self._on_thread(raw, prepare, self._context())
        return _Generation(self, prepared, arrived, request)

    def _admit(self) -> None:
        if self.draining:
            raise Draining("This router is shutting down. Retry with another one.")
        if self._running >= self._config.max_concurrent_requests:
            raise Overloaded(
                f"{self._running} requests are running, the most this router serves at once. Retry in a moment."
            )

    def _prepare_completion(self, raw: bytes, context: int) -> Prepared:
        body = parse_body(CompletionBody, raw)
        self._check_model(body.model)
        prompt = one_prompt(body.prompt, self._facts.vocab_size)
        if isinstance(prompt, str):
            prompt = tuple(self._text.encode(prompt, add_special_tokens=body.add_special_tokens))
        max_tokens = _fit(len(prompt), body.max_tokens, context, default=COMPLETION_MAX_TOKENS)
        sampling = SamplingParams(
            **body.options(self._facts.vocab_size, max_tokens),
            seed=draw_seed() if body.seed is None else body.seed,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
        )
        relayed = self._relay_request(prompt, sampling, body.cache_salt)
        header = Header(
            answer_id=f"cmpl-{relayed.request_id}",
            model=body.model,
            prompt_ids=prompt,
            return_token_ids=bool(body.return_token_ids),
        )
        return Prepared(
            choices=tuple(
                (request, self._text.completion(replace(header, choice=i), sampling, body.stop or ()))
                for i, request in enumerate(_choices(relayed, body.n))
            ),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    def _prepare_chat(self, raw: bytes, context: int) -> Prepared:
        body = parse_body(ChatBody, raw)
        self._check_model(body.model)
        prompt = self._text.convert_chat(body.for_recipe())
        options = body.options(self._facts.vocab_size, self._chat_tokens(prompt, context))
        options["grammar"] = self._text.grammar_of(prompt)
        sampling = prompt.sampling(options, body.temperature, body.top_p)
        ids = tuple(prompt.ids)
        relayed = self._relay_request(ids, sampling, body.cache_salt)
        header = Header(
            answer_id=f"chatcmpl-{relayed.request_id}",
            model=body.model,
            prompt_ids=ids,
            return_token_ids=bool(body.return_token_ids),
        )
        return Prepared(
            choices=tuple(
                (request, self._text.chat(replace(header, choice=i), prompt))
                for i, request in enumerate(_choices(relayed, body.n))
            ),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    def _chat_tokens(self, prompt: ChatPrompt, context: int) -> int:
        _fit(len(prompt.ids), None, context, default=1)
        return _fit(len(prompt.ids), prompt.max_tokens(context), context, default=1)

    def _relay_request(self, prompt: tuple[int, ...], sampling: SamplingParams, cache_salt: str | None) -> RelayRequest:
        salt, packed = cache_salt or "", pack_tokens(prompt)
        return RelayRequest(
            # An id of our own: two clients may well send the same x-request-id at the same time.
            request_id=uuid.uuid4().hex,
            prompt=prompt,
            sampling=sampling,
            vocab_size=self._facts.vocab_size,
            packed=packed,
            cache_salt=salt,
            # As a rule there is one model; there are two while a fleet changes from one to the next.
            digests={
                model: cut(packed_page_hashes(packed, namespace(model, cache_salt=salt)))
                for model in self._fleet.models()
            },
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._config.model_names:
            raise ModelNotFound(
                f"The model '{name[:80]}' does not exist; this cluster serves {', '.join(self._config.model_names)}."
            )

    def _context(self) -> int:
        """Tokens, prompt and answer together, that a request may have: the model's limit, or the fleet's room."""
        limit = self._config.max_context or self._facts.max_context
        room = capacity(self._fleet.snapshot())
        return limit if room is None else min(limit, room)

    # Text

    async def _tokenize(self, request: Request) -> Response:
        def prepare(raw: bytes) -> Json:
            body = parse_body(TokenizeBody, raw)
            self._check_model(body.model)
            if body.prompt is not None:
                ids = self._text.encode(body.prompt, add_special_tokens=body.add_special_tokens)
            else:
                ids = self._text.convert_chat(body.for_recipe(self._config.model_names[0])).ids
            return {"count": len(ids), "max_model_len": context, "tokens": ids}

        raw = await self._read_body(request)
        context = self._context()
        return _json(await self._on_thread(raw, prepare))

    async def _detokenize(self, request: Request) -> Response:
        def prepare(raw: bytes) -> Json:
            body = parse_body(DetokenizeBody, raw)
            self._check_model(body.model)
            ids = token_ids(body.tokens, self._facts.vocab_size, param="tokens") if body.tokens != [] else ()
            return {"prompt": self._text.decode(ids, skip_special_tokens=body.skip_special_tokens)}

        return _json(await self._on_thread(await self._read_body(request), prepare))

    async def _on_thread(self, raw: bytes, prepare: Callable[..., T], *more: object) -> T:
        lane = self._lanes[len(raw) > LONG_BODY_BYTES]
        return await asyncio.get_running_loop().run_in_executor(lane, prepare, raw, *more)

    # State

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model_card(name) for name in self._config.model_names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return _json(self._model_card(name))

    def _model_card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "penumbra",
            "max_model_len": self._context(),
        }

    async def _liveness(self, _: Request) -> Response:
        return _json({"status": "draining" if self.draining else "ok"})

    async def _readiness(self, _: Request) -> Response:
        """200 when a request could be placed now."""
        fleet = self._fleet.snapshot()
        ready = not self.draining and choose(fleet, 1, 1) is not None
        body = {
            "status": "ready" if ready else "not ready",
            "prefill": sum(view.usable for view in fleet.prefill),
            "decode": sum(view.usable for view in fleet.decode),
            "registry_stale_s": round(fleet.registry_stale_s, 3),
        }
        return _json(body, status=200 if ready else 503)

    async def _workers(self, _: Request) -> Response:
        fleet = self._fleet.snapshot()
        mirrored = self._mirror.num_pages()
        workers = [
            _worker_card(view) | {"mirrored_pages": mirrored.get(view.info.worker_id, 0)}
            for view in (*fleet.prefill, *fleet.decode)
        ]
        return _json({"workers": workers, "registry_stale_s": round(fleet.registry_stale_s, 3)})

    async def _show_metrics(self, _: Request) -> Response:
        fleet = self._fleet.snapshot()
        for role, views in (("prefill", fleet.prefill), ("decode", fleet.decode)):
            self._metrics.workers.labels(role).set(sum(view.usable for view in views))
        self._metrics.registry_stale.set(fleet.registry_stale_s)
        self._metrics.mirror_pages.clear()  # nobody sums up workers that are gone
        for worker_id, num_pages in self._mirror.num_pages().items():
            self._metrics.mirror_pages.labels(worker_id).set(num_pages)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _version(self, _: Request) -> Response:
        try:
            return _json({"version": version("penumbra")})
        except PackageNotFoundError:
            return _json({"version": "unknown"})

    # Bodies

    async def _read_body(self, request: Request) -> bytes:
        """The whole body within the limit, whatever its headers claim."""
        limit = self._config.max_body_bytes
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        charset = parameters.partition("charset=")[2].strip(' "').lower() or "utf-8"
        if kind.strip().lower() != "application/json" or charset not in ("utf-8", "utf8"):
            raise UnsupportedMedia("Send the body as 'content-type: application/json' in UTF-8.")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedMedia("Compressed bodies are not accepted. Send the JSON as it is.")
        too_large = BodyTooLarge(f"The body is larger than {limit} bytes, the most this router reads. Shorten it.")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            raise too_large
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_silence_s) as clock:
                async for piece in request.stream():
                    pieces.append(piece)
                    size += len(piece)
                    if size > limit:
                        raise too_large
                    clock.reschedule(asyncio.get_running_loop().time() + self._config.body_silence_s)
        except TimeoutError as error:
            raise BodyStalled(
                f"The body stopped arriving for {self._config.body_silence_s:g} s, short of its length."
            ) from error
        return b"".join(pieces)


# One response


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One of a request's answers on its way. Times are monotonic seconds."""

    request: RelayRequest
    answer: Answer
    arrived: float
    first_token: float | None = None
    last_token: float | None = None
    usage: Usage | None = None  # once it is complete

    def timing(self) -> dict[str, float]:
        if self.first_token is None or self.last_token is None:
            return {}
        fields = {"ttft_ms": round((self.first_token - self.arrived) * 1e3, 1)}
        num_tokens = self.answer.num_tokens
        if num_tokens > 1:
            fields["tpot_ms"] = round((self.last_token - self.first_token) * 1e3 / (num_tokens - 1), 2)
        return fields


class _Generation(Response):
    """A response that is still being generated. It ends within its own call, however that call ends."""

    def __init__(self, front: Front, prepared: Prepared, arrived: float, request: Request) -> None:
        self._front = front
        self._prepared = prepared
        self._choices = [
            _Choice(request=request, answer=answer, arrived=arrived) for request, answer in prepared.choices
        ]
        self._client_id = request.state.request_id
        self._began = False  # the status line is out
        self._sending = asyncio.Lock()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._front._metrics
        self._front._running += 1
        metrics.running.inc()
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._answer(send))
                watch = tasks.create_task(_until_gone(receive))
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    scope["state"]["client_gone"] = True
                work.cancel()
                watch.cancel()
        finally:
            self._front._running -= 1
            metrics.running.dec()
        if scope["state"].get("client_gone"):
            self._log("request_cancelled")

    async def _answer(self, send: Send) -> None:
        """Everything from placement to the last byte. Never raises but when cancelled."""
        try:
            await self._relay(send)
        except _ClientGone:
            self._log("request_cancelled", reason="the client stopped reading")
        except PenumbraError as error:
            self._front._metrics.errors.labels(error.code).inc()
            self._log("request_failed", error_code=error.code, error=str(error))
            await self._send_error(send, error)
        except Exception:
            log.exception("request_crashed", request_id=self._choices[0].request.request_id)
            self._front._metrics.errors.labels(PenumbraError.code).inc()
            await self._send_error(send, PenumbraError("The router failed on this request; its log has the details."))

    async def _relay(self, send: Send) -> None:
        prepared, choices = self._prepared, self._choices
        self._front._metrics.prompt_tokens.inc(len(choices[0].request.prompt))
        await self._together([self._follow(choice, send) for choice in choices])
        self._front._metrics.e2e.observe(time.monotonic() - choices[0].arrived)
        wholes = [choice.answer.response(choice.usage) for choice in choices if choice.usage is not None]
        whole = _merge(wholes)
        if not prepared.stream:
            await self._send(send, _dump(whole), content_type=b"application/json", more=False)
            return
        usage = {key: whole[key] for key in ("id", "created", "model")} | _usage_chunk(whole)
        await self._send_events(send, [usage] if prepared.include_usage else [], done=True)

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
        front, prepared, answer = self._front, self._prepared, choice.answer
        request = choice.request

        def on_retry(attempt: int, error: PenumbraError) -> None:
            front._metrics.retries.labels(error.code).inc()
            self._log("attempt_failed", choice, attempt=attempt, error_code=error.code, error=str(error))

        async with relay(front._fleet, request, front._limits, front._mirror, on_retry=on_retry) as tokens:
            async for batch in tokens:
                self._measure(choice, batch)
                opening = answer.opening() if answer.num_tokens == 0 else []
                chunks = opening + answer.push(batch)
                if prepared.stream and chunks:
                    await self._send_events(send, chunks)
                if answer.stopped:
                    break
        finished = tokens.finished
        choice.usage = usage = Usage(
            prompt_tokens=len(request.prompt),
            completion_tokens=answer.num_tokens,
            cached_tokens=min(tokens.cached_tokens, len(request.prompt)),
        )
        reason = FinishReason.STOP if finished is None else finished.reason
        last = answer.close(reason, usage)
        front._metrics.cached_tokens.inc(usage.cached_tokens)
        placed = tokens.placement
        self._log(
            "request_done",
            choice,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=reason.value,
            attempts=tokens.attempts,
            prefill=placed and placed.prefill.worker_id,
            decode=placed and placed.decode.worker_id,
        )
        if prepared.stream and last:
            await self._send_events(send, last)

    def _measure(self, choice: _Choice, batch: tuple[TokenEvent, ...]) -> None:
        now, metrics = time.monotonic(), self._front._metrics
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
        body = b"".join(_event(chunk) for chunk in chunks) + (b"data: [DONE]\n\n" if done else b"")
        await self._send(send, body, content_type=b"text/event-stream; charset=utf-8", more=not done)

    async def _send_error(self, send: Send, error: PenumbraError) -> None:
        try:
            if not self._began:
                response = error_response(error)
                head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
                await self._put(send, head)
                await self._put(send, {"type": "http.response.body", "body": response.body})
            else:
                # The stream ends without [DONE], so that no client takes half an answer for a whole one.
                body = _event(error_body(error))
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
                if not more:
                    headers.append((b"content-length", str(len(body)).encode()))
                await self._put(send, {"type": "http.response.start", "status": 200, "headers": headers})
                self._began = True
            await self._put(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _put(self, send: Send, message: Message) -> None:
        """A client that does not read fills the socket; the write then waits for it, but not for ever."""
        try:
            async with asyncio.timeout(self._front._config.client_stall_s):
                await send(message)
        except (TimeoutError, OSError) as error:
            raise _ClientGone from error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: Json) -> bytes:
    return b"data: " + _dump(data) + b"\n\n"


def _choices(request: RelayRequest, n: int | None) -> list[RelayRequest]:
    """One request to the workers for each choice: they share the prompt and its pages, and differ in their noise."""
    return [
        replace(request, request_id=f"{request.request_id}-{i}" if i else request.request_id, sampling=sampling)
        for i, sampling in enumerate(replace(request.sampling, choice=i) for i in range(n or 1))
    ]


def _merge(wholes: list[Json]) -> Json:
    """One body with the choices of all and what they used together; the prompt counts once."""
    whole, *others = wholes
    usage = whole["usage"]
    for other in others:
        whole["choices"] += other["choices"]
        for key in ("completion_tokens", "total_tokens"):
            usage[key] += other["usage"]["completion_tokens"]
        for key, count in other["usage"].get("completion_tokens_details", {}).items():
            details = usage.setdefault("completion_tokens_details", {})
            details[key] = details.get(key, 0) + count
    return whole


def _usage_chunk(whole: Json) -> Json:
    kind = whole["object"]
    return {
        "object": "chat.completion.chunk" if kind == "chat.completion" else kind,
        "choices": [],
        "usage": whole["usage"],
    }


def _fit(prompt_tokens: int, max_tokens: int | None, context: int, *, default: int) -> int:
    """Tokens to generate. Raises InvalidRequest when prompt and answer do not fit the context."""
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > context:
        raise InvalidRequest(
            f"The maximum context length is {context} tokens, but the request needs {prompt_tokens + wanted}: "
            f"{prompt_tokens} in the prompt and {wanted} to generate. Shorten the prompt or lower max_tokens.",
            param="prompt",
            code="context_length_exceeded",
        )
    return min(default, context - prompt_tokens) if max_tokens is None else max_tokens


def _worker_card(view: WorkerView) -> Json:
    state = "draining" if view.info.draining else "serving" if view.serving else "down"
    return asdict(view.info) | {"epoch": f"{view.info.epoch:016x}", "state": state}


# Errors


def error_body(error: PenumbraError) -> Json:
    detail = error.detail_code if isinstance(error, InvalidRequest) else error.code
    param = error.param if isinstance(error, InvalidRequest) else None
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": detail}}


def error_response(error: PenumbraError) -> Response:
    if isinstance(error, BodyTooLarge | BodyStalled | UnsupportedMedia):
        return _UnreadRefusal(error)
    headers = {"retry-after": "1", "retry-after-ms": "1000"} if error.http_status == 503 else None
    return _json(error_body(error), status=error.http_status, headers=headers)


class _UnreadRefusal(Response):
    """A refusal sent before the body was read. Closing at once would reset a connection the client still writes
    to, and take our answer with it; so what arrives in the next moments is thrown away first."""

    def __init__(self, error: PenumbraError) -> None:
        super().__init__(
            _dump(error_body(error)),
            status_code=error.http_status,
            headers={"connection": "close"},
            media_type="application/json",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PenumbraError)
    request.state.error_code = error_body(error)["error"]["code"]
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What routing itself refuses: unknown paths and wrong verbs."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = {404: "There is nothing at this path.", 405: "This path does not take that method."}
    body = {
        "error": {
            "message": message.get(error.status_code, error.detail),
            "type": "invalid_request_error",
            "param": None,
            "code": code,
        }
    }
    request.state.error_code = code
    return _json(body, status=error.status_code, headers=error.headers)


async def _on_crash(_: Request, error: Exception) -> Response:
    return error_response(PenumbraError("The router failed on this request; its log has the details."))


def _json(data: Json, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dump(data), status_code=status, headers=headers, media_type="application/json")


def _dump(data: Json) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class _Door:
    """Around every route: the request's id, the count of its outcome, and the last catch."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
        request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            state["client_gone"] = True
        except asyncio.CancelledError:
            # The server's grace is over and this task ends here; uvicorn closes the connection of an answer that
            # was not completed.
            log.warning("request_cut", client_request_id=request_id, reason="shutdown")
        except Exception:
            # The crash handler has answered; what is left is to say so here, once.
            log.exception("request_crashed", client_request_id=request_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            outcome = 499 if state.get("client_gone") else status
            self._metrics.requests.labels(route, str(outcome)).inc()
            if "error_code" in state:
                self._metrics.errors.labels(state["error_code"]).inc()
