"""Long bodies are read in another process, and nobody can tell: the same requests, answers and refusals come of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from router import preparation
from router.answers import Answer, Json, Usage
from router.config import ModelFacts, RouterConfig
from router.fleet import Fleet
from router.intake import Intake, Prepared
from router.preparation import Preparation, Processes
from router.tenants import ANYONE
from router.text import Text
from tests.router.conftest import EOS, MODEL, byte_ids
from wire.errors import InvalidRequest, Overloaded, PenumbraError
from wire.registry import Registry
from wire.types import FinishReason, TokenEvent

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "long json " * 99}
FUNCTION = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
TURNS = [
    *({"role": "system", "content": "be"}, USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    {"role": "tool", "tool_call_id": "c1", "content": "seen"},
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Both:
    """One body prepared twice: on a thread of this process, and in another."""

    def __init__(self, short: Preparation, long: Preparation) -> None:
        self.short, self.long = short, long

    def intake(self) -> Intake:
        made = self.short.intake(ANYONE, request_id="r", created=7)
        return replace(made, models=frozenset({"one", "two"}))

    async def prepare(self, path: str, body: Json) -> tuple[Prepared, Prepared]:
        raw = json.dumps(body).encode()
        return (
            await self.short.prepare(path, self.intake(), raw),
            await self.long.prepare(path, self.intake(), raw),
        )

    async def refuse(self, path: str, raw: bytes) -> list[tuple[Any, ...]]:
        found = []
        for side in (self.short, self.long):
            with pytest.raises(PenumbraError) as caught:
                await side.prepare(path, self.intake(), raw)
            error = caught.value
            more = (error.param, error.detail_code) if isinstance(error, InvalidRequest) else ()
            found.append((type(error), str(error), *more))
        return found


@pytest.fixture(scope="module")
def making(model_dir: Path, facts: ModelFacts, redis_url: str) -> Iterator[Any]:
    """Makes a Preparation; all are closed in the end."""
    with contextlib.ExitStack() as held:

        def make(**config: Any) -> Preparation:
            settings = RouterConfig(model=model_dir, redis_url=redis_url, served_model_names=(MODEL,), **config)
            text = Text(model_dir, facts, [MODEL], thinking=False)
            fleet = Fleet(Registry(redis_url, "preparation"), poll_s=1.0)
            return held.enter_context(contextlib.closing(Preparation(settings, facts, text, fleet)))

        yield make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(making: Any) -> AsyncIterator[Both]:
    yield Both(making(), making(long_body_bytes=0))


def told(answer: Answer, ids: list[int]) -> str:
    """Everything that a client could be told of an answer with these tokens, but for ids that are drawn."""
    usage = Usage(prompt_tokens=9, completion_tokens=0, cached_tokens=3)
    chunks = answer.opening(usage)
    for index, token_id in enumerate(ids):
        if not answer.stopped:
            chunks += answer.push([TokenEvent(index=index, token_id=token_id, logprob=-0.5)])
    chunks += answer.close(FinishReason.STOP, usage)
    return re.sub(r"call_\w+|toolu_\w+|(rs|msg|fc)_\w+", "drawn", json.dumps([*chunks, answer.response(usage)]))


CONVERSATION: Json = {"model": MODEL, "messages": [USER], "seed": 1}
BODIES: dict[str, tuple[str, Json]] = {
    "text": (COMPLETIONS, {"model": MODEL, "prompt": "é" * 700, "seed": 1, "stop": "c"}),
    "ids": (COMPLETIONS, {"model": MODEL, "prompt": [7] * 700, "seed": 1, "return_token_ids": True}),
    "echo": (COMPLETIONS, {"model": MODEL, "prompt": [0, *byte_ids("né")], "seed": 1, "echo": True, "logprobs": 1}),
    "salt": (COMPLETIONS, {"model": MODEL, "prompt": "x" * 700, "seed": 1, "cache_salt": "s", "n": 2}),
    "chat": (CHAT, CONVERSATION | {"return_token_ids": True, "max_tokens": 50, "return_progress": True}),
    "tools": (CHAT, CONVERSATION | {"messages": TURNS, "tools": [TOOL], "tool_choice": "required"}),
    "schema": (CHAT, CONVERSATION | {"response_format": {"type": "json_object"}, "logprobs": True, "n": 2}),
    "thinking": (CHAT, CONVERSATION | {"thinking": {"type": "enabled"}}),
    "prefix": (CHAT, CONVERSATION | {"messages": [USER, {"role": "assistant", "content": "So", "prefix": True}]}),
    "prefix-thinking": (
        CHAT,
        CONVERSATION
        | {
            "messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "Hm", "prefix": True}],
            "thinking": {"type": "enabled"},
        },
    ),
    "responses": (
        RESPONSES,
        {"model": MODEL, "input": "long " * 200, "instructions": "be " * 99, "seed": 1, "reasoning": {"effort": "none"}}
        | {"tools": [{"type": "function", **FUNCTION}], "metadata": {"a": "b"}},
    ),
    "messages": (
        MESSAGES,
        CONVERSATION | {"max_tokens": 9, "system": [{"type": "text", "text": "be"}], "stop_sequences": ["c"]},
    ),
    "messages-tools": (
        MESSAGES,
        CONVERSATION
        | {"thinking": {"type": "disabled"}, "tool_choice": {"type": "any"}}
        | {"tools": [{"name": "look", "input_schema": {"type": "object"}}]},
    ),
}
SAID = {"tools": '<｜DSML｜invoke name="look">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>', "schema": '{"a": 1}'}


@pytest.mark.parametrize("name", BODIES)
async def test_a_long_body_becomes_what_a_short_one_does(both: Both, name: str):
    path, body = BODIES[name]
    short, long = await both.prepare(path, body)
    assert len(long.choices) == len(short.choices)
    ids = [*byte_ids(SAID.get(name, "hm</think>abcd")), EOS]
    for (one, its_answer), (other, other_answer) in zip(short.choices, long.choices, strict=True):
        assert replace(other, prompt=tuple(other.prompt)) == replace(one, prompt=tuple(one.prompt))
        assert len(one.digests) == 2
        assert told(other_answer, ids) == told(its_answer, ids)
    for field in ("stream", "include_usage", "return_timeline"):
        assert getattr(long, field) == getattr(short, field)
    assert (long.progress is None) == (short.progress is None)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"{",
        b"[]",
        b'{"model": "nano"}',
        b'{"model": "other", "prompt": "x"}',
        b'{"model": "nano", "prompt": [7, 1.5]}',
        b'{"model": "nano", "prompt": [7, 999]}',
        b'{"model": "nano", "prompt": ""}',
        b'{"model": "nano", "prompt": "x", "nonsense": 1}',
        b'{"model": "nano", "prompt": "x", "max_tokens": 9999}',
        b'{"model": "nano", "prompt": "' + b"x" * 9999 + b'"}',
        b'{"model": "nano", "prompt": "x", "logit_bias": {"007": 1}}',
    ],
)
async def test_a_long_body_is_refused_as_a_short_one_is(both: Both, raw: bytes):
    one, other = await both.refuse(COMPLETIONS, raw)
    assert one == other


async def test_a_grammar_that_can_not_be_followed_is_refused_behind_a_long_body(both: Both):
    body = CONVERSATION | {"response_format": {"type": "regex", "regex": "a(b"}}
    one, other = await both.refuse(CHAT, json.dumps(body).encode())
    assert one == other
    assert one[-1] == "invalid_grammar"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "héllo"}),
        ("/detokenize", {"tokens": byte_ids("héllo")}),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": [USER]}),
    ],
)
async def test_a_long_body_is_converted_as_a_short_one_is(both: Both, path: str, body: Json):
    raw = json.dumps(body).encode()
    answers = [await side.convert(path, both.intake(), raw) for side in (both.short, both.long)]
    assert answers[0] == answers[1]


async def test_what_is_long_besides_the_prompt_is_refused(both: Both, making: Any):
    tool = {"type": "function", "function": FUNCTION | {"description": "d" * (1 << 20)}}
    body = CONVERSATION | {"tool_choice": "none", "tools": [tool]}
    with pytest.raises(InvalidRequest, match="Besides its prompt the body has"):
        await making(max_context=1 << 22).prepare(CHAT, both.intake(), json.dumps(body).encode())


# The process


BODY = json.dumps({"model": MODEL, "prompt": "x" * 99}).encode()


def processes_of(made: Preparation) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in made._processes._all]


async def test_a_process_that_ends_takes_one_request_with_it_and_the_next_starts_another(making: Any):
    made = making(long_body_bytes=0)
    await made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)
    (process,) = processes_of(made)
    process.suspend()
    post = asyncio.create_task(made.prepare(COMPLETIONS, made.intake(ANYONE), BODY))
    await asyncio.sleep(0)
    process.kill()
    with pytest.raises(Overloaded, match="ended with this one"):
        await post
    await made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)
    (other,) = processes_of(made)
    other.kill()
    other.wait()  # one that ended while it had nothing to do is noticed, and costs nobody a request
    prepared = await made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)
    assert len(prepared.choices[0][0].prompt) == 100


async def test_a_process_that_takes_too_long_is_ended(model_dir: Path):
    processes = Processes(model_dir, [MODEL], thinking=False, limit_s=0.01)  # less than it takes to start
    with contextlib.closing(processes), pytest.raises(Overloaded):
        await asyncio.to_thread(processes.ask, {}, BODY)
    assert not processes._all


async def test_a_body_whose_client_left_is_not_read(making: Any, monkeypatch: pytest.MonkeyPatch):
    made = making(long_body_bytes=0)
    asked: list[bytes] = []
    ask = Processes.ask

    def noting(self: Processes, head: Json, raw: bytes) -> tuple[Json, list[bytes]]:
        asked.append(raw)
        return ask(self, head, raw)

    monkeypatch.setattr(Processes, "ask", noting)
    monkeypatch.setattr(preparation, "MOST_WAITING_BYTES", 2 * len(BODY) + 1)
    await made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)
    (process,) = processes_of(made)
    process.suspend()
    lane = made._lanes[-1]._max_workers
    running = [asyncio.create_task(made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)) for _ in range(lane)]
    if lane == 1:
        waiting = asyncio.create_task(made.prepare(COMPLETIONS, made.intake(ANYONE), BODY + b" "))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="Too many long requests"):
            await made.prepare(COMPLETIONS, made.intake(ANYONE), BODY)
        waiting.cancel()
        await asyncio.wait({waiting})
    process.resume()
    await asyncio.gather(*running)
    assert BODY + b" " not in asked
    assert made._waiting_bytes == 0


async def test_the_processes_end_with_the_router_even_when_it_is_killed(model_dir: Path):
    program = (
        "import sys, time, pathlib; from router.preparation import Processes\n"
        f"made = Processes(pathlib.Path({str(model_dir)!r}), ['nano'], thinking=False)\n"
        "head = {'path': '/tokenize', 'context': 99, 'tenant_id': 't', 'model_names': ['nano'], 'models': []}\n"
        'print(made.ask(head, b\'{"prompt": "x"}\')[1], *[p.pid for p in made._all], flush=True); time.sleep(600)\n'
    )
    router = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert router.stdout is not None
    *_, pid = (await router.stdout.readline()).split()
    process = psutil.Process(int(pid))
    router.kill()
    await router.wait()
    await asyncio.to_thread(psutil.wait_procs, [process], 60)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def test_long_bodies_take_no_more_than_their_part_of_the_machine(both: Both, making: Any):
    await both.prepare(*BODIES["text"])
    (process,) = processes_of(both.long)
    assert process.nice() == os.nice(0) + preparation.NICE
    assert process.rlimit(psutil.RLIMIT_AS) == (preparation.MEMORY_BYTES,) * 2
    assert os.getsid(process.pid) == process.pid  # Ctrl-C is for the router
