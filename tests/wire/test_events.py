"""Prefix events over a real server: what a router reads is what the worker holds, through every kind of loss."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from wire import events
from wire.errors import ConfigError
from wire.events import Entry, PageSnapshot, PrefixPublisher, PrefixReader
from wire.prefix import namespace, page_hashes
from wire.types import PrefixEvent, Removed, Stored

SPACE = namespace("model")
EPOCH = 2**64 - 5
PAGES = page_hashes(range(256 * 40), SPACE)
STREAM, SNAPSHOT = "penumbra:prefix:prefill-0", "penumbra:prefix:prefill-0:pages"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(events, "BLOCK_S", 0.01)


def cut(digests: list[bytes]) -> set[bytes]:
    return {digest[:8] for digest in digests}


@asynccontextmanager
async def publishing_and_reading(url: str) -> AsyncIterator[tuple[PrefixPublisher, PrefixReader]]:
    async with PrefixReader(url) as reader, PrefixPublisher(url, "prefill-0", EPOCH) as publisher:
        yield publisher, reader


async def held(reader: PrefixReader) -> tuple[set[bytes], int]:
    """What snapshot and stream say together, insisting that no number is missing between them."""
    snapshot = await reader.snapshot("prefill-0") or PageSnapshot(EPOCH, 0, frozenset())
    keys, number = set(snapshot.keys), snapshot.number
    while entries := await reader.entries({"prefill-0": number}):
        for worker_id, entry in entries:
            assert (worker_id, entry.epoch, entry.number) == ("prefill-0", EPOCH, number + 1)
            events.apply(keys, entry.events)
            number = entry.number
    return keys, number


async def until_held(reader: PrefixReader, expected: set[bytes], within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while True:
            try:
                if (await held(reader))[0] == expected:
                    return
            except (redis.RedisError, OSError, AssertionError):  # away, or between a snapshot and its gap
                pass
            await asyncio.sleep(0.05)


# Bytes

digests = st.lists(st.binary(min_size=8, max_size=8), max_size=4).map(tuple)
prefix_events = st.one_of(st.builds(Stored, digests), st.builds(Removed, digests))


@given(st.lists(prefix_events, max_size=5).map(tuple))
def test_events_survive_the_wire(sent: tuple[PrefixEvent, ...]) -> None:
    assert events.decode_events(events.encode_events(sent)) == sent


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.frozensets(st.binary(min_size=8, max_size=8)))
def test_snapshots_survive_the_wire(epoch: int, number: int, keys: frozenset[bytes]) -> None:
    snapshot = PageSnapshot(epoch, number, keys)
    assert events.decode_snapshot(events.encode_snapshot(snapshot)) == snapshot


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert events.encode_events(events.decode_events(data)) == data
    with contextlib.suppress(ValueError):
        snapshot = events.decode_snapshot(data)
        assert events.decode_snapshot(events.encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize("data", [b"S", b"X\0\0\0\0", b"S\1\0\0\0short", b"S\xff\xff\xff\xff" + bytes(16)])
def test_bytes_that_are_no_events_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"^{len(data)} bytes"):
        events.decode_events(data)


# Over a server


async def test_a_late_reader_finds_all_pages_and_an_early_one_each_change(redis_server) -> None:
    async with PrefixReader(redis_server.url) as reader:
        async with PrefixPublisher(redis_server.url, "prefill-0", EPOCH) as publisher:
            publisher.publish([Stored(tuple(PAGES[:5]), SPACE)])
            await until_held(reader, cut(PAGES[:5]))
            _, number = await held(reader)
            publisher.publish([Stored(tuple(PAGES[5:8]), PAGES[4]), Removed((PAGES[7],))])
            publisher.publish([Removed((PAGES[6],))])
            [(_, entry)] = await reader.entries({"prefill-0": number})
            sent = (Stored(tuple(p[:8] for p in PAGES[5:8])), Removed((PAGES[7][:8],)), Removed((PAGES[6][:8],)))
            assert entry == Entry(EPOCH, number + 1, sent)
            assert (await held(reader))[0] == cut(PAGES[:6])
        assert await held(reader) == (set(), 0)
    assert redis_server.client().keys("*") == []


async def test_both_keys_go_by_themselves_when_the_worker_dies(redis_server) -> None:
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        publisher.publish([Stored((PAGES[0],))])
        await until_held(reader, cut(PAGES[:1]))
        client = redis_server.client()
        for key in (STREAM, SNAPSHOT):
            assert 0 < client.pttl(key) <= 30_000


async def test_what_an_earlier_life_left_behind_goes_first(redis_server) -> None:
    client = redis_server.client()
    client.set(SNAPSHOT, events.encode_snapshot(PageSnapshot(7, 900, frozenset(cut(PAGES)))))
    client.xadd(STREAM, {"epoch": "7", "events": b""}, id="900-0")
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        publisher.publish([Stored((PAGES[0],))])
        await until_held(reader, cut(PAGES[:1]))


async def test_events_that_redis_missed_leave_a_gap_and_a_snapshot_fills_it(redis_server) -> None:
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        publisher.publish([Stored(tuple(PAGES[:5]))])
        await until_held(reader, cut(PAGES[:5]))
        _, number = await held(reader)
        redis_server.kill()
        publisher.publish([Stored(tuple(PAGES[5:9]))])
        await asyncio.sleep(0.2)
        publisher.publish([Removed((PAGES[8],))])
        redis_server.start()
        await until_held(reader, cut(PAGES[:8]))
        [(_, first), *_] = await reader.entries({"prefill-0": number})
        assert first.number > number + 1


async def test_a_flushed_redis_gets_its_snapshot_back(redis_server, monkeypatch) -> None:
    monkeypatch.setattr(events, "REFRESH_S", 0.1)
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        publisher.publish([Stored(tuple(PAGES[:5]))])
        await until_held(reader, cut(PAGES[:5]))
        _, number = await held(reader)
        redis_server.client().flushall()
        await until_held(reader, cut(PAGES[:5]))
        # Nobody who had followed so far lost anything: the numbers go on.
        assert await held(reader) == (cut(PAGES[:5]), number)


async def test_more_events_than_can_wait_become_a_snapshot(redis_server, monkeypatch) -> None:
    monkeypatch.setattr(events, "MAX_PENDING_PAGES", 10)
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        publisher.publish([Stored((PAGES[0],))])
        await until_held(reader, cut(PAGES[:1]))
        _, number = await held(reader)
        for page in range(1, 40):
            publisher.publish([Stored((PAGES[page],), PAGES[page - 1])])
        await until_held(reader, cut(PAGES))
        [(_, only)] = await reader.entries({"prefill-0": number})
        assert (only.number, only.events) == (number + 2, ())


async def test_the_stream_stays_bounded_and_a_snapshot_covers_what_left_it(redis_server, monkeypatch) -> None:
    monkeypatch.setattr(events, "SNAPSHOT_ENTRIES", 5)
    monkeypatch.setattr(events, "KEPT_ENTRIES", 3)
    monkeypatch.setattr(events, "BATCH_S", 0.0)
    async with publishing_and_reading(redis_server.url) as (publisher, reader):
        for i, page in enumerate(PAGES):
            publisher.publish([Stored((page,))])
            await until_held(reader, cut(PAGES[: i + 1]))
            assert redis_server.client().xlen(STREAM) <= 5 + 3
        assert (await held(reader))[1] >= 40


async def test_a_redis_that_was_never_there_costs_the_worker_nothing(redis_server) -> None:
    redis_server.kill()
    async with PrefixPublisher(redis_server.url, "prefill-0", EPOCH) as publisher:
        publisher.publish([Stored(tuple(PAGES))])
        await asyncio.sleep(0.1)


async def test_entries_and_snapshots_nobody_wrote_are_told_apart(redis_server) -> None:
    client = redis_server.client()
    client.set(SNAPSHOT, b"rubbish")
    client.xadd(STREAM, {"x": "y"}, id="1-0")
    client.xadd(STREAM, {"epoch": "zz", "events": b""}, id="2-0")
    client.xadd(STREAM, {"epoch": "7", "events": b"S"}, id="3-0")
    async with PrefixReader(redis_server.url) as reader:
        assert await reader.snapshot("prefill-0") is None
        assert await reader.entries({"prefill-0": 0}) == [("prefill-0", Entry(0, 0))] * 3


@pytest.mark.parametrize("worker_id", ["", "a:b", "A"])
def test_a_worker_id_that_can_not_be_a_key_is_refused(worker_id: str) -> None:
    with pytest.raises(ConfigError, match="rename it"):
        PrefixPublisher("redis://127.0.0.1:1", worker_id, 1)
