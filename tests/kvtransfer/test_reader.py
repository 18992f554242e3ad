"""The reader's thread over real memory inside one process."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator

import pytest

from kvtransfer.loopback import Flow, Gate, LoopbackTransport
from kvtransfer.reader import Reader, ReadJob, ReadResult
from tests.kvtransfer.memory import Memory, card
from wire.errors import Cancelled, LayoutMismatch, TransferFailed, WorkerLost
from wire.types import PageClass

FULL, SWA, STATE = PageClass.FULL, PageClass.SWA, PageClass.STATE
WAIT_S = 10


class Pair:
    """An owner and a reader in one process; results and settled items land in queues."""

    def __init__(self, name: str, progress_deadline_s: float = 2.0) -> None:
        self.source, self.target, self.gate = Memory(40, seed=1), Memory(50), Gate()
        self.owner = LoopbackTransport(f"{name}-owner")
        self.owner.register(self.source.classes)
        self.card = card(self.source, self.owner)
        self.transport = LoopbackTransport(f"{name}-reader", self.gate)
        self.transport.register(self.target.classes)
        self.results: queue.SimpleQueue[ReadResult] = queue.SimpleQueue()
        self.settled: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.verify_calls: list[tuple[PageClass, int]] = []
        self.reader = Reader(
            self.transport,
            self.target.classes,
            self.verify,
            self.results.put,
            self.settled.put,
            max_slice_bytes=8_000,
            progress_deadline_s=progress_deadline_s,
        )
        self.reader.start()

    def verify(self, page_class, items, checksums):
        self.verify_calls += [(page_class, item) for item in items]
        return self.target.verify(page_class, items, checksums)

    def job(self, job_id: str, pages: int = 20, seed: int = 3) -> ReadJob:
        rng = random.Random(seed)
        classes = (FULL, SWA, STATE)
        return ReadJob(
            job_id=job_id,
            card=self.card,
            groups=tuple(self.source.group(c, range(pages), rng.sample(range(40), pages)) for c in classes),
            local={c: dict(enumerate(rng.sample(range(50), pages))) for c in classes},
        )

    def result(self) -> ReadResult:
        return self.results.get(timeout=WAIT_S)

    def arrived(self, job: ReadJob) -> bool:
        return all(
            self.target.item(g.page_class, job.local[g.page_class][position]) == self.source.item(g.page_class, item)
            for g in job.groups
            for position, item in zip(g.positions, g.items, strict=True)
        )


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.node.name, getattr(request, "param", 2.0))
    yield pair
    pair.gate.flow = Flow.OPEN
    pair.reader.stop(5.0)
    assert not any(thread.name == "kv-reader" for thread in threading.enumerate())
    pair.transport.close()
    pair.owner.close()


def test_permuted_pages_of_every_class_arrive_where_the_reader_wants_them(pair: Pair) -> None:
    job = pair.job("a")
    pair.reader.submit(job)
    result = pair.result()
    assert result.ok
    assert result.num_bytes == 20 * (1728 + 576 + 2048 + 64 + 256 + 64)
    assert pair.arrived(job)
    written = {(c, item) for c, places in job.local.items() for item in places.values()}
    for page_class in (FULL, SWA, STATE):
        for item in range(50):
            if (page_class, item) not in written:
                assert not any(pair.target.item(page_class, item)), "a page nobody asked to be written"


def test_many_jobs_at_once_each_get_one_result(pair: Pair) -> None:
    for i in range(10):
        positions = range(4)
        pair.reader.submit(
            ReadJob(
                job_id=f"j{i}",
                card=pair.card,
                groups=(pair.source.group(FULL, positions, range(4 * i, 4 * i + 4)),),
                local={FULL: {p: 5 * i + p for p in positions}},
            )
        )
    results = {(result := pair.result()).job_id: result.ok for _ in range(10)}
    assert results == {f"j{i}": True for i in range(10)}
    assert pair.target.item(FULL, 5 * 7 + 2) == pair.source.item(FULL, 4 * 7 + 2)
    assert pair.results.empty()


@pytest.mark.parametrize("pair", [0.3], indirect=True)
def test_a_frozen_owner_leaves_pages_unsettled_until_its_bytes_have_landed(pair: Pair) -> None:
    pair.gate.flow = Flow.HELD
    job = pair.job("a")
    pair.reader.submit(job)
    result = pair.result()
    assert isinstance(result.error, TransferFailed)
    assert "No read from prefill-0 finished for 0.3 s" in str(result.error)
    assert result.unsettled
    assert pair.settled.empty()
    for page_class, item in result.unsettled:
        assert not any(pair.target.item(page_class, item))
    pair.gate.flow = Flow.OPEN
    settled: set = set()
    while settled != set(result.unsettled):
        settled |= set(pair.settled.get(timeout=WAIT_S))
    # The late bytes did land, in pages that nobody else was given meanwhile.
    wanted = {
        (g.page_class, job.local[g.page_class][position]): item
        for g in job.groups
        for position, item in zip(g.positions, g.items, strict=True)
    }
    for page_class, item in settled:
        assert pair.target.item(page_class, item) == pair.source.item(page_class, wanted[page_class, item])


def test_cancel_in_the_air_reports_what_is_unsettled_and_later_that_it_settled(pair: Pair) -> None:
    pair.gate.flow = Flow.HELD
    pair.reader.submit(pair.job("a"))
    pair.reader.cancel("a")
    result = pair.result()
    assert isinstance(result.error, Cancelled)
    assert result.unsettled
    pair.gate.flow = Flow.FAILING
    settled: set = set()
    while settled != set(result.unsettled):
        settled |= set(pair.settled.get(timeout=WAIT_S))
    pair.gate.flow = Flow.OPEN
    pair.reader.submit(again := pair.job("a"))
    assert pair.result().ok
    assert pair.arrived(again)


def test_cancelling_what_is_over_or_unknown_does_nothing(pair: Pair) -> None:
    pair.reader.submit(pair.job("a"))
    assert pair.result().ok
    pair.reader.cancel("a")
    pair.reader.cancel("never")
    pair.reader.submit(pair.job("b"))
    assert pair.result().job_id == "b"
    assert pair.results.empty()


def test_a_page_that_keeps_failing_its_checksum_fails_the_job_after_one_more_read(pair: Pair) -> None:
    job = pair.job("a")
    victim = job.groups[0].items[5]
    pair.source.regions[FULL]["c4"][victim, 100] ^= 1
    pair.reader.submit(job)
    result = pair.result()
    assert isinstance(result.error, TransferFailed)
    assert "1 of 60 pages from prefill-0 do not match their checksums, read twice" in str(result.error)
    bad = (FULL, job.local[FULL][5])
    assert pair.verify_calls.count(bad) == 2
    assert all(pair.verify_calls.count(call) == 1 for call in set(pair.verify_calls) - {bad})


def test_a_page_torn_once_is_read_again_and_then_good(pair: Pair) -> None:
    job = pair.job("a")
    victim = job.groups[0].items[5]
    pair.source.regions[FULL]["c4"][victim, 100] ^= 1
    mend = pair.verify

    def verify(page_class, items, checksums):
        bad = mend(page_class, items, checksums)
        if bad:
            pair.source.regions[FULL]["c4"][victim, 100] ^= 1
        return bad

    pair.reader._verify = verify
    pair.reader.submit(job)
    assert pair.result().ok
    assert pair.arrived(job)


def test_a_verifier_that_breaks_fails_the_job_and_not_the_reader(pair: Pair) -> None:
    def broken(page_class, items, checksums):
        raise RuntimeError("no such page")

    working, pair.reader._verify = pair.reader._verify, broken
    pair.reader.submit(pair.job("a"))
    assert "could not be verified: no such page" in str(pair.result().error)
    pair.reader._verify = working
    pair.reader.submit(pair.job("b"))
    assert pair.result().ok


def test_an_owner_that_closed_is_a_lost_worker(pair: Pair) -> None:
    pair.owner.close()
    pair.reader.submit(pair.job("a"))
    result = pair.result()
    assert isinstance(result.error, WorkerLost)
    assert result.unsettled == ()


def test_a_card_of_another_layout_is_refused(pair: Pair) -> None:
    shape = {FULL: {"c4": 1728, "c4_index": 512}, SWA: {"swa": 2048}, STATE: {"raw_a": 64, "raw_b": 256, "raw_c": 64}}
    stranger = Memory(40, seed=2, shape=shape)
    transport = LoopbackTransport("stranger")
    transport.register(stranger.classes)
    job = ReadJob(
        job_id="a",
        card=card(stranger, transport, "prefill-9"),
        groups=(stranger.group(FULL, [0], [1]),),
        local={FULL: {0: 1}},
    )
    pair.reader.submit(job)
    result = pair.result()
    assert isinstance(result.error, LayoutMismatch)
    assert "'c4_index' has items of 512 bytes where ours is 'c4_index' with 576" in str(result.error)
    transport.close()


def test_a_job_id_in_use_is_refused_and_a_stopped_reader_takes_nothing(pair: Pair) -> None:
    pair.gate.flow = Flow.HELD
    pair.reader.submit(pair.job("a"))
    with pytest.raises(ValueError, match="job a is already being read"):
        pair.reader.submit(pair.job("a"))
    pair.gate.flow = Flow.OPEN
    assert pair.result().ok
    assert pair.reader.stop(1.0) == ()
    with pytest.raises(WorkerLost, match="has ended"):
        pair.reader.submit(pair.job("b"))


def test_stopping_with_a_read_in_the_air_ends_the_thread_and_names_its_pages(pair: Pair) -> None:
    pair.gate.flow = Flow.HELD
    pair.reader.submit(pair.job("a"))
    unsettled = pair.reader.stop(0.2)
    result = pair.result()
    assert isinstance(result.error, Cancelled)
    assert set(unsettled) == set(result.unsettled) != set()


def test_a_callback_that_raises_does_not_stop_the_reader(pair: Pair) -> None:
    def angry(result: ReadResult) -> None:
        pair.results.put(result)
        raise RuntimeError("angry")

    pair.reader._on_result = angry
    for name in "ab":
        pair.reader.submit(pair.job(name))
        assert pair.result().ok
