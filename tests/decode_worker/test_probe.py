"""Reads are measured by reading: lent pages into borrowed ones, over real gRPC, and all of them come back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from decode_worker.probe import LARGE_READS, PAGE_READS
from kvtransfer.loopback import Flow
from kvtransfer.plan import item_bytes
from tests.decode_worker.oracle import OraclePair, pair, until
from wire import convert
from wire.rpc import error_from_rpc
from wire.types import PageClass, WorkerRef
from wire.v1 import kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc

names = (f"probe-{n}" for n in itertools.count())


@pytest.fixture
async def workers() -> AsyncIterator[OraclePair]:
    async with pair(next(names)) as workers:
        yield workers


def probing(workers: OraclePair, num_bytes: int = 1 << 20, source: WorkerRef | None = None) -> Any:
    stub = worker_pb2_grpc.DecodeStub(workers.decode_channel)  # type: ignore[no-untyped-call]
    wire = convert.worker_ref_to_wire(source or workers.prefill_info.ref)
    return stub.Probe(worker_pb2.ProbeRequest(source=wire, num_bytes=num_bytes), timeout=60)


def free(workers: OraclePair) -> tuple[int, int]:
    return workers.prefill_pools.full.free, workers.decode_pools.full.free


async def test_a_probe_says_how_long_pages_took_and_gives_all_of_them_back(workers: OraclePair) -> None:
    before = free(workers)
    reply = convert.probe_reply_from_wire(await probing(workers))
    sizes = {cls.name: item_bytes(cls) for cls in workers.decode_pools.classes}
    assert reply.page_bytes == sizes[PageClass.FULL]
    assert reply.window_bytes == sum(sizes.values()) - sizes[PageClass.FULL]
    assert 0 < reply.num_bytes <= 1 << 20
    assert reply.num_bytes % reply.page_bytes == 0
    assert (len(reply.page_us), len(reply.large_us)) == (PAGE_READS, LARGE_READS)
    assert all(took > 0 for took in (*reply.page_us, *reply.large_us, reply.connect_us))
    assert reply.carrier == "unknown"  # these pages are far too few to tell by
    await until(lambda: free(workers) == before)
    assert workers.decode_pools.full.counts().quarantined == 0


async def test_no_more_than_a_share_of_either_pool_is_taken(workers: OraclePair) -> None:
    reply = convert.probe_reply_from_wire(await probing(workers, num_bytes=1 << 40))
    most = min(workers.prefill_pools.full.capacity, workers.decode_pools.full.capacity) // 8
    assert reply.num_bytes == most * reply.page_bytes


async def test_what_is_lent_holds_nothing_of_anybody(workers: OraclePair) -> None:
    """Freed pages keep their bytes until somebody writes them; lent ones are overwritten first."""
    pools = workers.prefill_pools
    items = pools.full.allocate(pools.full.capacity)
    before = dict(zip(items, pools.export_pages(PageClass.FULL, items), strict=True))
    pools.full.release(items)
    stub = kv_pb2_grpc.PagesStub(workers.prefill_channel)  # type: ignore[no-untyped-call]
    request = kv_pb2.LendRequest(num_bytes=1 << 20, reader_id="r", signature=pools.signature)
    call = stub.Lend(request)
    messages = aiter(call)
    await anext(messages)
    (group,) = convert.page_offer_from_wire(await anext(messages)).groups
    assert len(set(group.checksums)) == len(group.items) > 0
    for item, checksum in zip(group.items, group.checksums, strict=True):
        assert checksum != before[item]
    call.cancel()
    await until(lambda: pools.full.free == pools.full.capacity)


async def test_a_read_that_does_not_settle_quarantines_its_pages_until_it_does(workers: OraclePair) -> None:
    before = free(workers)
    workers.gate.flow = Flow.HELD
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await probing(workers)
    assert error_from_rpc(failed.value).code == "transfer_failed"
    quarantined = workers.decode_pools.full.counts
    await until(lambda: quarantined().quarantined == 1)
    workers.gate.flow = Flow.OPEN
    await until(lambda: quarantined().quarantined == 0)
    await until(lambda: free(workers) == before)
    assert convert.probe_reply_from_wire(await probing(workers)).num_bytes > 0


async def test_a_probe_whose_caller_left_gives_back_what_it_holds(workers: OraclePair) -> None:
    before = free(workers)
    workers.gate.flow = Flow.HELD
    call = probing(workers)
    await until(lambda: free(workers)[1] < before[1])
    await asyncio.sleep(0.05)
    call.cancel()
    await until(lambda: free(workers)[0] == before[0])
    workers.gate.flow = Flow.OPEN
    await until(lambda: free(workers) == before)


async def test_two_probes_of_one_worker_do_not_measure_each_other(workers: OraclePair) -> None:
    first, second = await asyncio.gather(probing(workers), probing(workers), return_exceptions=True)
    (refused,) = (one for one in (first, second) if isinstance(one, grpc.aio.AioRpcError))
    assert error_from_rpc(refused).code == "overloaded"


@pytest.mark.parametrize("lost", ["epoch", "address"])
async def test_an_owner_that_is_another_or_not_there_is_said(workers: OraclePair, lost: str) -> None:
    ref = workers.prefill_info.ref
    source = replace(ref, epoch=99) if lost == "epoch" else replace(ref, address="127.0.0.1:9")
    before = free(workers)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await probing(workers, source=source)
    assert error_from_rpc(failed.value).code == "worker_lost"
    await until(lambda: free(workers) == before)


async def test_pages_of_another_layout_are_not_lent(workers: OraclePair) -> None:
    stub = kv_pb2_grpc.PagesStub(workers.prefill_channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await anext(aiter(stub.Lend(kv_pb2.LendRequest(num_bytes=1, reader_id="r", signature="other"))))
    assert error_from_rpc(failed.value).code == "layout_mismatch"
