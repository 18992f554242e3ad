"""Bugs that other engines' prefix caches had, as stories this one must survive."""

from __future__ import annotations

import pytest

from engine.batch import Sequence
from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Match
from engine.window import WindowPages, first_window_page, most_window_pages
from tests.cache.words import Cache, digests
from wire.types import PAGE_TOKENS, PageClass, SamplingParams

FULL, SWA = PageClass.FULL, PageClass.SWA


@pytest.fixture
def cache() -> Cache:
    return Cache()


def sequence(slot: int = 1) -> Sequence:
    return Sequence(request_id="r", sampling=SamplingParams(max_tokens=1, seed=0), slot=slot)


def test_a_release_gives_back_what_the_lease_took_though_tombstones_came_back_to_life_meanwhile(cache: Cache) -> None:
    cache.put("abcdef", 5).release()
    cache.evict(SWA, 1)
    lease = cache.lease(digests("abcdef"), window=False)
    cache.put("abc", 0, 1, 2).release()
    cache.put("abcdef", 5).release()
    cache.check({})
    lease.release()
    cache.check({})
    assert (cache.protected(FULL), cache.protected(SWA)) == (0, 0)
    assert (cache.evict(SWA, 9), cache.evict(FULL, 9)) == (4, 6)


def test_splitting_a_held_run_of_pages_neither_loses_nor_doubles_its_locks(cache: Cache) -> None:
    long = cache.put("abcdefgh", 7)
    short = cache.lease(digests("abcdef"), window=False)
    forks = [cache.put(word, len(word) - 1) for word in ("abcdexy", "abcuv", "ax")]
    cache.check({})
    assert (cache.protected(FULL), cache.protected(SWA)) == (8 + 2 + 2 + 1, 4)
    for lease in (short, *forks):
        lease.release()
        cache.check({})
    assert (cache.protected(FULL), cache.protected(SWA)) == (8, 1)
    long.release()
    assert (cache.protected(FULL), cache.protected(SWA)) == (0, 0)


def test_a_window_that_comes_back_does_not_replace_the_rows_a_running_request_reads(cache: Cache) -> None:
    cache.put("abc", 2).release()
    cache.evict(SWA, 1)
    reader = cache.lease(digests("abc"), window=False)
    read = reader.items()
    generations = [cache.full.generation(item) for item in read]
    writer = cache.put("abc", 2)
    assert writer.items() == reader.items() == read
    assert [cache.full.generation(item) for item in read] == generations
    assert cache.full.counts().used == 3, "the writer's own pages were freed instead"
    assert writer.window
    reader.release()
    writer.release()


def test_dropping_a_tombstone_does_not_free_the_window_page_it_once_had(cache: Cache) -> None:
    cache.put("abc", 2).release()
    cache.evict(SWA, 1)
    somebody_elses = cache.swa.allocate(16)
    assert cache.evict(FULL, 3) == 3
    assert all(cache.swa.in_use(item) for item in somebody_elses)
    cache.check({SWA: somebody_elses})


def test_freeing_a_prefix_page_by_page_frees_each_window_once(cache: Cache) -> None:
    cache.put("abcd", 0, 1, 2, 3).release()
    for left in (3, 2, 1, 0):
        assert cache.evict(FULL, 1) == 1
        assert (cache.counts(FULL).used, cache.counts(SWA).used) == (left, left)
        cache.check({})


def test_a_sequence_with_only_its_last_window_mapped_gives_back_that_one_alone() -> None:
    allocator = PageAllocator(9)
    window = WindowPages(allocator)
    first = sequence()
    window.reserve(first, 8)
    window.cover(first, 0, 8 * PAGE_TOKENS)
    allocator.release(window.drop(first))
    # The next request in the same slot brings only the end of a long prompt.
    tail = sequence()
    tail.length = 1000
    window.reserve(tail, most_window_pages(1))
    window.cover(tail, first_window_page(1000) * PAGE_TOKENS, 1000)
    assert [item != 0 for item in tail.swa_pages] == [False, False, False, True]
    mine = window.drop(tail)
    assert mine == tail.swa_pages[3:]
    allocator.release(mine)
    assert allocator.free == 8


def test_a_duplicate_is_freed_when_it_is_handed_over_and_never_again(cache: Cache) -> None:
    cache.put("abc", 2).release()
    pages, (window,) = cache.full.allocate(3), cache.swa.allocate(1)
    lease = cache.insert(digests("abc"), pages, {2: window})
    assert not any(cache.full.in_use(item) for item in pages)
    taken, taken_windows = cache.full.allocate(61), cache.swa.allocate(15)  # somebody gets the very same items
    assert set(pages) <= set(taken)
    assert window in taken_windows
    lease.release()
    assert (cache.evict(FULL, 9), cache.evict(SWA, 9)) == (3, 0)
    assert all(cache.full.in_use(item) for item in taken)
    assert all(cache.swa.in_use(item) for item in taken_windows)
    cache.check({FULL: taken, SWA: taken_windows})


def test_the_sink_enters_neither_the_tree_nor_a_free_list(cache: Cache) -> None:
    with pytest.raises(AssertionError, match="sink"):
        cache.insert(digests("a"), [0])
    with pytest.raises(AssertionError, match="sink"):
        Cache().insert(digests("a"), cache.full.allocate(1), {0: 0})
    with pytest.raises(AssertionError, match="not in use"):
        cache.swa.release([0])
    assert 0 not in cache.swa.allocate(16)


def test_windows_mapped_for_tokens_that_were_then_rejected_are_counted_and_given_back() -> None:
    allocator = PageAllocator(9)
    window = WindowPages(allocator)
    drafting = sequence()
    window.reserve(drafting, most_window_pages(4))
    drafting.length = 510
    window.cover(drafting, 384, 510)
    window.cover(drafting, 510, 514)  # four drafts, two of them on the next page, all rejected
    drafting.length = 511
    window.trim(drafting)
    window.cover(drafting, 511, 515)
    assert allocator.counts().used == len(window.mapped(drafting)) == 2
    assert window.available == 8 - most_window_pages(4)
    allocator.release(window.drop(drafting))
    assert (allocator.free, window.available) == (8, 8)


def test_using_a_branch_again_and_again_does_not_keep_the_windows_inside_it(cache: Cache) -> None:
    cache.put("pq", 1).release()
    cache.put("abcdef", 1, 3, 5).release()
    for _ in range(5):
        cache.lease(digests("abcdef")).release()
    assert cache.evict(SWA, 2) == 2
    assert cache.match(digests("abcd")) == Match(pages=0, full_pages=4)
    assert [cache.match(digests(word)).pages for word in ("pq", "abcdef")] == [2, 6]


def test_pressure_on_windows_leaves_compressed_rows_of_a_leaf(cache: Cache) -> None:
    cache.put("abcdef", 5).release()
    assert cache.evict(SWA, 16) == 1
    assert cache.counts(FULL).used == 6
