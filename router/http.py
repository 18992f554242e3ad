"""The HTTP door: which route leads where, bodies as they arrive, and an answer to everything a client may send.

A request goes: `read_body` -> a thread (`protocols`: JSON to token ids) -> `Generation`, which runs the relay while it
watches for the client to leave.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.admission import Admission
from router.answers import Json
from router.board import Board
from router.config import ModelFacts, RouterConfig
from router.dialects import (
    BodyStalled,
    MethodNotAllowed,
    NotFound,
    UnsupportedMedia,
    detail_code,
    dialect_of,
    json_response,
)
from router.fleet import Fleet
from router.front_page import FrontPage
from router.generation import Generation, Serving
from router.intake import Intake, Prepared
from router.live import LiveRequests
from router.mirror import PrefixMirror
from router.protocols import chat, completions, messages, responses, tokenize
from router.relay import RelayLimits
from router.status import Status
from router.text import Text
from router.timeline import Timeline
from wire.errors import BodyTooLarge, InvalidRequest, PenumbraError
from wire.telemetry import RouterMetrics
from wire.tracing import TRACEPARENT, Tracer

REQUEST_ID_HEADERS = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")
"""Where a client or a proxy may have named the request; the first usable one counts."""

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

GENERATING: Mapping[str, Callable[[Intake, bytes, int], Prepared]] = {
    "/v1/completions": completions.prepare,
    "/v1/chat/completions": chat.prepare,
    "/v1/responses": responses.prepare,
    "/v1/messages": messages.prepare,
}
"""Routes whose answers are generated, by what prepares their requests."""

CONVERTING: Mapping[str, Callable[[Intake, bytes, int], Json]] = {
    "/v1/messages/count_tokens": messages.count_tokens,
    "/tokenize": tokenize.tokenize,
    "/detokenize": tokenize.detokenize,
}
"""Routes whose answers need no worker."""

log = structlog.get_logger()


class Front:
    """The routes and what they share. `app` is the ASGI application."""

    def __init__(
        self,
        config: RouterConfig,
        facts: ModelFacts,
        text: Text,
        fleet: Fleet,
        mirror: PrefixMirror,
        metrics: RouterMetrics,
        registry: CollectorRegistry,
        tracer: Tracer,
    ) -> None:
        self._config = config
        self._intake = Intake(config, facts, text, fleet)
        self.admission = Admission(config, metrics)
        requests = LiveRequests()
        self._serving = Serving(
            fleet=fleet,
            mirror=mirror,
            limits=RelayLimits.of(config),
            admission=self.admission,
            metrics=metrics,
            requests=requests,
            tracer=tracer,
            client_stall_s=config.client_stall_s,
            sse_keepalive_s=config.sse_keepalive_s,
            json_keepalive_s=config.json_keepalive_s,
        )
        self._status = Status(self._intake, self.admission, fleet, mirror, metrics, registry)
        about = {"router_id": config.router_id, "models": list(config.model_names)}
        self.page = FrontPage(Board(requests), fleet, mirror, self.admission, about)
        self.app = _Door(self._routes(), metrics)

    def close(self) -> None:
        self._intake.close()

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        app.add_exception_handler(PenumbraError, _on_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_crash)
        post = {path: self._generate(prepare) for path, prepare in GENERATING.items()}
        post |= {path: self._convert(convert) for path, convert in CONVERTING.items()}
        self.page.add_to(app)
        for method, routes in (("GET", self._status.routes() | self.page.routes()), ("POST", post)):
            for path, endpoint in routes.items():
                app.add_api_route(path, endpoint, methods=[method], response_model=None)
        return app

    def _generate(self, prepare: Callable[[Intake, bytes, int], Prepared]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            timeline = Timeline(time.monotonic())
            self.admission.check()
            raw = await self._read_body(request)
            timeline.ended("receive", time.monotonic())
            # Another look: reading took as long as the client liked.
            self.admission.check()
            prepared = await self._intake.run(prepare, raw)
            timeline.ended("tokenize", time.monotonic())
            span = self._serving.tracer.serving(
                f"POST {request.url.path}", request.headers.get(TRACEPARENT, ""), begin_s=timeline.arrived
            )
            return Generation(
                self._serving,
                dialect_of(request.url.path),
                prepared,
                timeline=timeline,
                span=span,
                client_request_id=request.state.request_id,
            )

        return endpoint

    def _convert(self, convert: Callable[[Intake, bytes, int], Json]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return json_response(await self._intake.run(convert, await self._read_body(request)))

        return endpoint

    async def _read_body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.body_silence_s)


Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


async def read_body(request: Request, limit: int, silence_s: float) -> bytes:
    """The whole body: at most `limit` bytes, whatever its headers claim, and at most `silence_s` between two pieces."""
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
        async with asyncio.timeout(silence_s) as clock:
            async for piece in request.stream():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise too_large
                clock.reschedule(asyncio.get_running_loop().time() + silence_s)
    except TimeoutError as error:
        raise BodyStalled(f"The body stopped arriving for {silence_s:g} s, short of its length.") from error
    return b"".join(pieces)


# Errors


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PenumbraError)
    request.state.error_code = detail_code(error)
    return dialect_of(request.url.path).refusal(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What routing itself refuses: unknown paths and wrong verbs."""
    assert isinstance(error, HTTPException)
    ours: PenumbraError
    match error.status_code:
        case 404:
            ours = NotFound("There is nothing at this path.")
        case 405:
            ours = MethodNotAllowed("This path does not take that method.")
        case _:
            ours = InvalidRequest(error.detail)
    request.state.error_code = ours.code
    return dialect_of(request.url.path).refusal(ours, error.headers)


async def _on_crash(request: Request, error: Exception) -> Response:
    crash = PenumbraError("The router failed on this request; its log has the details.")
    return dialect_of(request.url.path).refusal(crash)


class _Door:
    """Around every route: the request's id, the count of its outcome, and the last catch."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # of several the first counts
        sent = (headers.get(name, b"").decode("latin-1") for name in REQUEST_ID_HEADERS)
        request_id = next((name for name in sent if REQUEST_ID.fullmatch(name)), "") or uuid.uuid4().hex
        names = dialect_of(scope["path"]).request_id_headers
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in names)]
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
