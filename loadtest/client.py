"""One request as a user's program sends it: a connection, a POST, and server-sent events read as they come.

The kernel stamps what it receives (SO_TIMESTAMPNS), so how long an event lay before this process had handled it is
measured for each, and not guessed. Over TLS there are no stamps, and none are reported.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.socket
import gevent.ssl
import orjson
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse

from loadtest.record import SILENCE, Outcome

_SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("qq")
_STAMP_SPACE = socket.CMSG_SPACE(_STAMP.size)
_BLOCK = 65_536
ASKED_CHARS = 20_000
_SLOW_BUFFER = 4096
CONNECT_S = 10.0
MESSAGE_CHARS = 300


@dataclass(slots=True)
class Costs:
    """Microseconds from the kernel's receipt of each event to when it had been handled."""

    overhead_us: array[float] = field(default_factory=lambda: array("d"))
    events: int = 0


class _Stream:
    """A connected socket that remembers when the kernel received what was read last; `pace` bytes a second at most."""

    def __init__(self, url: str, silence_s: float, pace: float | None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        assert parts.hostname, "checked by Server"
        raw = _connect(parts.hostname, parts.port or (443 if secure else 80), small=pace is not None)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                raw = gevent.ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
            else:
                raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            raw.settimeout(silence_s)
        except BaseException:
            raw.close()
            raise
        self._raw, self._stamped, self._pace = raw, not secure, pace
        self.received_ns: int | None = None  # since the epoch

    def send(self, data: bytes) -> None:
        self._raw.sendall(data)

    def recv(self, size: int) -> bytes:
        if self._pace is not None:
            size = min(size, max(1, int(self._pace / 4)))
            gevent.sleep(size / self._pace)
        if not self._stamped:
            return self._some(self._raw.recv(size))
        data, control, _, _ = self._raw.recvmsg(size, _STAMP_SPACE)
        self.received_ns = None
        for level, kind, stamp in control:
            if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                seconds, nanoseconds = _STAMP.unpack_from(stamp)
                self.received_ns = seconds * 1_000_000_000 + nanoseconds
        return self._some(data)

    @staticmethod
    def _some(data: bytes) -> bytes:
        if not data:  # the parser above would ask again and again
            raise ConnectionResetError("the connection ended before the answer did")
        return data

    def hang_up(self) -> None:
        """From any greenlet: who reads is told at once."""
        with contextlib.suppress(OSError):  # it may have ended by itself
            self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._raw.close()


def _connect(host: str, port: int, *, small: bool) -> Any:
    if not small:
        return gevent.socket.create_connection((host, port), CONNECT_S)
    # A receive buffer counts only when it is set before the handshake, which tells the server of it.
    family, kind, protocol, _, address = gevent.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    raw = gevent.socket.socket(family, kind, protocol)
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        raw.settimeout(CONNECT_S)
        raw.connect(address)
    except BaseException:
        raw.close()
        raise
    return raw


class Unanswered(Exception):
    """A question to the server outside the test itself that got no good answer."""


class Server:
    """Where requests go. `keys` are tenants' API keys, that of no tenant under the empty name."""

    def __init__(self, url: str, keys: Mapping[str, str], model: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unanswered(f"'{url}' is no URL of a server; give one like http://127.0.0.1:8000.")
        self.url = url.rstrip("/")
        if self.url.endswith("/v1"):
            self.url = self.url[:-3]
        self.model = model
        self.is_penumbra = False
        self.max_tokens: int | None = None  # of prompt and answer
        self.costs = Costs()
        self.clock: Callable[[], float] = time.monotonic  # seconds from the run's start, once there is one
        self._keys = keys

    # What is asked beside the test.

    def meet(self) -> None:
        """Learn the model's name and what kind of server this is. Raises Unanswered."""
        models = self.get("/v1/models").get("data") or []
        known = {str(one.get("id")): one for one in models}
        if not known or (self.model and self.model not in known):
            raise Unanswered(
                f"{self.url} serves {', '.join(known) or 'no model'}, not '{self.model}'; name what it serves."
            )
        self.model = self.model or next(iter(known))
        one = known[self.model]
        self.is_penumbra = one.get("owned_by") == "penumbra"
        longest = one.get("max_model_len")
        self.max_tokens = longest if isinstance(longest, int) else None

    def chars_per_token(self, sample: str) -> float:
        """By the server's own tokenizer, or where it shows none, by what it counts of a short request."""
        try:
            count = int(self.get("/tokenize", {"model": self.model, "prompt": sample})["count"])
        except (Unanswered, KeyError, TypeError, ValueError):
            sample = sample[:ASKED_CHARS]  # this one is computed
            body = {"model": self.model, "messages": [{"role": "user", "content": sample}], "max_tokens": 1}
            usage = self.get("/v1/chat/completions", body).get("usage") or {}
            count = int(usage.get("prompt_tokens") or 0)
        if count < 1:
            raise Unanswered(f"{self.url} does not tell how many tokens a prompt has, so none can be made of a length.")
        return len(sample) / count

    def get(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 60.0) -> dict[str, Any]:
        """The JSON a path answers with; POST when there is a body. Raises Unanswered."""
        text = self.text(self.url + path, None if body is None else orjson.dumps(body), timeout_s)
        try:
            found = orjson.loads(text)
        except ValueError as error:
            raise Unanswered(f"{self.url}{path} did not answer with JSON.") from error
        return found if isinstance(found, dict) else {}

    def text(self, url: str, body: bytes | None = None, timeout_s: float = 60.0) -> bytes:
        try:
            with gevent.Timeout(timeout_s, TimeoutError(f"no answer in {timeout_s:g} s")):
                stream = _Stream(url, timeout_s, None)
                try:
                    stream.send(self._head("GET" if body is None else "POST", url, "", body) + (body or b""))
                    reply = HTTPSocketResponse(stream, block_size=_BLOCK)
                    found, status = bytes(reply.read()), reply.get_code()
                finally:
                    stream.close()
        except (OSError, HTTPParseError) as error:
            raise Unanswered(f"{url} does not answer: {error or type(error).__name__}.") from error
        if status != 200:
            raise Unanswered(f"{url} answered {status}: {_told(found)[1]}")
        return found

    def _head(self, method: str, url: str, tenant: str, body: bytes | None) -> bytes:
        key = self._keys.get(tenant, self._keys.get("", ""))
        path = url.split("/", 3)[3] if url.count("/") > 2 else ""
        lines = [
            f"{method} /{path} HTTP/1.1",
            f"host: {urlsplit(url).netloc}",
            "user-agent: penumbra-loadtest",
            "connection: close",
            *([f"authorization: Bearer {key}"] if key else []),
            *(["content-type: application/json", f"content-length: {len(body)}"] if body is not None else []),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    # The test itself.

    def ask(
        self,
        outcome: Outcome,
        path: str,
        body: bytes,
        *,
        silence_s: float,
        slow_bytes_per_s: float | None = None,
        hang_up_after_s: float | None = None,
        hang_up_after_pieces: int | None = None,
    ) -> str:
        """Send one request and read its answer to the end, whatever that is. -> the answer's text.

        Everything else goes into `outcome`; nothing is raised but for bugs of ours.
        """
        outcome.sent_s = self.clock()
        outcome.slow = slow_bytes_per_s is not None
        said = _Said()
        stream = timer = None
        try:
            stream = _Stream(self.url, silence_s, slow_bytes_per_s)
            if hang_up_after_s is not None:
                timer = gevent.spawn_later(hang_up_after_s, self._hang_up, outcome, stream)
            stream.send(self._head("POST", self.url + path, outcome.tenant, body) + body)
            reply = HTTPSocketResponse(stream, block_size=_BLOCK, method="POST")
            outcome.status = reply.get_code()
            if outcome.status != 200:
                code, outcome.message = _told(bytes(reply.read()))
                outcome.error = f"{outcome.status} {code}".strip()
            else:
                for data in _events(reply):
                    self._handle(data, outcome, said, stream)
                    if said.over or (hang_up_after_pieces is not None and said.pieces >= hang_up_after_pieces):
                        break
                if not said.over and hang_up_after_pieces is not None and said.pieces >= hang_up_after_pieces:
                    outcome.hung_up = True
        except TimeoutError as error:
            outcome.error = SILENCE if stream is not None else "connect"
            outcome.message = f"{error}"
        except (OSError, HTTPParseError) as error:
            outcome.error = "broken" if stream is not None else "connect"
            outcome.message = f"{type(error).__name__}: {error}"[:MESSAGE_CHARS]
        finally:
            if timer is not None:
                timer.kill(block=False)
            if stream is not None:
                stream.close()
            outcome.ended_s = self.clock()
        if outcome.hung_up:
            outcome.error = outcome.message = ""
        elif not outcome.error and not said.over:
            outcome.error = "no [DONE]"
        elif not outcome.error and outcome.first_s is None:
            outcome.error = "empty answer"
        outcome.answer = said.digest()
        outcome.answer_tokens = outcome.answer_tokens or len(said.ids)
        return "".join(said.text)

    @staticmethod
    def _hang_up(outcome: Outcome, stream: _Stream) -> None:
        outcome.hung_up = True
        stream.hang_up()

    def _handle(self, data: bytes, outcome: Outcome, said: _Said, stream: _Stream) -> None:
        if data == b"[DONE]":
            said.over = True
            return
        try:
            event = orjson.loads(data)
        except ValueError:
            raise HTTPParseError(f"an event that is no JSON: {data[:80]!r}") from None
        if fault := event.get("error"):
            code = (fault.get("code") or fault.get("type") or "") if isinstance(fault, dict) else ""
            outcome.error = f"stream {code}".strip()
            outcome.message = str(fault.get("message") if isinstance(fault, dict) else fault)[:MESSAGE_CHARS]
            return
        if said.take(event):
            now = self.clock()
            if outcome.last_s is None:
                outcome.first_s = now
            else:
                outcome.gaps_ms.append(round((now - outcome.last_s) * 1e3, 3))
            outcome.last_s = now
        if usage := event.get("usage"):
            _count(usage, outcome)
        self.costs.events += 1
        if stream.received_ns is not None and not outcome.slow:
            self.costs.overhead_us.append((time.time_ns() - stream.received_ns) / 1e3)


@dataclass(slots=True)
class _Said:
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    pieces: int = 0
    over: bool = False

    def take(self, event: dict[str, Any]) -> bool:
        """Whether the event brought a piece of the answer: text, or tokens whose text is still to come."""
        brought = False
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            for part in (
                delta.get("reasoning_content") or delta.get("reasoning"),
                delta.get("content"),
                delta.get("text"),
            ):
                if isinstance(part, str) and part:
                    self.text.append(part)
                    brought = True
            if ids := choice.get("token_ids"):
                self.ids += ids
                brought = True
        self.pieces += brought
        return brought

    def digest(self) -> str:
        told = orjson.dumps(self.ids) if self.ids else "".join(self.text).encode()
        return hashlib.sha256(told).hexdigest()[:16]


def _events(reply: HTTPSocketResponse) -> Iterator[bytes]:
    """The data of each event, as soon as its line is there."""
    while line := reply.readline(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _count(usage: dict[str, Any], outcome: Outcome) -> None:
    outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    outcome.answer_tokens = int(usage.get("completion_tokens") or 0)
    details = usage.get("prompt_tokens_details") or {}
    outcome.cached_tokens = int(details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0)
    timeline = usage.get("timeline") or {}
    within = {f"prefill {name}": value for name, value in (timeline.get("prefill_worker") or {}).items()}
    outcome.timeline = {
        name.removesuffix("_ms"): float(value)
        for name, value in {**timeline, **within}.items()
        if isinstance(value, int | float)
    }


def _told(body: bytes) -> tuple[str, str]:
    """(code, message) of an error's body."""
    try:
        fault = orjson.loads(body)
        fault = fault.get("error", fault)
        return str(fault.get("code") or fault.get("type") or ""), str(fault.get("message") or "")[:MESSAGE_CHARS]
    except (ValueError, AttributeError):
        return "", body[:MESSAGE_CHARS].decode(errors="replace")
