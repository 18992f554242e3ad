"""The router's picture of every worker's prefix cache: exact while it can follow, empty when it can not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from deploy.redis import EmbeddedRedis
from router import mirror as mirror_module
from router.mirror import Outcome, PrefixMirror, follow
from wire import events
from wire.events import Entry, PageSnapshot, PrefixPublisher, PrefixReader
from wire.prefix import namespace, page_hashes
from wire.telemetry import RouterMetrics
from wire.types import PrefixEvent, Removed, Stored

PAGES = page_hashes(range(256 * 12), namespace("model"))


def cut(digests: list[bytes]) -> tuple[bytes, ...]:
    return tuple(digest[:8] for digest in digests)


def following(number: int = 0, pages: list[bytes] | None = None) -> PrefixMirror:
    """A mirror of worker `p0` in life 7, which has applied entry `number`."""
    mirror = PrefixMirror()
    mirror.follow({"p0": 7})
    mirror.load("p0", PageSnapshot(7, number, frozenset(cut(pages or []))))
    return mirror


# Decisions


def test_resident_tokens_count_whole_pages_from_the_start_up_to_the_first_one_missing():
    mirror = following(0, [*PAGES[:3], *PAGES[4:6]])
    assert mirror.resident_tokens("p0", PAGES) == 3 * 256
    assert mirror.resident_tokens("p0", PAGES[:2]) == 2 * 256
    assert mirror.resident_tokens("p0", PAGES[4:]) == 2 * 256
    assert mirror.resident_tokens("p0", []) == 0
    assert mirror.resident_tokens("p0", page_hashes(range(512), namespace("model", "other"))) == 0
    assert mirror.resident_tokens("nobody", PAGES) == 0


def test_entries_apply_in_order_and_a_known_one_changes_nothing():
    mirror = following(4, PAGES[:2])
    assert mirror.apply("p0", Entry(7, 4, (Removed(cut(PAGES[:2])),))) is Outcome.SKIPPED
    stored = Entry(7, 5, (Stored(cut(PAGES[2:6])), Removed(cut(PAGES[5:6]))))
    assert mirror.apply("p0", stored) is Outcome.APPLIED
    assert mirror.resident_tokens("p0", PAGES) == 5 * 256
    assert mirror.positions() == {"p0": 5}
    assert mirror.num_pages() == {"p0": 5}


@pytest.mark.parametrize("entry", [Entry(7, 6), Entry(8, 5), Entry(8, 1), Entry(0, 0)])
def test_a_gap_or_another_life_empties_the_picture_until_the_snapshot(entry: Entry):
    mirror = following(4, PAGES)
    assert mirror.apply("p0", entry) is Outcome.GAP
    assert mirror.resident_tokens("p0", PAGES) == 0
    assert (mirror.unsynced(), mirror.positions()) == (["p0"], {})
    assert mirror.apply("p0", Entry(7, 7, (Stored(cut(PAGES)),))) is Outcome.SKIPPED
    mirror.load("p0", PageSnapshot(7, 9, frozenset(cut(PAGES[:3]))))
    assert mirror.resident_tokens("p0", PAGES) == 3 * 256
    assert (mirror.unsynced(), mirror.positions()) == ([], {"p0": 9})


@pytest.mark.parametrize("snapshot", [None, PageSnapshot(6, 900, frozenset(cut(PAGES)))])
def test_without_a_snapshot_of_this_life_a_worker_starts_empty(snapshot: PageSnapshot | None):
    mirror = PrefixMirror()
    mirror.follow({"p0": 7})
    mirror.load("p0", snapshot)
    assert mirror.resident_tokens("p0", PAGES) == 0
    assert mirror.apply("p0", Entry(7, 1, (Stored(cut(PAGES[:1])),))) is Outcome.APPLIED
    assert mirror.resident_tokens("p0", PAGES) == 256


def test_a_worker_that_left_or_was_born_again_is_forgotten():
    mirror = following(4, PAGES)
    mirror.follow({"p0": 7, "p1": 1})
    assert mirror.resident_tokens("p0", PAGES) == 12 * 256
    mirror.follow({"p0": 8})
    assert mirror.resident_tokens("p0", PAGES) == 0
    assert mirror.num_pages() == {"p0": 0}
    mirror.follow({})
    assert mirror.num_pages() == {}
    mirror.load("p0", PageSnapshot(8, 1, frozenset()))
    assert mirror.apply("p0", Entry(8, 2)) is Outcome.SKIPPED


pages = st.lists(st.integers(0, 11), min_size=1, max_size=4)
histories = st.lists(st.tuples(st.booleans(), pages), max_size=20)


@given(histories, st.sets(st.integers(0, 19)), st.integers(0, 19))
def test_whatever_is_lost_a_snapshot_makes_the_picture_exact(
    history: list[tuple[bool, list[int]]], lost: set[int], snapshot_at: int
):
    """Entries go missing; each gap is healed by the worker's state at that moment, as the shell would read it."""
    mirror, truth = following(), set[bytes]()
    for number, (stored, which) in enumerate(history, start=1):
        digests = cut([PAGES[page] for page in which])
        event: PrefixEvent = Stored(digests) if stored else Removed(digests)
        events.apply(truth, [event])
        if number in lost:
            continue
        outcome = mirror.apply("p0", Entry(7, number, (event,)))
        if outcome is Outcome.GAP or number == snapshot_at:
            mirror.load("p0", PageSnapshot(7, number, frozenset(truth)))
        expected = next((i for i, page in enumerate(cut(PAGES)) if page not in truth), len(PAGES))
        assert mirror.resident_tokens("p0", PAGES) == expected * 256


# With real publishers and a real server


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BLOCK_S", 0.02)
    monkeypatch.setattr(mirror_module, "SILENCE_PAUSE_S", 0.1)


@asynccontextmanager
async def running(url: str, workers: Mapping[str, int]) -> AsyncIterator[tuple[PrefixMirror, CollectorRegistry]]:
    mirror, registry = PrefixMirror(), CollectorRegistry()
    async with PrefixReader(url) as reader, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(follow(mirror, reader, lambda: workers, RouterMetrics(registry)))
        yield mirror, registry
        task.cancel()


async def until_resident(mirror: PrefixMirror, worker_id: str, num_pages: int, within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if mirror.resident_tokens(worker_id, PAGES) == num_pages * 256:
                return
            await asyncio.sleep(0.01)


async def test_a_router_follows_two_workers_and_a_late_one_sees_the_same(own_redis: EmbeddedRedis):
    workers = {"p0": 1, "d0": 2}
    url = own_redis.url
    async with (
        running(url, workers) as (mirror, registry),
        PrefixPublisher(url, "p0", 1) as p0,
        PrefixPublisher(url, "d0", 2) as d0,
    ):
        p0.publish([Stored(tuple(PAGES))])
        d0.publish([Stored(tuple(PAGES[:4]))])
        await until_resident(mirror, "p0", 12)
        await until_resident(mirror, "d0", 4)
        p0.publish([Removed(tuple(PAGES[6:]))])
        await until_resident(mirror, "p0", 6)
        assert registry.get_sample_value("penumbra_prefix_events_total", {"kind": "removed"}) == 6
        async with running(url, workers) as (late, _):
            await until_resident(late, "p0", 6)
            await until_resident(late, "d0", 4)


async def test_a_worker_in_a_new_life_starts_with_an_empty_cache(own_redis: EmbeddedRedis):
    workers = {"p0": 1}
    url = own_redis.url
    async with running(url, workers) as (mirror, _):
        async with PrefixPublisher(url, "p0", 1) as first:
            first.publish([Stored(tuple(PAGES))])
            await until_resident(mirror, "p0", 12)
        workers["p0"] = 2
        async with PrefixPublisher(url, "p0", 2) as second:
            await until_resident(mirror, "p0", 0)
            second.publish([Stored(tuple(PAGES[:2]))])
            await until_resident(mirror, "p0", 2)


async def test_a_router_keeps_its_picture_while_redis_is_away_and_corrects_it_after(own_redis: EmbeddedRedis):
    url = own_redis.url
    async with running(url, {"p0": 1}) as (mirror, registry), PrefixPublisher(url, "p0", 1) as publisher:
        publisher.publish([Stored(tuple(PAGES[:8]))])
        await until_resident(mirror, "p0", 8)
        gaps = registry.get_sample_value("penumbra_prefix_gaps_total")
        own_redis.stop()
        publisher.publish([Removed(tuple(PAGES[5:8]))])
        await asyncio.sleep(0.3)
        assert mirror.resident_tokens("p0", PAGES) == 8 * 256
        own_redis.start()
        await until_resident(mirror, "p0", 5)
        assert registry.get_sample_value("penumbra_prefix_gaps_total") > gaps
