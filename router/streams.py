"""Answers that outlive their clients: how their streams are named, and how any router takes one up again.

A request with `x-penumbra-resume: SECONDS` and an `Idempotency-Key` is kept by its decode worker for so long after its
client has left. Each event of its stream bears an id that says where the answer is and how far the client has heard it:
(request, worker, epoch, attempt, index), signed with a key that all routers share. `GET /v1/streams/{id}` goes on from
there. The worker keeps what the request was, so the router that answers need not be the one that asked.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.answers import Answer, Json, Usage, merged, usage_chunk
from router.client import ClientGone, put, until_gone
from router.dialects import OPENAI, Dialect
from router.fleet import Fleet
from router.intake import Prepared
from router.replicas import Replicas
from router.tenants import Tenant
from wire import convert
from wire.errors import ConfigError, IdempotencyMismatch, InvalidRequest, PenumbraError, StreamGone, WorkerLost
from wire.registry import honour_cancellation
from wire.rpc import error_from_code, error_from_rpc
from wire.types import Attached, AttachRequest, Failed, Finished, FinishReason, Tokens, WorkerInfo
from wire.v1 import worker_pb2_grpc

MAX_RESUME_S = 600
MAX_KEY_CHARS = 256
REMEMBER_S = 86_400
"""How long an Idempotency-Key stands for the request it came with."""

REMEMBER_ALONE = 4_096
"""Keys that a router remembers by itself while Redis is away."""

MAC_BYTES = 16
ATTACH_S = 5.0
"""For a worker to say that it keeps an answer."""
KEPT_SILENCE_S = (900.0, 60.0)
"""For the first piece of a kept answer, whose prompt may still be read, and between two pieces: the worker itself ends
what does not go on, so who hears nothing for longer has lost a message.
"""

_END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamId:
    """How far whose client has heard which answer, and where the rest of it is."""

    request_id: str
    worker_id: str
    epoch: int
    attempt: int
    index: int  # tokens heard


class Signer:
    """Makes stream ids that only routers with the same key take for theirs, each for one tenant."""

    def __init__(self, key_file: Path | None) -> None:
        """Without a file the ids are good for this router alone. Raises ConfigError for a file that can not be used."""
        self._key = secrets.token_bytes(32) if key_file is None else _read_key(key_file)

    def sign(self, stream: StreamId, tenant: str) -> str:
        fields = [stream.request_id, stream.worker_id, stream.epoch, stream.attempt, stream.index]
        text = _text(json.dumps(fields, separators=(",", ":")).encode())
        return f"{text}.{_text(self._mac(text, tenant))}"

    def read(self, signed: str, tenant: str) -> StreamId:
        """Raises StreamGone for an id that is not one of ours, or another tenant's: nobody learns which."""
        text, _, mac = signed.partition(".")
        if len(signed) > 1_024 or not signed.isascii() or not hmac.compare_digest(_text(self._mac(text, tenant)), mac):
            raise StreamGone("There is no such stream.")
        fields = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        request_id, worker_id, epoch, attempt, index = fields
        return StreamId(request_id=request_id, worker_id=worker_id, epoch=epoch, attempt=attempt, index=index)

    def _mac(self, text: str, tenant: str) -> bytes:
        return hmac.digest(self._key, f"{tenant}:{text}".encode(), "sha256")[:MAC_BYTES]


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The stream key file {path} can not be read: {error.strerror}.") from error
    if len(key) < 32:
        raise ConfigError(f"The stream key file {path} holds {len(key)} bytes. Write at least 32 random ones to it.")
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a request was, for a router that has never seen it."""

    path: str
    tenant: str
    request_id: str
    created: int
    raw: bytes

    def pack(self) -> bytes:
        head = {"path": self.path, "tenant": self.tenant, "request_id": self.request_id, "created": self.created}
        return json.dumps(head).encode() + b"\n" + self.raw

    @classmethod
    def unpack(cls, packed: bytes) -> Context:
        head, _, raw = packed.partition(b"\n")
        return cls(raw=raw, **json.loads(head))


def resume_s(asked: str | None, key: str | None) -> int:
    """Seconds that a request is to outlive its client. Raises InvalidRequest for what can not be."""
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} printable ASCII characters.")
    if asked is None:
        return 0
    if not asked.isascii() or not asked.isdecimal() or not 1 <= int(asked[:6]) <= MAX_RESUME_S:
        raise InvalidRequest(f"x-penumbra-resume is a number of seconds from 1 to {MAX_RESUME_S}.")
    if key is None:
        raise InvalidRequest("x-penumbra-resume needs an Idempotency-Key, by which the request is found again.")
    return int(asked)


class Idempotency:
    """What each Idempotency-Key stands for: the digest of one request, and where its answer is kept."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._own: dict[str, tuple[str, str]] = {}

    async def claim(self, tenant: Tenant, key: str, path: str, raw: bytes) -> str:
        """-> the id of the stream in which the key's request is answered already, or nothing.

        Raises IdempotencyMismatch for a key that came with another request. Without Redis, this router's own memory
        has to do.
        """
        name = self._name(tenant, key)
        digest = hashlib.sha256(path.encode() + b"\n" + raw).hexdigest()
        known = await self._swap(name, digest, "", only_new=True)
        if known is None:
            return ""
        if known[0] != digest:
            raise IdempotencyMismatch(
                "This Idempotency-Key came with another request before. Send the same request, or another key."
            )
        return known[1]

    async def answered_in(self, tenant: Tenant, key: str, path: str, raw: bytes, stream: str) -> None:
        digest = hashlib.sha256(path.encode() + b"\n" + raw).hexdigest()
        await self._swap(self._name(tenant, key), digest, stream, only_new=False)

    def _name(self, tenant: Tenant, key: str) -> str:
        digest = hashlib.sha256(f"{tenant.tenant_id}:{key}".encode()).hexdigest()
        return f"{self._replicas.prefix}:idempotency:{digest}"

    async def _swap(self, name: str, digest: str, stream: str, *, only_new: bool) -> tuple[str, str] | None:
        """Set what the name stands for, if nothing or not `only_new` -> what it stood for."""
        before = self._own.get(name)
        if before is None or not only_new:
            self._own[name] = (digest, stream)
            if len(self._own) > REMEMBER_ALONE:
                del self._own[next(iter(self._own))]
        try:
            async with asyncio.timeout(1.0), self._replicas.redis.pipeline(transaction=True) as pipe:
                pipe.get(name)
                pipe.set(name, f"{digest}:{stream}", ex=REMEMBER_S, nx=only_new)
                found, _ = await pipe.execute()
        except (RedisError, OSError, TimeoutError):
            honour_cancellation()
            return before
        honour_cancellation()
        if found is None:
            return None
        known_digest, _, known_stream = found.decode("ascii", "replace").partition(":")
        return known_digest, known_stream


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that a worker keeps: what was asked, and the tokens as they come."""

    context: Context
    events: AsyncIterator[Tokens | Finished | Failed]


@contextlib.asynccontextmanager
async def attach(
    fleet: Fleet, stream: StreamId, tenant: str, *, silence_s: tuple[float, float] = KEPT_SILENCE_S
) -> AsyncIterator[Kept]:
    """Read an answer where it is kept. Raises StreamGone when it is not any more.

    `silence_s`: how long the worker may say nothing, before the first piece and after it.
    """
    info = _worker_of(fleet, stream)
    stub: Any = worker_pb2_grpc.DecodeStub
    request = AttachRequest(request_id=stream.request_id, attempt=stream.attempt, epoch=stream.epoch)
    async with fleet.channel(info.ref) as channel:
        call = stub(channel).Attach(convert.attach_request_to_wire(request))
        try:
            async with asyncio.timeout(ATTACH_S):
                message = await call.read()
            first = None if message is _END else convert.start_event_from_wire(message)
            if not isinstance(first, Attached):
                raise WorkerLost("The decode worker did not say what it keeps.")
            context = Context.unpack(first.context)
            if context.tenant != tenant:
                raise StreamGone("There is no such stream.")
            yield Kept(context, _events(call, silence_s))
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from failure
        except TimeoutError as failure:
            raise WorkerLost(f"The decode worker did not answer within {ATTACH_S:g} s.") from failure
        finally:
            call.cancel()


def _worker_of(fleet: Fleet, stream: StreamId) -> WorkerInfo:
    for view in fleet.snapshot().decode:
        if (view.info.worker_id, view.info.epoch) == (stream.worker_id, stream.epoch):
            return view.info
    raise StreamGone("The worker that kept this stream is gone.")


async def _events(call: Any, silence_s: tuple[float, float]) -> AsyncIterator[Tokens | Finished | Failed]:
    (patience_s, later_s), due = silence_s, 0
    try:
        while True:
            async with asyncio.timeout(patience_s):
                message = await call.read()
            if message is _END:
                return
            event = convert.start_event_from_wire(message)
            if isinstance(event, Tokens):
                if [token.index for token in event.tokens] != list(range(due, due + len(event.tokens))):
                    raise WorkerLost(f"The decode worker left token {due} of a kept answer out.")
                due += len(event.tokens)
            elif isinstance(event, Finished) and event.completion_tokens != due:
                raise WorkerLost(f"The decode worker gave {due} of {event.completion_tokens} tokens of a kept answer.")
            if isinstance(event, Tokens | Finished | Failed):
                patience_s = later_s
                yield event
    except TimeoutError as failure:
        raise WorkerLost(f"The decode worker said nothing of a kept answer for {patience_s:g} s.") from failure
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from failure


class Resumed(Response):
    """The rest of a kept answer, behind the tokens that its client has heard."""

    def __init__(
        self,
        fleet: Fleet,
        stream: StreamId,
        tenant: str,
        prepare: Callable[[Context], Any],
        sign: Callable[[StreamId], str],
        *,
        keepalive_s: float,
        client_stall_s: float,
    ) -> None:
        self._fleet, self._stream, self._tenant = fleet, stream, tenant
        self._prepare, self._sign = prepare, sign
        self._keepalive_s, self._client_stall_s = keepalive_s, client_stall_s
        self._began = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._run(scope, receive, send))
            watch = tasks.create_task(until_gone(receive))
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["state"]["client_gone"] = True
            work.cancel()
            watch.cancel()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = OPENAI
        try:
            try:
                async with attach(self._fleet, self._stream, self._tenant) as kept:
                    dialect, prepared = await self._prepare(kept.context)
                    await self._tell(send, dialect, prepared, kept)
            except PenumbraError as error:
                scope["state"]["error_code"] = error.code
                if not self._began:
                    await dialect.refusal(error)(scope, receive, send)
                else:
                    await self._send(send, dialect.event(dialect.error_event(error, 0)), more=False)
        except ClientGone:
            # The worker keeps the answer for as long as was asked; its client may come again.
            scope["state"]["client_gone"] = True

    async def _tell(self, send: Send, dialect: Dialect, prepared: Prepared, kept: Kept) -> None:
        (request, answer), index, heard = prepared.choices[0], 0, self._stream.index
        usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=0, cached_tokens=0)
        opening = answer.opening(usage)
        await self._send(send, b"" if heard else self._pack(dialect, opening, 0))
        async for event in _with_signs(kept.events, self._keepalive_s):
            match event:
                case None:
                    await self._send(send, dialect.keepalive)
                case Tokens():
                    body = b""
                    for token in event.tokens:
                        if answer.stopped:
                            break
                        index += 1
                        chunks = answer.push((token,))
                        body += self._pack(dialect, chunks, index) if index > heard else b""
                    if body:
                        await self._send(send, body)
                    if answer.stopped:
                        whole = Finished(
                            reason=FinishReason.STOP,
                            prompt_tokens=len(request.prompt),
                            cached_tokens=0,
                            completion_tokens=index,
                        )
                        await self._finish(send, dialect, prepared, answer, whole, index)
                        return
                case Failed():
                    raise error_from_code(event.code, event.message)
                case Finished():
                    await self._finish(send, dialect, prepared, answer, event, index)
                    return
        raise WorkerLost("The decode worker ended a kept answer early.")

    async def _finish(
        self, send: Send, dialect: Dialect, prepared: Prepared, answer: Answer, finished: Finished, index: int
    ) -> None:
        usage = Usage(
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=answer.num_tokens,
            cached_tokens=finished.cached_tokens,
        )
        chunks = answer.close(finished.reason, usage)
        if prepared.include_usage:
            chunks = [*chunks, usage_chunk(merged([answer.response(usage)]))]
        await self._send(send, self._pack(dialect, chunks, index) + dialect.done, more=False)

    def _pack(self, dialect: Dialect, chunks: list[Json], index: int) -> bytes:
        return pack(dialect, chunks, self._sign(self._at(index)))

    def _at(self, index: int) -> StreamId:
        stream = self._stream
        return StreamId(
            request_id=stream.request_id,
            worker_id=stream.worker_id,
            epoch=stream.epoch,
            attempt=stream.attempt,
            index=index,
        )

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if not self._began:
            self._began = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await put(send, {"type": "http.response.start", "status": 200, "headers": headers}, self._client_stall_s)
        await put(send, {"type": "http.response.body", "body": body, "more_body": more}, self._client_stall_s)


def pack(dialect: Dialect, chunks: list[Json], stream: str) -> bytes:
    """One token's chunks as events. The last names the stream: a client has heard all of them, or asks for all."""
    *first, last = [dialect.event(chunk) for chunk in chunks] or [b""]
    return b"".join(first) + (b"id: " + stream.encode() + b"\n" + last if last else b"")


async def _with_signs(
    events: AsyncIterator[Tokens | Finished | Failed], interval_s: float
) -> AsyncIterator[Tokens | Finished | Failed | None]:
    """The events, and None whenever none has come for so long."""
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=interval_s or None)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a running answer does so that it can be taken up again."""

    keep_s: int
    sign: Callable[[StreamId], str]
    told: Callable[[StreamId], Awaitable[None]]  # with the stream as it is first known
