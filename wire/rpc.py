"""How processes call each other: one kind of channel, one kind of server, and errors that keep their type.

A service method raises a PenumbraError and nothing else; the caller gets the same class back from
`error_from_rpc`. Nothing here retries: only the router does, and it knows what was already emitted.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from wire.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PenumbraError,
    WorkerLost,
)
from wire.tracing import TRACEPARENT, Tracer

MAX_MESSAGE_BYTES = 64 << 20
"""A million prompt tokens are 4 MiB; an offer of 4,096 pages is 0.1 MiB. The rest is room."""

CODE_KEY = "penumbra-code"
PARAM_KEY = "penumbra-param"
DETAIL_KEY = "penumbra-detail-code"
# Trailing metadata shares HTTP/2's 8 KiB header limit with the percent-encoded message.
MAX_MESSAGE_CHARS = 1_000

_MESSAGE_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
# A peer that vanished without a FIN, or that is frozen, is noticed within 4 s, in both directions and without traffic:
# a ping after 2 s of silence, and 2 s to answer it. Whose kernel acknowledges the ping while nobody answers it, the
# second limit alone catches; its default is a minute. Neither needs the GIL, so a long step looks like nothing here.
_KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_CHANNEL_OPTIONS = [
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    ("grpc.enable_retries", 0),
    # A restarted worker is found again within about a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Otherwise two channels to one address would share one connection and its back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVER_OPTIONS = [
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    # Below the channels' ping interval; with the default of 5 minutes the server would hang up on them.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers silently sharing one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = structlog.get_logger()


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`, connected at its first call. The caller closes it."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


# Errors


def _classes(root: type[PenumbraError]) -> list[type[PenumbraError]]:
    return [root] + [cls for child in root.__subclasses__() for cls in _classes(child)]


_BY_CODE = {cls.code: cls for cls in _classes(PenumbraError)}

# What the transport itself reports, without a code of ours. gRPC gives INTERNAL when a stream is reset and
# UNAVAILABLE when the connection is; UNKNOWN is what a crashed handler of another implementation gives.
_BY_STATUS: dict[grpc.StatusCode, type[PenumbraError]] = {
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.INTERNAL: WorkerLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


def error_from_code(code: str, message: str, *, param: str | None = None, detail: str | None = None) -> PenumbraError:
    """The error a `Failed` event or a status names; a plain PenumbraError when the code is of a later version."""
    cls = _BY_CODE.get(code, PenumbraError)
    if issubclass(cls, InvalidRequest):
        return cls(message, param=param, code=detail)
    return cls(message)


def error_from_rpc(error: grpc.aio.AioRpcError) -> PenumbraError:
    """What a failed call means: the error its server raised, or what became of the connection."""
    message = error.details() or f"the call ended with {error.code().name}"
    trailing = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    sent = {key: value for key, value in trailing if isinstance(value, str)}
    if CODE_KEY in sent:
        return error_from_code(sent[CODE_KEY], message, param=sent.get(PARAM_KEY), detail=sent.get(DETAIL_KEY))
    return _BY_STATUS.get(error.code(), PenumbraError)(message)


async def abort(context: Context, error: PenumbraError) -> NoReturn:
    """End a call with `error`'s status, message and code."""
    trailing = [(CODE_KEY, error.code)]
    if isinstance(error, InvalidRequest):
        trailing.append((DETAIL_KEY, error.detail_code))
        if error.param is not None and error.param.isascii() and error.param.isprintable():
            trailing.append((PARAM_KEY, error.param))
    await context.abort(error.grpc_status, str(error)[:MAX_MESSAGE_CHARS], tuple(trailing))
    raise AssertionError("abort returned")  # it always raises; the type checker does not know


class _TypedErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Parses requests and ends calls, so that a bad request or a raised error leaves as its own status.

    gRPC itself would answer rubbish bytes with INTERNAL and any exception with UNKNOWN and its repr. It
    would also leave a cancelled stream's generator to the garbage collector; here it is closed at once.
    A call whose caller traces it is served inside a span.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler  # type: ignore[no-any-return]
        if handler.response_streaming and inspect.iscoroutinefunction(handler.unary_stream):
            # It writes to its context itself, as gRPC's own health service does, and ends itself too.
            return handler  # type: ignore[no-any-return]
        name = details.method
        caller = next((str(value) for key, value in details.invocation_metadata or () if key == TRACEPARENT), "")

        async def unary(data: bytes, context: Context) -> Any:
            try:
                with self._tracer.rpc(name, caller):
                    return await handler.unary_unary(_parsed(handler, data), context)
            except Exception as error:
                await _end(context, name, error)

        async def stream(data: bytes, context: Context) -> None:
            try:
                with self._tracer.rpc(name, caller):
                    async with contextlib.aclosing(handler.unary_stream(_parsed(handler, data), context)) as replies:
                        async for reply in replies:
                            await context.write(reply)
            except Exception as error:
                await _end(context, name, error)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                cast(Any, stream), response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(cast(Any, unary), response_serializer=handler.response_serializer)


def _parsed(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except Exception as error:
        raise InvalidRequest("The request is not a message of this method.") from error


async def _end(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, PenumbraError):
        log.error("rpc_crashed", method=method, exc_info=error)
        error = PenumbraError(f"{type(error).__name__} in {method}; the worker's log has the details.")
    await abort(context, error)


class Server:
    """One gRPC server: services added, started, shown as serving or not, drained once.

    Health (grpc.health.v1, service "") answers NOT_SERVING until `set_serving(True)` and while draining.
    """

    def __init__(self, address: str = "127.0.0.1:0", tracer: Tracer | None = None) -> None:
        """`address` is host:port; port 0 takes a free one."""
        self._address = address
        self._server = grpc.aio.server(interceptors=[_TypedErrors(tracer or Tracer())], options=_SERVER_OPTIONS)
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: object) -> None:
        """Serve `servicer`, for example `server.add(add_PagesServicer_to_server, pages)`. Before `start`."""
        register(servicer, self._server)

    async def start(self) -> int:
        """Listen and answer. Returns the port. Raises ConfigError when the address can not be bound."""
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise ConfigError(
                f"Cannot listen on {self._address}: the port is taken or the address is not this machine's. "
                f"Choose another, or port 0 for a free one."
            ) from error
        await self.set_serving(False)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING
        if not serving:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for `grace_s` seconds, then cancel them and stop."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
