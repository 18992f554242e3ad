"""The HTTP door: which route leads where, bodies as they arrive, and an answer to everything a client may send.

A request goes: `read_body` -> a thread (`protocols`: JSON to token ids) -> `Generation`, which runs the relay while it
watches for the client to leave.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import replace

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import openapi
from router.admission import Admission, Wishes
from router.attempts import RelayLimits
from router.board import Board
from router.config import ModelFacts, RouterConfig, is_inside
from router.dialects import (
    BodyStalled,
    Dialect,
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
from router.guard import Guard
from router.intake import Prepared
from router.live import LiveRequests
from router.mirror import PrefixMirror
from router.preparation import CONVERTING, GENERATING, Preparation
from router.quota import Quotas, Stay
from router.replicas import Replicas
from router.status import Status
from router.streams import (
    Context,
    Idempotency,
    Keeping,
    Resumed,
    Signer,
    StreamId,
    attach,
    resume_s,
)
from router.tenants import Keyring, Tenant
from router.text import Text
from router.timeline import Timeline
from wire.errors import BodyTooLarge, InvalidRequest, PenumbraError
from wire.telemetry import RouterMetrics, running_version
from wire.tracing import TRACEPARENT, Tracer

REQUEST_ID_HEADERS = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")
"""Where a client or a proxy may have named the request; the first usable one counts."""

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

RESERVED_ANSWER_TOKENS = 4_096
"""The part of an answer that is reserved from a tenant's tokens a minute; what it turns out to be counts in the end."""

PRIORITY_HEADER = "x-dynamo-request-priority"
PRIORITY = re.compile(r"-?[0-9]{1,4}")

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
        replicas: Replicas,
    ) -> None:
        self._config = config
        self._preparation = Preparation(config, facts, text, fleet)
        self.keyring = None if config.keys_file is None else Keyring(config.keys_file)
        self.admission = Admission(config, metrics, fleet.snapshot, mirror)
        self._quotas = Quotas(replicas)
        self._idempotency = Idempotency(replicas)
        self._signer = Signer(config.stream_key_file)
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
        self._status = Status(self._preparation, self.admission, fleet, mirror, metrics, registry)
        about = {"router_id": config.router_id, "models": list(config.model_names)}
        self.page = FrontPage(Board(requests), fleet, mirror, self.admission, about, metrics.viewers.set)
        routes = self._routes()
        self.app = _Door(self._guarded(routes, config.host), metrics, tracer)
        self.admin_app = _Door(self._guarded(routes, config.admin_host, admin=True), metrics, tracer)

    def close(self) -> None:
        self._preparation.close()

    def refresh_keys(self) -> None:
        """Take in what has changed in the key file."""
        if self.keyring is not None:
            self.keyring.refresh()

    def _guarded(self, routes: ASGIApp, host: str, *, admin: bool = False) -> Guard:
        return Guard(
            routes,
            self.keyring,
            self._quotas,
            counted=GENERATING,
            inside=is_inside(host),
            admin_port=self._config.admin_port is not None,
            admin=admin,
        )

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        app.add_exception_handler(PenumbraError, _on_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_crash)
        post = dict.fromkeys(GENERATING, self._generate) | dict.fromkeys(CONVERTING, self._convert)
        get = (
            self._status.routes()
            | self.page.routes()
            | {"/openapi.json": self._openapi, "/v1/streams/{stream_id}": self._stream}
        )
        for method, routes in (("GET", get), ("POST", post)):
            for path, endpoint in routes.items():
                told = openapi.OPERATIONS[path.replace(":path}", "}")]
                assert told.method == method.lower(), f"the document tells of {told.method} {path}"
                app.add_api_route(path, endpoint, methods=[method], response_model=None)
        return app

    async def _openapi(self, _: Request) -> Response:
        return json_response(openapi.document(running_version()))

    async def _generate(self, request: Request) -> Response:
        timeline = Timeline(time.monotonic())
        self.admission.check()
        wishes = wishes_of(request)
        raw = await self._read_body(request)
        timeline.ended("receive", time.monotonic())
        # Another look: reading took as long as the client liked.
        self.admission.check()
        stay: Stay = request.state.stay
        key = request.headers.get("idempotency-key")
        # A body may have a priority, which counts in line, and a key may lead to an answer that is there already.
        if wishes.may_wait and key is None and b'"priority"' not in raw:
            self.admission.check_line(len(raw), stay.tenant, wishes)
        keep_s = resume_s(request.headers.get("x-penumbra-resume"), key)
        path = request.url.path
        if key is not None:
            before = await self._idempotency.claim(stay.tenant, key, path, raw)
            if before and await self._is_kept(before, stay.tenant):
                return self._resumed(before, stay.tenant)
        with self.admission.coming(len(raw)):
            prepared = await self._preparation.prepare(path, self._preparation.intake(stay.tenant), raw)
        keeping = None
        if key is not None and keep_s:
            prepared, keeping = self._kept(prepared, stay.tenant, key, keep_s, path, raw)
        if prepared.priority is not None and PRIORITY_HEADER not in request.headers:
            wishes = replace(wishes, priority=prepared.priority)
        await self._quotas.reserve(stay, tokens_at_most(prepared))
        timeline.ended("tokenize", time.monotonic())
        span = self._serving.tracer.serving(
            f"POST {path}", request.headers.get(TRACEPARENT, ""), begin_s=timeline.arrived
        )
        request.state.traced = True
        return Generation(
            self._serving,
            dialect_of(request.url.path),
            prepared,
            stay,
            wishes,
            timeline=timeline,
            span=span,
            keeping=keeping,
            client_request_id=request.state.request_id,
        )

    def _kept(
        self, prepared: Prepared, tenant: Tenant, key: str, keep_s: int, path: str, raw: bytes
    ) -> tuple[Prepared, Keeping]:
        """The request as one that outlives its client. Raises InvalidRequest for one that can not."""
        (request, answer), *others = prepared.choices
        if others or not prepared.stream:
            raise InvalidRequest("x-penumbra-resume is for streams of one choice: send stream=true and n=1.")
        context = Context(
            path=path,
            tenant=tenant.tenant_id,
            request_id=request.request_id,
            created=int(time.time()),
            raw=raw,
        )
        kept = replace(request, keep_s=keep_s, context=context.pack())

        def sign(stream: StreamId) -> str:
            return self._signer.sign(stream, tenant.tenant_id)

        async def told(stream: StreamId) -> None:
            await self._idempotency.answered_in(tenant, key, path, raw, sign(stream))

        return replace(prepared, choices=((kept, answer),)), Keeping(keep_s, sign, told)

    async def _stream(self, request: Request) -> Response:
        """Go on with an answer where its client has left it."""
        return self._resumed(request.path_params["stream_id"], request.state.tenant)

    async def _is_kept(self, signed: str, tenant: Tenant) -> bool:
        try:
            stream = self._signer.read(signed, tenant.tenant_id)
            async with attach(self._serving.fleet, stream, tenant.tenant_id):
                return True
        except PenumbraError:
            return False

    def _resumed(self, signed: str, tenant: Tenant) -> Response:
        async def prepare(context: Context) -> tuple[Dialect, Prepared]:
            intake = self._preparation.intake(tenant, request_id=context.request_id, created=context.created)
            return dialect_of(context.path), await self._preparation.prepare(context.path, intake, context.raw)

        return Resumed(
            self._serving.fleet,
            self._signer.read(signed, tenant.tenant_id),
            tenant.tenant_id,
            prepare,
            lambda stream: self._signer.sign(stream, tenant.tenant_id),
            keepalive_s=self._config.sse_keepalive_s,
            client_stall_s=self._config.client_stall_s,
        )

    async def _convert(self, request: Request) -> Response:
        intake = self._preparation.intake(request.state.tenant)
        body = await self._preparation.convert(request.url.path, intake, await self._read_body(request))
        return Response(body, media_type="application/json")

    async def _read_body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.body_silence_s)


def tokens_at_most(prepared: Prepared) -> int:
    """What a request is taken to use before it has: its prompt, and as much of its answers as it may well get.

    A client that does not limit its answer asks for all of the context and uses little of it.
    """
    requests = [request for request, _ in prepared.choices]
    answers = sum(min(request.sampling.max_tokens, RESERVED_ANSWER_TOKENS) for request in requests)
    return len(requests[0].prompt) + answers


def wishes_of(request: Request) -> Wishes:
    """How the request's headers want it to wait. Raises InvalidRequest for a priority that is none."""
    sent = request.headers.get(PRIORITY_HEADER, "0")
    if not PRIORITY.fullmatch(sent):
        raise InvalidRequest(f"{PRIORITY_HEADER} is an integer from -1000 to 1000; lower goes first.")
    return Wishes(
        priority=max(-1000, min(1000, int(sent))),
        may_wait="if-available" not in request.headers.get("prefer", "").lower(),
    )


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
    request.state.error_code, request.state.refusal = detail_code(error), error
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
    """Around every route: the request's id, the count of its outcome, a span if nothing came of it, the last catch."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics, tracer: Tracer) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

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
        status, arrived = 0, time.monotonic()

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
            refusal = state.pop("refusal", None)  # its traceback knows the state: kept, it would be a circle
            if "error_code" in state:
                self._metrics.errors.labels(state["error_code"]).inc()
            if scope["path"] in GENERATING and "traced" not in state:
                # Refused before there was anything to generate.
                span = self._tracer.serving(
                    f"{scope['method']} {scope['path']}",
                    headers.get(TRACEPARENT.encode(), b"").decode("latin-1"),
                    begin_s=arrived,
                )
                span.set(status=outcome, request_id=request_id)
                span.end(asyncio.CancelledError() if state.get("client_gone") else refusal)
