"""What a decode worker reports of each pair comes from its own reads."""

from __future__ import annotations

from decode_worker.links import MAX_PEERS, WINDOW, Links
from kvtransfer.reader import ReadJob, ReadResult
from wire.errors import TransferFailed
from wire.registry import MAX_LINKS
from wire.types import OwnerCard, PageClass, PageGroup, Region, RegionClass


def job(job_id: str, source: str = "prefill-0", pages: int = 2) -> ReadJob:
    full = RegionClass(name=PageClass.FULL, regions=(Region(name="page", address=4096, item_bytes=1000, num_items=99),))
    card = OwnerCard(
        worker_id=source, epoch=1, transport="nixl", agent="a", metadata=b"", signature="s", classes=(full,)
    )
    ids = tuple(range(1, pages + 1))
    group = PageGroup(page_class=PageClass.FULL, positions=ids, items=ids, generations=ids, checksums=ids)
    return ReadJob(job_id=job_id, card=card, groups=(group,), local={})


def done(job_id: str, num_bytes: int, seconds: float) -> ReadResult:
    return ReadResult(job_id=job_id, ok=True, num_bytes=num_bytes, seconds=seconds)


def test_bytes_in_the_air_are_those_of_jobs_that_have_not_ended() -> None:
    links = Links()
    links.submitted(job("a"))
    links.submitted(job("b", pages=3))
    assert links.reading_bytes == 5000
    links.ended(done("a", 2000, 0.5))
    assert links.reading_bytes == 3000
    links.ended(ReadResult(job_id="b", ok=False, error=TransferFailed("gone")))
    assert links.reading_bytes == 0
    assert links.read_bytes == 2000


def test_a_pairs_speed_is_its_bytes_over_the_seconds_they_took() -> None:
    links = Links()
    for i, seconds in enumerate((0.1, 0.3, 0.2)):
        links.submitted(job(str(i)))
        links.ended(done(str(i), 2000, seconds))
    (link,) = links.report()
    assert (link.source, link.reads, link.read_bytes) == ("prefill-0", 3, 6000)
    assert link.bytes_per_s == 10_000
    assert link.p50_us == 200_000


def test_old_reads_say_nothing_about_the_speed_of_late() -> None:
    links = Links()
    for i in range(2 * WINDOW):
        links.submitted(job(str(i)))
        links.ended(done(str(i), 1000, 10.0 if i < WINDOW else 0.001))
    (link,) = links.report()
    assert link.bytes_per_s == 1_000_000
    assert link.reads == 2 * WINDOW


def test_the_report_holds_the_pairs_used_last_and_no_more_than_a_record_may() -> None:
    links = Links()
    for i in range(MAX_PEERS + 20):
        links.submitted(job(str(i), source=f"prefill-{i}"))
        links.ended(done(str(i), 1000, 0.1))
    newest = MAX_PEERS + 19
    assert [link.source for link in links.report()] == [f"prefill-{newest - i}" for i in range(MAX_LINKS)]


def test_what_failed_or_moved_nothing_is_no_measurement() -> None:
    links = Links()
    links.submitted(job("a"))
    links.ended(done("a", 0, 0.0))
    links.ended(done("never submitted", 1000, 1.0))
    assert links.report() == ()
