"""One client's connection: what HTTP itself has to say before there is a request, in our own words and with an end.

uvicorn parses and runs requests. Here is what it leaves open: how long and how large headers may be, that a refusal
has a body like every other, and what a client means that has said all it had to say.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.dialects import LINGER_SILENCE_S, Dialect, dialect_of
from wire.errors import InvalidRequest, PenumbraError

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 128

PROBE_S = 0.25
"""Between two signs of life sent to a client that has closed its side, until it shows whether it is still there."""


class HeadersTooLarge(PenumbraError):
    code = "headers_too_large"
    http_status = 431


class HeadersStalled(PenumbraError):
    code = "request_timeout"
    http_status = 408


class Connection(HttpToolsProtocol):
    """`header_s`: a request's headers are whole so soon after their first byte. `on_refusal` is told each status."""

    def __init__(self, *args: Any, header_s: float, on_refusal: Callable[[PenumbraError], None], **more: Any) -> None:
        super().__init__(*args, **more)
        self._header_s = header_s
        self._on_refusal = on_refusal
        self._in_headers = True
        self._header_bytes = 0
        self._num_heads = 0  # whole ones
        self._clock: asyncio.TimerHandle | None = None
        self._refused = False
        self._half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._watch_headers()
        within = self._num_heads if self._in_headers else None
        super().data_received(data)
        if self._in_headers and self._num_heads == within and not self._refused:
            self._header_bytes += len(data)
            self._check_headers()

    # Headers

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._in_headers = False
        self._num_heads += 1
        self._header_bytes = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        self._check_headers()
        self._header_bytes = 0
        if not self._refused and self.parser.get_http_version() not in ("1.0", "1.1"):
            self.send_400_response("")
        if not self._refused and self.parser.should_upgrade() and self._get_upgrade() == b"websocket":
            self._refuse(InvalidRequest("There are no WebSockets here. Send a request.", code="invalid_http"))
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = True
        if not self._refused:
            super().on_message_complete()

    def _check_headers(self) -> None:
        num_headers = len(self.headers or ())
        if not self._refused and (self._header_bytes > MAX_HEADER_BYTES or num_headers > MAX_HEADERS):
            self._refuse(
                HeadersTooLarge(
                    f"The request line and headers may have {MAX_HEADER_BYTES} bytes and {MAX_HEADERS} headers. "
                    "Send fewer or shorter ones."
                )
            )

    def _watch_headers(self) -> None:
        if self._in_headers and self._clock is None:
            self._clock = self.loop.call_later(self._header_s, self._headers_late)

    def _headers_late(self) -> None:
        self._clock = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._watch_headers()  # of the next request, while this one is being answered
        else:
            self._refuse(HeadersStalled(f"No whole request arrived within {self._header_s:g} s."))

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    # Refusals

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("This is not HTTP/1.1, or not whole.", code="invalid_http"))

    def _refuse(self, error: PenumbraError) -> None:
        """Answer for a request that never got to a route, and close once the client can have read it."""
        self._refused = True
        self._stop_clock()
        self._on_refusal(error)
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # in the middle of another answer there is no place for this one
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        dialect = dialect_of((getattr(self, "url", None) or b"").decode("latin-1"))
        self.transport.write(_raw(dialect, error))
        # Closing at once would reset a connection on which something still arrives, and take the answer with it.
        if self.transport.can_write_eof():  # TLS has no such half
            self.transport.write_eof()
        self.loop.call_later(LINGER_SILENCE_S, self.transport.close)

    def shutdown(self) -> None:
        super().shutdown()
        if self._refused:
            self.transport.close()

    # A client that has closed its side

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to go on. A client that closed its side either waits for the answer or is gone, and only what is
        sent to it tells which: nobody at its end resets the connection. Over TLS the end of one side is that of both.
        """
        if self.transport.get_extra_info("ssl_object") is not None:
            return False
        busy = self.cycle is not None and not self.cycle.response_complete and self.scope["http_version"] == "1.1"
        if self._refused or not busy or self.cycle.more_body:
            return False
        self._half_closed = True
        self._probe()
        return True

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        elif self.cycle.chunked_encoding:
            # An answer in chunks is a stream of events, or JSON behind blank lines; one more is nothing in either.
            self.transport.write(b"1\r\n\n\r\n")
        self.loop.call_later(PROBE_S, self._probe)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and not self.pipeline:
            self.transport.close()


def _raw(dialect: Dialect, error: PenumbraError) -> bytes:
    response = dialect.refusal(error)
    request_id = uuid.uuid4().hex.encode()
    headers = [
        *((name, value) for name, value in response.raw_headers if name != b"connection"),
        *((name, request_id) for name in dialect.request_id_headers),
        (b"connection", b"close"),
    ]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return b"HTTP/1.1 %d \r\n" % response.status_code + lines + b"\r\n" + bytes(response.body)
