"""The reader's decisions, with time as an argument."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvtransfer.reader import (
    MAX_READS_PER_PEER,
    Action,
    Cancel,
    Close,
    Disconnect,
    Polled,
    Post,
    PostFailed,
    ReaderCore,
    ReadJob,
    Report,
    Settled,
    Stop,
    Submit,
    Tick,
    Verified,
    Verify,
)
from kvtransfer.transport import ReadState
from wire.errors import Cancelled, LayoutMismatch, TransferFailed, WorkerLost
from wire.types import OwnerCard, PageClass, PageGroup, Region, RegionClass

FULL = PageClass.FULL
CLASSES = (RegionClass(name=FULL, regions=(Region(name="c4", address=0, item_bytes=10, num_items=100),)),)


def owner(worker_id: str = "prefill-0", epoch: int = 1) -> OwnerCard:
    return OwnerCard(
        worker_id=worker_id,
        epoch=epoch,
        transport="loopback",
        agent=f"{worker_id}-{epoch}",
        metadata=b"",
        signature="s",
        classes=CLASSES,
    )


def job(job_id: str, items: Sequence[int], card: OwnerCard | None = None) -> ReadJob:
    """Read the owner's items 0, 1, ... into `items`."""
    n = len(items)
    positions = tuple(range(n))
    group = PageGroup(page_class=FULL, positions=positions, items=positions, generations=(1,) * n, checksums=(7,) * n)
    return ReadJob(job_id=job_id, card=card or owner(), groups=(group,), local={FULL: dict(enumerate(items))})


def core(pages_a_slice: int = 100) -> ReaderCore:
    return ReaderCore(CLASSES, max_slice_bytes=10 * pages_a_slice, progress_deadline_s=2.0)


def posts(actions: list[Action]) -> list[Post]:
    return [action for action in actions if isinstance(action, Post)]


def tick_to(core: ReaderCore, start: float, end: float, step: float = 0.1) -> list[tuple[float, Action]]:
    seen = []
    for i in range(1, round((end - start) / step) + 1):
        now = start + i * step
        seen += [(now, action) for action in core.step(now, Tick())]
    return seen


def test_a_page_is_ready_only_after_its_read_is_done_and_its_bytes_are_verified() -> None:
    c = core()
    (post,) = c.step(10.0, Submit(job("a", [5, 6])))
    assert isinstance(post, Post)
    assert (post.part.remote, post.part.local) == ((0, 1), (5, 6))
    assert c.step(10.1, Polled(post.read_id, ReadState.RUNNING)) == []
    assert c.step(10.2, Polled(post.read_id, ReadState.DONE)) == [
        Close(post.read_id),
        Verify(post.read_id, post.part),
    ]
    (report,) = c.step(10.5, Verified(post.read_id))
    assert isinstance(report, Report)
    assert report.result.ok
    assert (report.result.num_bytes, report.result.seconds) == (20, pytest.approx(0.5))
    assert c.job_ids == ()


def test_a_job_without_pages_is_done_at_once() -> None:
    (report,) = core().step(0.0, Submit(job("a", [])))
    assert isinstance(report, Report)
    assert report.result.ok


def test_reads_in_the_air_are_bounded_per_owner_and_jobs_take_turns() -> None:
    c = core(pages_a_slice=1)
    first = posts(c.step(0.0, Submit(job("a", range(10)))))
    assert len(first) == MAX_READS_PER_PEER
    assert posts(c.step(0.0, Submit(job("b", range(20, 30))))) == []
    elsewhere = posts(c.step(0.0, Submit(job("c", range(40, 50), owner("prefill-1")))))
    assert len(elsewhere) == MAX_READS_PER_PEER
    turn = [posts(c.step(0.1, Polled(post.read_id, ReadState.DONE)))[0].part.local[0] for post in first]
    # Every landing frees one place; it goes to the job with fewer reads in the air.
    assert turn == [20, 21, 4, 5]


def test_bytes_that_do_not_match_are_read_once_more_and_only_those() -> None:
    c = core()
    (post,) = posts(c.step(0.0, Submit(job("a", [5, 6, 7]))))
    c.step(0.0, Polled(post.read_id, ReadState.DONE))
    (again,) = posts(c.step(0.0, Verified(post.read_id, (6,))))
    assert (again.part.remote, again.part.local, again.part.num_bytes) == ((1,), (6,), 10)
    c.step(0.0, Polled(again.read_id, ReadState.DONE))
    (report,) = c.step(0.0, Verified(again.read_id))
    assert isinstance(report, Report)
    assert (report.result.ok, report.result.num_bytes) == (True, 30)


def test_bytes_that_do_not_match_twice_fail_the_job_with_their_count() -> None:
    c = core()
    (post,) = posts(c.step(0.0, Submit(job("a", [5, 6, 7]))))
    c.step(0.0, Polled(post.read_id, ReadState.DONE))
    (again,) = posts(c.step(0.0, Verified(post.read_id, (5, 6))))
    c.step(0.0, Polled(again.read_id, ReadState.DONE))
    (report,) = c.step(0.0, Verified(again.read_id, (6,)))
    assert isinstance(report, Report)
    assert isinstance(report.result.error, TransferFailed)
    assert "1 of 3 pages from prefill-0 do not match" in str(report.result.error)
    assert report.result.unsettled == ()


def test_a_cancelled_jobs_running_pages_settle_only_when_their_handle_does() -> None:
    c = core(pages_a_slice=2)
    running = posts(c.step(0.0, Submit(job("a", range(3)))))
    c.step(0.0, Polled(running[0].read_id, ReadState.DONE))
    (report,) = c.step(1.0, Cancel("a"))
    assert isinstance(report, Report)
    assert isinstance(report.result.error, Cancelled)
    assert report.result.unsettled == ((FULL, 2),)
    assert c.unsettled == ((FULL, 2),)
    assert tick_to(c, 1.0, 100.0, step=1.0) == []
    assert c.step(100.0, Polled(running[1].read_id, ReadState.FAILED)) == [
        Close(running[1].read_id),
        Settled(((FULL, 2),)),
    ]
    assert c.unsettled == ()


def test_a_verdict_on_a_job_that_is_over_is_ignored() -> None:
    c = core()
    (post,) = posts(c.step(0.0, Submit(job("a", [1]))))
    c.step(0.0, Polled(post.read_id, ReadState.DONE))
    c.step(0.0, Cancel("a"))
    assert c.step(0.0, Verified(post.read_id, (1,))) == []
    assert c.step(0.0, Cancel("a")) == []


def test_an_owner_that_finishes_nothing_for_two_seconds_fails_all_its_jobs_and_nobody_elses() -> None:
    c = core(pages_a_slice=1)
    c.step(0.0, Tick())
    c.step(0.0, Submit(job("a", range(6))))
    c.step(0.0, Submit(job("waits", range(10, 12))))
    other = posts(c.step(0.0, Submit(job("other", range(20, 22), owner("prefill-1")))))
    for start, end, post in zip((0.0, 1.0), (1.0, 1.9), other, strict=True):  # a page a second keeps it alive
        assert tick_to(c, start, end) == []
        c.step(end, Polled(post.read_id, ReadState.DONE))
    (now, first), (_, second), (_, gone) = tick_to(c, 1.9, 2.5)
    assert now == pytest.approx(2.0, abs=0.15)
    assert isinstance(first, Report)
    assert isinstance(second, Report)
    assert {first.result.job_id, second.result.job_id} == {"a", "waits"}
    assert "No read from prefill-0 finished for 2 s" in str(first.result.error)
    assert first.result.unsettled == tuple((FULL, i) for i in range(MAX_READS_PER_PEER))
    assert second.result.unsettled == ()
    assert gone == Disconnect("prefill-0")
    assert c.job_ids == ("other",)


def test_a_pause_of_our_own_is_not_held_against_the_owner() -> None:
    c = core()
    c.step(0.0, Tick())
    c.step(0.0, Submit(job("a", [1])))
    assert c.step(60.0, Tick()) == []
    assert c.job_ids == ("a",)


def test_progress_starts_the_deadline_again() -> None:
    c = core(pages_a_slice=1)
    c.step(0.0, Tick())
    running = posts(c.step(0.0, Submit(job("a", [1, 2, 3]))))
    assert tick_to(c, 0.0, 1.9) == []
    c.step(1.9, Polled(running[0].read_id, ReadState.DONE))
    assert tick_to(c, 1.9, 3.8) == []
    assert c.job_ids == ("a",)


def test_a_page_with_an_unsettled_read_can_not_be_a_destination() -> None:
    c = core()
    (post,) = posts(c.step(0.0, Submit(job("a", [1, 2]))))
    c.step(0.0, Cancel("a"))
    (report,) = c.step(0.0, Submit(job("b", [2, 3])))
    assert isinstance(report, Report)
    assert isinstance(report.result.error, TransferFailed)
    assert "1 destination pages, full 2 first" in str(report.result.error)
    c.step(0.0, Polled(post.read_id, ReadState.DONE))
    assert len(posts(c.step(0.0, Submit(job("b", [2, 3]))))) == 1


def test_pages_of_a_finished_job_can_be_read_into_again() -> None:
    c = core()
    for attempt in range(3):
        (post,) = posts(c.step(0.0, Submit(job(f"a{attempt}", [1]))))
        c.step(0.0, Polled(post.read_id, ReadState.DONE))
        assert isinstance(c.step(0.0, Verified(post.read_id))[0], Report)


@pytest.mark.parametrize(("error", "disconnects"), [(WorkerLost("gone"), 1), (LayoutMismatch("other"), 0)])
def test_a_read_that_can_not_be_posted_fails_the_job_and_leaves_siblings_unsettled(error, disconnects) -> None:
    c = core(pages_a_slice=1)
    running = posts(c.step(0.0, Submit(job("a", [1, 2]))))
    actions = c.step(0.0, PostFailed((running[1].read_id,), error))
    (report,) = [action for action in actions if isinstance(action, Report)]
    assert report.result.error is error
    assert report.result.unsettled == ((FULL, 1),)
    assert len([action for action in actions if isinstance(action, Disconnect)]) == disconnects


def test_a_failed_handle_fails_the_job_while_siblings_still_write() -> None:
    c = core(pages_a_slice=1)
    running = posts(c.step(0.0, Submit(job("a", [1, 2, 3]))))
    actions = c.step(0.0, Polled(running[0].read_id, ReadState.FAILED))
    (report,) = [action for action in actions if isinstance(action, Report)]
    assert isinstance(report.result.error, TransferFailed)
    assert report.result.unsettled == ((FULL, 2), (FULL, 3))


def test_stopping_cancels_every_job() -> None:
    c = core()
    c.step(0.0, Submit(job("a", [1])))
    c.step(0.0, Submit(job("b", [2])))
    reports = c.step(0.0, Stop())
    assert [(r.result.job_id, r.result.unsettled) for r in reports if isinstance(r, Report)] == [
        ("a", ((FULL, 1),)),
        ("b", ((FULL, 2),)),
    ]


def test_a_nonsense_offer_is_a_failed_result_not_a_crash() -> None:
    (report,) = core().step(0.0, Submit(job("a", [1_000])))
    assert isinstance(report, Report)
    assert "outside its pool of 100" in str(report.result.error)
