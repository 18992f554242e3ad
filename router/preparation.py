"""Where bodies become requests: off the event loop, which answers everybody else meanwhile.

A short body takes a thread. Reading a long one holds the interpreter for tens of milliseconds at a time, which every
stream would notice, so it is read in another process, at a lower priority: `python -m router.preparation`, started with
the first and again whenever one ended. There its prompt is checked, tokenized and hashed. Back come the packed ids and
the rest of the body, with a word in the prompt's place, from which a thread here prepares the request as any other.

Between the two go parts: how many, how long each, and their bytes. The first is a JSON object, the others are what is
too much for JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from router.answers import Json
from router.config import ModelFacts, RouterConfig
from router.dialects import dump
from router.fleet import Fleet
from router.grammar import python
from router.intake import Intake, Known, Prepared
from router.placement import capacity
from router.protocols import chat, completions, messages, responses, tokenize
from router.protocols.completions import Completion
from router.protocols.parsed import Parsed
from router.tenants import Tenant
from router.text import Text
from wire.errors import Draining, InvalidRequest, Overloaded, PenumbraError
from wire.rpc import error_from_code

MIDDLE_BODY_BYTES = 64 << 10
"""Bodies above this have threads of their own, so that short requests never queue behind them."""

LANE_THREADS = 2

CORES_A_PROCESS = 4
MOST_PROCESSES = 4
"""One process for so many cores, and never more: those that route and stream go first."""

NICE = 10
MEMORY_BYTES = 4 << 30
LIMIT_S = 120.0
"""What a process for long bodies may use, and how long one body may take it."""

MOST_WAITING_BYTES = 1 << 30
"""Of long bodies that wait for a process or are in one; a router that holds more than this refuses the next."""

MOST_REST_BYTES = 1 << 20
"""Of a long body without its prompt: its tools, its schemas."""

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

WORD = "json"  # a response format may demand it of a prompt
STAND_INS: Json = {"messages": [{"role": "user", "content": WORD}]} | dict.fromkeys(
    ("prompt", "input", "instructions", "system"), WORD
)
"""Fields that hold a prompt, and what is put in their place when it has been read."""

T = TypeVar("T")


class Preparation:
    """Everything that preparing requests takes. `close` ends its threads and processes."""

    def __init__(self, config: RouterConfig, facts: ModelFacts, text: Text, fleet: Fleet) -> None:
        self._facts, self._text, self._fleet = facts, text, fleet
        self._model_names = config.model_names
        self._max_context = config.max_context
        num_processes = min(MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // CORES_A_PROCESS))
        self._lanes = [
            ThreadPoolExecutor(num, thread_name_prefix=f"prepare-{i}")
            for i, num in enumerate((LANE_THREADS, LANE_THREADS, num_processes))
        ]
        self._edges = (min(MIDDLE_BODY_BYTES, config.long_body_bytes), config.long_body_bytes)
        self._processes = Processes(config.model, config.model_names, thinking=config.default_thinking)
        self._waiting_bytes = 0

    def close(self) -> None:
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)
        self._processes.close()
        self._text.close()

    def intake(self, tenant: Tenant, *, request_id: str = "", created: int = 0) -> Intake:
        """For a request of this tenant: it knows no other models, and shares no prefix with others.

        With `request_id` and `created` it prepares a request that has been before, by the names it had then.
        """
        return Intake(
            facts=self._facts,
            text=self._text,
            model_names=tuple(name for name in self._model_names if tenant.may_use(name)),
            models=self._fleet.models(),
            tenant_id=tenant.tenant_id,
            request_id=request_id,
            created=created or int(time.time()),
        )

    def context(self) -> int:
        """Tokens, prompt and answer together, that a request may have: the model's limit, or the fleet's room."""
        limit = self._max_context or self._facts.max_context
        room = capacity(self._fleet.snapshot())
        return limit if room is None else min(limit, room)

    async def prepare(self, path: str, intake: Intake, raw: bytes) -> Prepared:
        """The request that a body at this path asks for. Raises InvalidRequest and the like for one that makes none,
        and Overloaded when it is long and there is no room for it, or its process ended.
        """
        return await self._run(path, intake, raw, GENERATING[path], self._prepare_long)

    async def convert(self, path: str, intake: Intake, raw: bytes) -> bytes:
        """The answer to a body at this path, as JSON. Raises as `prepare` does."""

        def here(intake: Intake, raw: bytes, context: int) -> bytes:
            return dump(CONVERTING[path](intake, raw, context))

        return await self._run(path, intake, raw, here, self._convert_long)

    async def _run(
        self,
        path: str,
        intake: Intake,
        raw: bytes,
        here: Callable[[Intake, bytes, int], T],
        elsewhere: Callable[[str, Intake, bytes, int], T],
    ) -> T:
        lane = bisect_right(self._edges, len(raw) - 1)
        pool, loop, context = self._lanes[lane], asyncio.get_running_loop(), self.context()
        if lane < len(self._lanes) - 1:
            return await loop.run_in_executor(pool, here, intake, raw, context)
        if self._waiting_bytes + len(raw) > MOST_WAITING_BYTES:
            raise Overloaded("Too many long requests are waiting to be read. Retry in a moment.")
        self._waiting_bytes += len(raw)
        try:
            return await loop.run_in_executor(pool, elsewhere, path, intake, raw, context)
        finally:
            self._waiting_bytes -= len(raw)

    # On a thread of the last lane

    def _prepare_long(self, path: str, intake: Intake, raw: bytes, context: int) -> Prepared:
        head, (rest, packed, said, instructions) = self._processes.ask(_head(path, intake, context), raw)
        known = Known(
            packed=packed,
            alike=bytes.fromhex(head["alike"]),
            digests={
                model: [digests[at : at + head["digest_bytes"]] for at in range(0, len(digests), head["digest_bytes"])]
                for model, text in head["digests"].items()
                for digests in (bytes.fromhex(text),)
            },
            stage=head["stage"],
            said=said.decode(),
            instructions=instructions.decode(),
        )
        return GENERATING[path](replace(intake, known=known), rest, context)

    def _convert_long(self, path: str, intake: Intake, raw: bytes, context: int) -> bytes:
        _, (body,) = self._processes.ask(_head(path, intake, context), raw)
        return body


def _head(path: str, intake: Intake, context: int) -> Json:
    return {
        "path": path,
        "context": context,
        "tenant_id": intake.tenant_id,
        "model_names": intake.model_names,
        "models": sorted(intake.models),
    }


class Processes:
    """The processes for long bodies. One that is asked has one body at a time; as many run as threads ask at once."""

    def __init__(self, model: Path, model_names: Sequence[str], *, thinking: bool, limit_s: float = LIMIT_S) -> None:
        about = {"model": str(model), "model_names": [*model_names], "thinking": thinking}
        self._command = [*python(), "-m", "router.preparation", json.dumps(about)]
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def close(self) -> None:
        """End them all, and let whoever waits for one know."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._all.difference(idle)
        for process in busy:
            process.kill()  # the thread that waits for its answer does the rest
        for process in idle:
            self._end(process)

    def ask(self, head: Json, raw: bytes) -> tuple[Json, list[bytes]]:
        """What a process made of the body: the head of its answer, and the other parts as bytes.

        Raises what was raised there, and Overloaded when the process ended or took too long.
        """
        process = self._take()
        clock = threading.Timer(self._limit_s, process.kill)
        clock.start()
        answer: list[bytes] | None = None
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(OSError):  # it ended: its answer will be none
                _write(process.stdin, [json.dumps(head).encode(), raw])
                answer = _read(process.stdout)
        finally:
            clock.cancel()
            if answer is None:
                self._end(process)
        if answer is None:
            raise Overloaded("The process that reads long requests ended with this one. Retry in a moment.")
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(process)
        if closed:
            self._end(process)
        told, *parts = answer
        said = json.loads(told)
        if "error" in said:
            raise error_from_code(said["error"], said["message"], param=said["param"], detail=said["detail"])
        return said, parts

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise Draining("The router is going away. Send the request again.")
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                self._forget(process)
            # In a session of its own: Ctrl-C is for the router, which ends it. It ends by itself without the router.
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            self._all.add(process)
            return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        with self._lock:
            self._forget(process)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._all.discard(process)


# Parts


def _write(to: Any, parts: Sequence[bytes]) -> None:
    head = struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts))
    for part in (head, *parts):
        left = memoryview(part)
        while left:
            left = left[to.write(left) :]


def _read(source: Any) -> list[bytes] | None:
    """None at the end, in the middle of something or not."""
    count = _exactly(source, 4)
    lengths = count and _exactly(source, 8 * struct.unpack("<I", count)[0])
    if not lengths:
        return None
    parts = []
    for (length,) in struct.iter_unpack("<Q", lengths):
        part = _exactly(source, length)
        if part is None:
            return None
        parts.append(part)
    return parts


def _exactly(source: Any, length: int) -> bytes | None:
    buffer, at = bytearray(length), 0
    with memoryview(buffer) as view:
        while at < length:
            num = source.readinto(view[at:])
            if not num:
                return None
            at += num
    return bytes(buffer)


# The other process


def main(about: Json) -> None:
    """Answer bodies until there are no more. What this process prints goes where its errors go."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    model = Path(about["model"])
    facts = ModelFacts.load(model)
    text = Text(model, facts, about["model_names"], thinking=about["thinking"], check_grammars=False)
    source = os.fdopen(0, "rb", buffering=0)
    while (parts := _read(source)) is not None:
        head, raw = json.loads(parts[0]), parts[1]
        intake = Intake(
            facts=facts,
            text=text,
            model_names=tuple(head["model_names"]),
            models=frozenset(head["models"]),
            tenant_id=head["tenant_id"],
        )
        del parts
        try:
            answer = _answer(head["path"], intake, raw, head["context"])
        except PenumbraError as error:
            answer = [_error(error)]
        except MemoryError:
            raise  # what is left of this process is not to be trusted
        except Exception:
            traceback.print_exc()
            answer = [_error(PenumbraError("The router failed on this request; its log has the details."))]
        del intake, raw
        _write(answers, answer)
        del answer


def _answer(path: str, intake: Intake, raw: bytes, context: int) -> list[bytes]:
    if path in CONVERTING:
        return [b"{}", dump(CONVERTING[path](intake, raw, context))]
    prepared = GENERATING[path](intake, raw, context)
    request, answer = prepared.choices[0]
    assert request.packed is not None
    body = json.loads(raw)
    instructions = body.get("instructions") or ""
    rest = json.dumps(body | {name: word for name, word in STAND_INS.items() if body.get(name)}).encode()
    if len(rest) > MOST_REST_BYTES:
        raise InvalidRequest(
            f"Besides its prompt the body has {len(rest)} bytes, at most {MOST_REST_BYTES} are allowed. Send fewer or "
            "shorter tools."
        )
    head = {
        "alike": request.alike.hex(),
        "digests": {model: b"".join(digests).hex() for model, digests in request.digests.items()},
        "digest_bytes": max((len(digests[0]) for digests in request.digests.values() if digests), default=1),
        "stage": answer.stage if isinstance(answer, Parsed) else "",
    }
    said = answer.said if isinstance(answer, Completion) and answer.said else ""
    return [json.dumps(head).encode(), rest, request.packed, said.encode(), instructions.encode()]


def _error(error: PenumbraError) -> bytes:
    param, detail = (error.param, error.detail_code) if isinstance(error, InvalidRequest) else (None, None)
    return json.dumps({"error": error.code, "message": str(error), "param": param, "detail": detail}).encode()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
