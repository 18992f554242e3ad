"""An engine whose next token is a hash of the page bytes it holds, and a prefill-decode pair around it.

A page that is stale, torn, swapped or missing changes the token at once. There is no model, so a step costs
nothing; everything else is what the processes run: cores, engine threads, claim table, gRPC, reader, real
memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc
import numpy as np
import torch
from prometheus_client import CollectorRegistry

from decode_worker.scheduler import DecodeLimits
from decode_worker.service import DecodeService
from engine.batch import Chain, Drawn, Sampled, Segment
from engine.cache.pools import KvPools, PageAllocator
from engine.loop import StepRunner
from engine.window import first_window_page
from kvtransfer.loopback import Gate, LoopbackTransport
from kvtransfer.reader import Reader
from prefill_worker.scheduler import PrefillLimits
from prefill_worker.service import PrefillService
from tests.books import CheckedDecode, CheckedPrefill
from wire import convert
from wire.rpc import Server, open_channel
from wire.telemetry import WorkerMetrics
from wire.types import (
    PAGE_TOKENS,
    OwnerCard,
    PageClass,
    Region,
    RegionClass,
    RunRequest,
    StartEvent,
    StartRequest,
    WorkerInfo,
)
from wire.v1 import worker_pb2, worker_pb2_grpc

VOCAB = 1000
EOS = 1

P = TypeVar("P", "OraclePools", KvPools)
R = TypeVar("R", bound=StepRunner)


def next_token(tokens: Sequence[int]) -> int:
    """What follows these tokens; never EOS."""
    digest = hashlib.blake2b(np.asarray(tokens, dtype="<u4").tobytes(), digest_size=8).digest()
    return 2 + int.from_bytes(digest, "little") % (VOCAB - 2)


def answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The reference stream."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class OraclePools:
    """Pages that hold token ids: FULL and SWA 256 of them, STATE half of a slot's ring of 256."""

    signature = "oracle"

    def __init__(self, full: int = 40, swa: int = 24, slots: int = 8) -> None:
        self.full, self.swa, self.slots = (
            PageAllocator(full + 1),
            PageAllocator(swa + 1),
            PageAllocator(slots + 1),
        )
        self.memory = {
            PageClass.FULL: np.zeros((full + 1, PAGE_TOKENS), dtype="<u4"),
            PageClass.SWA: np.zeros((swa + 1, PAGE_TOKENS), dtype="<u4"),
            PageClass.STATE: np.zeros((2 * (slots + 1), PAGE_TOKENS // 2), dtype="<u4"),
        }
        self.classes = tuple(
            RegionClass(
                name=cls,
                regions=(Region(name=f"{cls}.0", address=m.ctypes.data, item_bytes=m.strides[0], num_items=len(m)),),
            )
            for cls, m in self.memory.items()
        )

    def scribble(self, page_class: PageClass, items: Sequence[int]) -> None:
        for item in items:
            self.memory[page_class][item] = np.arange(PAGE_TOKENS) + 1_000_003 * item

    def export_pages(self, page_class: PageClass, items: Sequence[int]) -> list[int]:
        memory = self.memory[page_class]
        digests = (hashlib.blake2b(memory[item].tobytes(), digest_size=8).digest() for item in items)
        return [int.from_bytes(digest, "little") for digest in digests]

    def import_pages(self, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]:
        found = self.export_pages(page_class, items)
        return [item for item, ours, theirs in zip(items, found, checksums, strict=True) if ours != theirs]

    def copy_out(self, page_class: PageClass, items: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.memory[page_class][list(items)])

    def copy_in(self, page_class: PageClass, items: Sequence[int], rows: torch.Tensor) -> None:
        self.memory[page_class][list(items)] = rows.numpy()


def held(service: PrefillService | DecodeService) -> dict[str, int]:
    """Pages that are neither free nor a prefix nobody uses, by class and state; empty when nothing is held."""
    found = {}
    for page_class, counts in service._engine.load.pages.items():
        found[f"{page_class} used"] = counts.used - counts.evictable
        found[f"{page_class} quarantined"] = counts.quarantined
    return {name: count for name, count in found.items() if count}


class OracleRunner:
    """Writes each token into every place that belongs to it, and reads all of them to make the next one."""

    def __init__(self, pools: OraclePools) -> None:
        self._memory = pools.memory
        self.fail_next = threading.Event()
        self.is_sick = threading.Event()  # its numbers are none
        self._permits: threading.Semaphore | None = None
        self._chain = Chain(EOS)

    def pause_after(self, steps: int) -> None:
        """Let this many steps run; the next waits for `resume`."""
        self._permits = threading.Semaphore(steps)

    def resume(self) -> None:
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release()

    def prepare(self, batch: list[Segment]) -> list[Segment]:
        return batch

    def execute(self, batch: list[Segment]) -> list[Drawn]:
        if (permits := self._permits) is not None:
            assert permits.acquire(timeout=30)
        if self.fail_next.is_set():
            self.fail_next.clear()
            raise RuntimeError("a kernel failed")
        bound = self._chain.bind(batch)
        results = [None if segment is None else self._compute(segment) for segment in bound]
        if self.is_sick.is_set():
            results = [None if one is None else Sampled(token_id=0, logprob=0.0, ok=False) for one in results]
        drawn = [Drawn() if one is None else Drawn((one,)) for one in results]
        self._chain.drawn(bound, drawn)
        return drawn

    def _compute(self, segment: Segment) -> Sampled | None:
        sequence, memory = segment.sequence, self._memory
        for position, token in enumerate(segment.tokens, start=segment.start):
            page, offset = divmod(position, PAGE_TOKENS)
            memory[PageClass.FULL][sequence.pages[page], offset] = token
            memory[PageClass.SWA][sequence.swa_pages[page], offset] = token
            half, row = divmod(position % PAGE_TOKENS, PAGE_TOKENS // 2)
            memory[PageClass.STATE][2 * sequence.slot + half, row] = token
        if not segment.sample:
            return None
        n = segment.start + len(segment.tokens)
        tokens = memory[PageClass.FULL][sequence.pages[: -(-n // PAGE_TOKENS)]].reshape(-1)[:n]
        first = first_window_page(n - 1)
        window = memory[PageClass.SWA][sequence.swa_pages[first : -(-n // PAGE_TOKENS)]].reshape(-1)
        seen = window[: n - first * PAGE_TOKENS]
        ok = np.array_equal(seen[-128:], tokens[max(0, n - 128) :])
        opened = n - n % 128  # the open block
        ring = memory[PageClass.STATE][2 * sequence.slot : 2 * sequence.slot + 2].reshape(-1)
        ok &= np.array_equal(ring[opened % PAGE_TOKENS : opened % PAGE_TOKENS + n % 128], tokens[opened:])
        return Sampled(token_id=next_token(tokens.tolist()), logprob=-0.5, ok=bool(ok))


@dataclass
class Pair(Generic[P, R]):
    """One prefill and one decode worker in this process, each with its own server."""

    prefill: PrefillService
    prefill_pools: P
    prefill_runner: R
    decode: DecodeService
    decode_pools: P
    decode_runner: R
    prefill_info: WorkerInfo
    decode_info: WorkerInfo
    decode_registry: CollectorRegistry
    gate: Gate
    prefill_channel: grpc.aio.Channel
    decode_channel: grpc.aio.Channel
    stop_prefill: Callable[[], Awaitable[None]] = field(repr=False)

    def metric(self, name: str) -> float:
        """A metric of the decode worker as it was last published."""
        value = self.decode_registry.get_sample_value(name)
        assert value is not None, f"the decode worker has no metric {name}"
        return value

    def start(self, request: StartRequest) -> AsyncIterator[StartEvent]:
        return _events(worker_pb2_grpc.DecodeStub(self.decode_channel), request)

    def run(self, request: RunRequest) -> grpc.aio.UnaryStreamCall[worker_pb2.RunRequest, worker_pb2.RunEvent]:
        stub = worker_pb2_grpc.PrefillStub(self.prefill_channel)
        return stub.Run(convert.run_request_to_wire(request))  # type: ignore[no-any-return]

    def held(self) -> dict[str, int]:
        prefill = {f"prefill {name}": n for name, n in held(self.prefill).items()}
        return prefill | {f"decode {name}": n for name, n in held(self.decode).items()}

    async def settle(self) -> None:
        """Wait until neither worker holds anything."""
        await until(lambda: not self.held() and self.prefill.is_idle() and self.decode.is_idle())


OraclePair = Pair[OraclePools, OracleRunner]


async def until(condition: Callable[[], object]) -> None:
    """Wait for what other threads bring about; a test that waits 20 s has failed."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - no event of theirs to wait for
            await asyncio.sleep(0.01)


async def _events(stub: worker_pb2_grpc.DecodeStub, request: StartRequest) -> AsyncIterator[StartEvent]:
    call = stub.Start(convert.start_request_to_wire(request))
    try:
        async for message in call:
            yield convert.start_event_from_wire(message)
    finally:
        call.cancel()


@contextlib.asynccontextmanager
async def pair(
    name: str,
    *,
    chunk_tokens: int = 200,
    progress_deadline_s: float = 0.5,
    decode_pools: OraclePools | None = None,
    prefill_pools: OraclePools | None = None,
    make_server: Callable[[], Server] = Server,
    local_prefill: bool = False,
) -> AsyncIterator[OraclePair]:
    """Two workers over loopback; `name` makes their transports unique in this process."""
    ours, theirs = decode_pools or OraclePools(), prefill_pools or OraclePools()
    async with pair_of(
        name,
        (theirs, OracleRunner(theirs)),
        (ours, OracleRunner(ours)),
        PrefillLimits(chunk_tokens=chunk_tokens, max_batch_tokens=400, max_context=8192, vocab_size=VOCAB),
        DecodeLimits(max_context=8192, vocab_size=VOCAB, eos_token_id=EOS, local_prefill=local_prefill),
        progress_deadline_s=progress_deadline_s,
        make_server=make_server,
    ) as workers:
        yield workers


@contextlib.asynccontextmanager
async def pair_of(
    name: str,
    prefill_engine: tuple[P, R],
    decode_engine: tuple[P, R],
    prefill_limits: PrefillLimits,
    decode_limits: DecodeLimits,
    *,
    progress_deadline_s: float = 2.0,
    make_server: Callable[[], Server] = Server,
) -> AsyncIterator[Pair[P, R]]:
    """Two workers around engines of any kind, each given as (pools, runner)."""
    (theirs, prefill_runner), (ours, decode_runner) = prefill_engine, decode_engine
    gate, registry = Gate(), CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        owner = LoopbackTransport(f"{name}-prefill")
        owner.register(theirs.classes)
        stack.callback(owner.close)
        agent, metadata = owner.describe()
        card = OwnerCard(
            worker_id="prefill-0",
            epoch=11,
            transport="loopback",
            agent=agent,
            metadata=metadata,
            signature=theirs.signature,
            classes=theirs.classes,
        )
        prefill = PrefillService(
            CheckedPrefill(theirs, prefill_limits),
            prefill_runner,
            card,
            WorkerMetrics(CollectorRegistry()),
            model="m",
            max_context=prefill_limits.max_context,
            held_bytes=1 << 40,
        )
        decode = DecodeService(
            CheckedDecode(ours, decode_limits),
            decode_runner,
            ours,
            WorkerMetrics(registry),
            worker_id="decode-0",
            epoch=22,
            model="m",
            signature=ours.signature,
            max_context=decode_limits.max_context,
            local_prefill=decode_limits.local_prefill,
        )
        transport = LoopbackTransport(f"{name}-decode", gate)
        transport.register(ours.classes)
        stack.callback(transport.close)
        reader = Reader(
            transport,
            ours.classes,
            ours.import_pages,
            decode.reader_results,
            decode.reader_settled,
            progress_deadline_s=progress_deadline_s,
        )
        decode.attach(reader)
        reader.start()
        stack.push_async_callback(asyncio.to_thread, reader.stop, 1.0)
        infos, channels, servers = [], [], []
        for service in (prefill, decode):
            task = asyncio.create_task(service.run())
            stack.push_async_callback(_end, task)
            server = make_server()
            service.add_to(server)
            info = service.info(f"127.0.0.1:{await server.start()}")
            stack.push_async_callback(server.drain, 0.5)
            channel = open_channel(info.address)
            stack.push_async_callback(channel.close, None)
            infos.append(info)
            channels.append(channel)
            servers.append(server)
        yield Pair(
            prefill=prefill,
            prefill_pools=theirs,
            prefill_runner=prefill_runner,
            decode=decode,
            decode_pools=ours,
            decode_runner=decode_runner,
            prefill_info=infos[0],
            decode_info=infos[1],
            decode_registry=registry,
            gate=gate,
            prefill_channel=channels[0],
            decode_channel=channels[1],
            stop_prefill=lambda: servers[0].drain(0.0),
        )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
