"""How families of clients are spoken to: the shape of a refusal, and what a stream holds besides an answer's chunks."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.answers import Json
from wire.errors import BodyTooLarge, InvalidRequest, Overloaded, PenumbraError

LINGER_S = 10.0
LINGER_SILENCE_S = 1.0
"""How long a refused body may go on arriving before the connection closes, in all and between two pieces."""


class UnsupportedMedia(PenumbraError):
    code = "unsupported_media_type"
    http_status = 415


class BodyStalled(PenumbraError):
    code = "request_timeout"
    http_status = 408


class NotFound(PenumbraError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(PenumbraError):
    code = "method_not_allowed"
    http_status = 405


UNREAD = (BodyTooLarge, BodyStalled, UnsupportedMedia)
"""Refusals sent before the body was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What one family of clients expects of errors and streams."""

    status: Callable[[PenumbraError], int]
    error_body: Callable[[PenumbraError], Json]
    error_event: Callable[[PenumbraError, int], Json]  # in a stream, after so many events
    named: bool  # whether each event of a stream bears its chunk's type as its name
    keepalive: bytes = b": keep-alive\n\n"  # what a stream says when there is nothing to say; a comment
    done: bytes = b""  # behind the last event of a whole stream
    request_id_headers: tuple[bytes, ...] = (b"x-request-id",)

    def event(self, chunk: Json) -> bytes:
        name = b"event: " + str(chunk["type"]).encode() + b"\n" if self.named else b""
        return name + b"data: " + dump(chunk) + b"\n\n"

    def refusal(self, error: PenumbraError, headers: Mapping[str, str] | None = None) -> Response:
        """The whole answer to a request that failed before its stream began."""
        status = self.status(error)
        more = _when_to_retry(status, error.retry_after_s)
        kind = _UnreadRefusal if isinstance(error, UNREAD) else Response
        return kind(
            dump(self.error_body(error)),
            status_code=status,
            headers={**more, **(headers or {})},
            media_type="application/json",
        )


def _when_to_retry(status: int, after_s: float | None) -> dict[str, str]:
    """What tells a client when to come again, or that it need not."""
    if after_s == 0:
        return {"x-should-retry": "false"}  # OpenAI's and Anthropic's clients would retry a 429 by themselves
    if after_s is None and status in (503, 529):
        after_s = 1.0
    if after_s is None:
        return {}
    return {"retry-after": str(math.ceil(after_s)), "retry-after-ms": str(math.ceil(after_s * 1e3))}


def detail_code(error: PenumbraError) -> str:
    return error.detail_code if isinstance(error, InvalidRequest) else error.code


def _openai_error(error: PenumbraError) -> Json:
    param = error.param if isinstance(error, InvalidRequest) else None
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": detail_code(error)}}


ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _anthropic_status(error: PenumbraError) -> int:
    return 529 if isinstance(error, Overloaded) else error.http_status


def _anthropic_error(error: PenumbraError) -> Json:
    kind = ANTHROPIC_TYPES.get(_anthropic_status(error), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _responses_error_event(error: PenumbraError, sequence: int) -> Json:
    # The flat form is what the protocol documents; the nested one is what makes OpenAI's own clients raise.
    body = _openai_error(error)
    return {**body["error"], **body, "type": "error", "sequence_number": sequence}


OPENAI = Dialect(
    status=lambda error: error.http_status,
    error_body=_openai_error,
    error_event=lambda error, _: _openai_error(error),
    named=False,
    done=b"data: [DONE]\n\n",
)

RESPONSES = Dialect(
    status=OPENAI.status,
    error_body=_openai_error,
    error_event=_responses_error_event,
    named=True,
)

ANTHROPIC = Dialect(
    status=_anthropic_status,
    error_body=_anthropic_error,
    error_event=lambda error, _: _anthropic_error(error),
    named=True,
    request_id_headers=(b"x-request-id", b"request-id"),
    keepalive=b'event: ping\ndata: {"type":"ping"}\n\n',
)


def dialect_of(path: str) -> Dialect:
    """In which an answer at this path is given, whether there is anything at it or not."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    return RESPONSES if path == "/v1/responses" else OPENAI


class _UnreadRefusal(Response):
    """A refusal sent before the body was read. Closing at once would reset a connection the client still writes
    to, and take our answer with it; so what arrives in the next moments is thrown away first."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers({**(headers or {}), "connection": "close"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while True:
                    async with asyncio.timeout(LINGER_SILENCE_S):
                        if not (await receive()).get("more_body", False):
                            break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_response(data: Json, *, status: int = 200) -> Response:
    return Response(dump(data), status_code=status, media_type="application/json")


def dump(data: Json) -> bytes:
    return orjson.dumps(data)
