"""Engines that compute nothing: they answer a fixed time after the whole prompt has come, by gRPC or by HTTP.

Run as a process of its own: `python -m bench.fixed_delay grpc REDIS_URL` plays one prefill and one decode worker,
`python -m bench.fixed_delay http` an OpenAI-style server. Either prints its address once it answers. How long it takes
a request says itself, by its seed; see `Pace`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
import uvloop

from wire.registry import Registry
from wire.rpc import Server
from wire.types import Role, WorkerInfo
from wire.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

TOKEN_ID = 3 + ord("a")
TOKEN_TEXT = "a"
OPTION = re.compile(rb'"(max_tokens|seed|stream)": ?(\w+)')
ROOM_TOKENS = 1 << 40
"""No request waits for room: the router in front is measured, not its queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When the tokens of an answer are ready: `burst` of them after `delay_ms`, as many again each `gap_ms`."""

    delay_ms: int
    burst: int = 1
    gap_ms: int = 0

    @property
    def seed(self) -> int:
        return (self.delay_ms * 1_000 + self.burst) * 1_000 + self.gap_ms

    @classmethod
    def of(cls, seed: int) -> Pace:
        rest, gap_ms = divmod(seed, 1_000)
        delay_ms, burst = divmod(rest, 1_000)
        return cls(delay_ms=delay_ms, burst=burst, gap_ms=gap_ms)

    async def ready(self, count: int) -> AsyncIterator[range]:
        """Indices of the tokens that are ready together. Who is late finds several bursts, as on a real worker."""
        loop = asyncio.get_running_loop()
        began, sent = loop.time() + self.delay_ms / 1e3, 0
        while sent < count:
            due = began + sent // self.burst * self.gap_ms / 1e3
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            bursts = 1 + int((loop.time() - began) * 1e3 / self.gap_ms) if self.gap_ms else 1 + sent // self.burst
            upto = min(count, max(sent + 1, bursts * self.burst))
            yield range(sent, upto)
            sent = upto


# gRPC


class _Decode(worker_pb2_grpc.DecodeServicer):
    """Admits at once, and answers once the prefill worker beside it has had the prompt for long enough."""

    def __init__(self) -> None:
        self.prefilled: dict[str, asyncio.Event] = {}
        self._admitted = worker_pb2.StartEvent(admitted=worker_pb2.Admitted(secret=bytes(16)))

    async def Start(self, request: Any, context: Any) -> AsyncIterator[Any]:
        count, done = request.sampling.max_tokens, asyncio.Event()
        self.prefilled[request.request_id] = done
        try:
            yield self._admitted
            await done.wait()
            async for indices in Pace.of(request.sampling.seed).ready(count):
                tokens = [kv_pb2.Token(index=index, id=TOKEN_ID) for index in indices]
                yield worker_pb2.StartEvent(tokens=worker_pb2.Tokens(attempt=request.attempt, tokens=tokens))
            finished = worker_pb2.Finished(
                reason="length", prompt_tokens=len(request.prompt) // 4, completion_tokens=count
            )
            yield worker_pb2.StartEvent(finished=finished)
        finally:
            del self.prefilled[request.request_id]


class _Prefill(worker_pb2_grpc.PrefillServicer):
    def __init__(self, decode: _Decode) -> None:
        self._decode = decode

    async def Run(self, request: Any, context: Any) -> AsyncIterator[Any]:
        total = len(request.prompt) // 4
        self._decode.prefilled[request.request_id].set()
        yield worker_pb2.RunEvent(progress=worker_pb2.Progress(done=total, total=total))
        yield worker_pb2.RunEvent(finished=worker_pb2.RunFinished(prompt_tokens=total))


def _same(info: WorkerInfo) -> WorkerInfo:
    return info


async def serve_grpc(redis_url: str) -> None:
    """Until cancelled."""
    decode = _Decode()
    server = Server()
    server.add(worker_pb2_grpc.add_DecodeServicer_to_server, decode)
    server.add(worker_pb2_grpc.add_PrefillServicer_to_server, _Prefill(decode))
    address = f"127.0.0.1:{await server.start()}"
    await server.set_serving(True)
    async with Registry(redis_url) as registry, asyncio.TaskGroup() as tasks:
        for role in Role:
            info = WorkerInfo(
                worker_id=f"{role}-fixed",
                role=role,
                address=address,
                epoch=1,
                model="fixed",
                signature="fixed",
                free_tokens=ROOM_TOKENS,
                total_tokens=ROOM_TOKENS,
            )
            tasks.create_task(registry.run_heartbeat(partial(_same, info)))
        print(address, flush=True)


# HTTP


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application without a framework: what is measured stands in front of it."""
    if scope["type"] != "http":
        return
    pieces: list[bytes] = []
    more = True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["method"] != "POST":
        await _whole(send, {"status": "ok", "object": "list", "data": [{"id": "fixed", "object": "model"}]})
        return
    raw = b"".join(pieces)
    # Looked for at both ends only: between them are megabytes of prompt, which an engine would read off this loop.
    options = dict(OPTION.findall(raw[:1_000] + raw[-1_000:]))
    count = int(options[b"max_tokens"])
    pace = Pace.of(int(options[b"seed"]))
    if options.get(b"stream") != b"true":
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        async for _ in pace.ready(count):
            pass
        await _whole(send, _chunk(TOKEN_TEXT * count, "length") | {"usage": usage})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    async for indices in pace.ready(count):
        # One event for each token, as the engines behind these routers write them; ready ones in one write.
        event = b"data: " + json.dumps(_chunk(TOKEN_TEXT, None)).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": event * len(indices), "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _chunk(text: str, reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "fixed", "choices": [choice]}


async def _whole(send: Any, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


class _Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        print(f"127.0.0.1:{port}", flush=True)


async def serve_http() -> None:
    config = uvicorn.Config(_answer, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off")
    await _Server(config).serve()


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    uvloop.run(serve_grpc(*arguments) if kind == "grpc" else serve_http())
