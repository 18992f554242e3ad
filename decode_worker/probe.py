"""Measures reads from another worker by reading: pages it lends into pages of ours, by the reader that requests use.

Nobody has to trust anybody: the owner lends pages with bytes that mean nothing, we read them into pages that nobody
holds, and both go back. A page whose read has not settled is quarantined as any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import grpc

from decode_worker.scheduler import Borrow, Borrowed, GiveBack
from kvtransfer.fabric import carrier, look
from kvtransfer.plan import item_bytes
from kvtransfer.reader import Reader, ReadJob, ReadResult
from wire import convert
from wire.errors import DeadlineExceeded, InvalidRequest, LayoutMismatch, Overloaded, TransferFailed, WorkerLost
from wire.rpc import error_from_rpc
from wire.types import OwnerCard, PageClass, PageGroup, ProbeReply, RegionClass, WorkerRef
from wire.v1 import kv_pb2, kv_pb2_grpc

PAGE_READS = 32
LARGE_READS = 5
MOST_BYTES = 1 << 30
QUIET_S = 0.1
"""How long devices are watched before, for what they carry anyway."""
PROBE_S = 50.0
"""A whole probe takes no longer; pages are lent for 60 s."""


class Prober:
    """One probe at a time. `post` hands events to the engine's thread, `takes` is called on the reader's."""

    def __init__(
        self,
        post: Callable[[Borrow | GiveBack], None],
        channel: Callable[[str], AbstractAsyncContextManager[grpc.aio.Channel]],
        classes: Sequence[RegionClass],
        *,
        worker_id: str,
        signature: str,
    ) -> None:
        self._post = post
        self._channel = channel
        self._worker_id = worker_id
        self._signature = signature
        self._bytes = {cls.name: item_bytes(cls) for cls in classes}
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self._borrowing: dict[str, asyncio.Future[tuple[int, ...]]] = {}
        self._lock = threading.Lock()  # guards the next
        self._reading: dict[str, asyncio.Future[ReadResult]] = {}

    async def probe(self, reader: Reader, source: WorkerRef, num_bytes: int) -> ProbeReply:
        """Raises what keeps these two workers from moving pages, or this one from measuring it now."""
        page_bytes = self._bytes.get(PageClass.FULL, 0)
        if not page_bytes:
            raise InvalidRequest("this model has no full pages to measure with")
        if self._busy:
            raise Overloaded(f"worker {self._worker_id} is measuring already; try again in a moment")
        self._busy = True
        probe_id = f"probe-{secrets.token_hex(8)}"
        try:
            async with asyncio.timeout(PROBE_S):
                items = await self._borrow(probe_id, max(1, min(num_bytes, MOST_BYTES) // page_bytes))
                async with self._lent(source, len(items) * page_bytes) as (card, group):
                    return await self._measure(reader, probe_id, card, group, items)
        except TimeoutError as error:
            raise DeadlineExceeded(f"reads from {source.worker_id} were not measured within {PROBE_S:g} s") from error
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from failure
        finally:
            self._busy = False
            self._end(reader, probe_id)

    def borrowed(self, answer: Borrowed) -> None:
        """On the event loop."""
        if (waiting := self._borrowing.get(answer.probe_id)) is not None and not waiting.done():
            waiting.set_result(answer.items)

    def takes(self, result: ReadResult) -> bool:
        """Whether this was a read of ours. On the reader's thread: pages that are unsettled must be quarantined before
        the reader can say that they have settled.
        """
        with self._lock:
            reading = self._reading.pop(result.job_id, None)
        if reading is None:
            return False
        if not result.ok:
            self._post(GiveBack(result.job_id.partition("/")[0], result.unsettled))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(_settle, reading, result)
        return True

    async def _borrow(self, probe_id: str, num_pages: int) -> tuple[int, ...]:
        waiting = self._borrowing[probe_id] = self._loop.create_future()
        try:
            self._post(Borrow(probe_id, num_pages))
            items: tuple[int, ...] = await waiting
        finally:
            del self._borrowing[probe_id]
        if not items:
            raise Overloaded(f"worker {self._worker_id} has no page to spare for measuring; try again")
        return items

    @contextlib.asynccontextmanager
    async def _lent(self, source: WorkerRef, num_bytes: int) -> AsyncIterator[tuple[OwnerCard, PageGroup]]:
        request = kv_pb2.LendRequest(num_bytes=num_bytes, reader_id=self._worker_id, signature=self._signature)
        async with self._channel(source.address) as channel:
            call = kv_pb2_grpc.PagesStub(channel).Lend(request)  # type: ignore[no-untyped-call]
            try:
                offers = [convert.page_offer_from_wire(await anext(aiter(call))) for _ in range(2)]
                card = offers[0].owner
                if card is None or (card.worker_id, card.epoch) != (source.worker_id, source.epoch):
                    raise WorkerLost(f"worker {source.worker_id} is no longer the one that was asked")
                if card.signature != self._signature:
                    raise LayoutMismatch(
                        f"worker {card.worker_id} has page layout {card.signature[:12]}, this worker "
                        f"{self._signature[:12]}. Serve both with the same checkpoint, --kv-layout and version."
                    )
                if not offers[1].groups or not offers[1].groups[0].items:
                    raise TransferFailed(f"worker {source.worker_id} lent nothing")
                yield card, offers[1].groups[0]
            finally:
                call.cancel()

    async def _measure(
        self, reader: Reader, probe_id: str, card: OwnerCard, group: PageGroup, items: tuple[int, ...]
    ) -> ProbeReply:
        num_pages = min(len(items), len(group.items))
        numbers = iter(range(1 + PAGE_READS + LARGE_READS))

        async def read(first: int, count: int) -> int:
            """Microseconds that pages first..first+count took."""
            part = slice(first, first + count)
            job = ReadJob(
                job_id=f"{probe_id}/{next(numbers)}",
                card=card,
                groups=(
                    PageGroup(
                        page_class=group.page_class,
                        positions=group.positions[part],
                        items=group.items[part],
                        generations=group.generations[part],
                        checksums=group.checksums[part],
                    ),
                ),
                local={PageClass.FULL: dict(zip(group.positions[part], items[part], strict=True))},
            )
            with self._lock:
                done = self._reading[job.job_id] = self._loop.create_future()
            reader.submit(job)
            result: ReadResult = await done
            if not result.ok:
                raise result.error or TransferFailed("the read failed without a reason")
            return round(result.seconds * 1e6)

        connect_us = await read(0, 1)
        quiet = look()
        await asyncio.sleep(QUIET_S)
        before = look()
        large_us = [await read(0, num_pages) for _ in range(LARGE_READS)]
        num_bytes = num_pages * self._bytes[PageClass.FULL]
        kind, device = carrier(quiet, before, look(), num_bytes * LARGE_READS)
        page_us = [await read(i % num_pages, 1) for i in range(PAGE_READS)]
        return ProbeReply(
            num_bytes=num_bytes,
            page_bytes=self._bytes[PageClass.FULL],
            window_bytes=sum(size for cls, size in self._bytes.items() if cls is not PageClass.FULL),
            page_us=tuple(page_us),
            large_us=tuple(large_us),
            connect_us=connect_us,
            carrier=kind,
            device=device,
        )

    def _end(self, reader: Reader, probe_id: str) -> None:
        """Give the pages back: now, or when the read that was left in the air has a result."""
        with self._lock:
            left = [job_id for job_id in self._reading if job_id.startswith(f"{probe_id}/")]
        if left:
            for job_id in left:
                reader.cancel(job_id)
        else:
            self._post(GiveBack(probe_id))


def _settle(waiting: asyncio.Future[ReadResult], result: ReadResult) -> None:
    if not waiting.done():
        waiting.set_result(result)
