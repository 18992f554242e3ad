"""What the prefix tree promises, one story at a time."""

from __future__ import annotations

import pytest

from engine.cache.shadow_radix import Match
from tests.cache.words import Cache, digests
from wire.prefix import namespace
from wire.types import PageClass, Removed, Stored

FULL, SWA = PageClass.FULL, PageClass.SWA


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_a_prompt_is_found_again_as_far_as_its_last_window(cache: Cache) -> None:
    cache.put("abcdef", 2, 5).release()
    assert cache.match(digests("abcdef")) == Match(pages=6, full_pages=6)
    assert cache.match(digests("abcdefgh")) == Match(pages=6, full_pages=6)
    assert cache.match(digests("abcde")) == Match(pages=3, full_pages=5)
    assert cache.match(digests("abcxyz")) == Match(pages=3, full_pages=3)
    assert cache.match(digests("abxyz")) == Match(pages=0, full_pages=2)
    assert cache.match(digests("xbcdef")) == Match(pages=0, full_pages=0)
    cache.check({})


def test_a_lease_gives_the_items_it_was_inserted_with(cache: Cache) -> None:
    pages, windows = cache.full.allocate(5), cache.swa.allocate(2)
    cache.insert(digests("abcde"), pages, {1: windows[0], 4: windows[1]}).release()
    with cache.lease(digests("abcdezz")) as prefix:
        assert (prefix.pages, prefix.tokens, prefix.items(), prefix.window) == (5, 1280, pages, windows[1])
        assert prefix.items(3) == pages[3:]
    with cache.lease(digests("abcd")) as prefix:
        assert (prefix.pages, prefix.items(), prefix.window) == (2, pages[:2], windows[0])
    with cache.lease(digests("abcd"), window=False) as prefix:
        assert (prefix.pages, prefix.items(), prefix.window) == (4, pages[:4], 0)
    with cache.lease(digests("q")) as prefix:
        assert (prefix.pages, prefix.items(), prefix.window) == (0, [], 0)
    cache.check({})


def test_evicting_the_window_keeps_compressed_rows_matchable(cache: Cache) -> None:
    cache.put("abc", 2).release()
    assert cache.evict(SWA, 5) == 1
    assert cache.match(digests("abc")) == Match(pages=0, full_pages=3)
    assert cache.swa.counts().free == 16
    cache.check({})


def test_equal_tokens_of_other_tenants_salts_or_models_are_other_pages(cache: Cache) -> None:
    spaces = [
        namespace("model", "tenant"),
        namespace("model", "other"),
        namespace("model", "tenant", "salt"),
        namespace("another", "tenant"),
    ]
    cache.insert(digests("abc", spaces[0]), cache.full.allocate(3)).release()
    assert [cache.match(digests("abc", space)).full_pages for space in spaces] == [3, 0, 0, 0]


def test_a_page_the_tree_has_already_is_freed_and_its_own_one_read_instead(cache: Cache) -> None:
    first = cache.put("abcd", 3)
    before = first.items()
    second = cache.put("abxyz", 4)
    assert second.items()[:2] == before[:2]
    assert cache.full.counts().used == 4 + 3
    third = cache.put("abcd", 3)
    assert (third.items(), third.window) == (before, first.window)
    assert (cache.full.counts().used, cache.swa.counts().used) == (7, 2)
    for lease in (first, second, third):
        lease.release()
    cache.check({})


def test_a_lease_moves_down_as_its_prompt_grows(cache: Cache) -> None:
    with cache.lease(digests("abcdef")) as prefix:
        cache.put("ab", 1, lease=prefix)
        assert (prefix.pages, cache.protected(FULL), cache.protected(SWA)) == (2, 2, 1)
        cache.put("abcd", 3, lease=prefix)
        assert (prefix.pages, cache.protected(FULL), cache.protected(SWA)) == (4, 4, 1)
        assert cache.evict(SWA, 9) == 1, "the window of page 1, which nobody needs any more"
        assert cache.evict(FULL, 9) == 0
        cache.check({})
    assert (cache.protected(FULL), cache.protected(SWA)) == (0, 0)
    assert (cache.evict(FULL, 9), cache.full.counts().free) == (4, 64)
    cache.check({})


def test_a_window_let_go_early_may_be_evicted_while_its_pages_stay(cache: Cache) -> None:
    lease = cache.put("abc", 2)
    assert (cache.evict(SWA, 1), cache.evict(FULL, 3)) == (0, 0)
    lease.release_window()
    lease.release_window()
    assert (cache.evict(SWA, 1), cache.evict(FULL, 3), lease.window) == (1, 0, 0)
    lease.release()
    assert cache.evict(FULL, 3) == 3
    cache.check({})


def test_leaving_a_with_block_by_an_error_gives_everything_back(cache: Cache) -> None:
    cache.put("abc", 2).release()
    with pytest.raises(RuntimeError), cache.lease(digests("abc")):
        raise RuntimeError
    assert (cache.protected(FULL), cache.protected(SWA)) == (0, 0)


def test_a_lease_released_by_hand_may_end_its_block_but_not_be_released_twice(cache: Cache) -> None:
    cache.put("abc", 2).release()
    with cache.lease(digests("abc")) as prefix:
        prefix.release()
    with pytest.raises(AssertionError, match="released twice"):
        prefix.release()
    with pytest.raises(AssertionError, match="released lease"):
        cache.put("abcd", lease=prefix)


def test_pages_go_from_the_end_of_the_branch_used_longest_ago(cache: Cache) -> None:
    for word in ("abcd", "abxy", "pq"):
        cache.put(word, len(word) - 1).release()
    cache.lease(digests("abcd")).release()
    assert cache.evict(FULL, 1) == 1
    assert cache.match(digests("abxy")).full_pages == 3
    assert cache.evict(FULL, 2) == 2, "the rest of xy, then the end of pq"
    assert [cache.match(digests(word)).full_pages for word in ("abxy", "pq", "abcd")] == [2, 1, 4]
    assert cache.evict(FULL, 2) == 2
    assert [cache.match(digests(word)).full_pages for word in ("pq", "abcd")] == [0, 3]
    cache.check({})


def test_a_prefix_is_as_recent_as_what_was_found_through_it(cache: Cache) -> None:
    cache.put("ab", 1).release()
    cache.put("pq", 1).release()
    cache.put("abcd", 3).release()
    assert cache.evict(FULL, 2) == 2
    assert [cache.match(digests(word)).full_pages for word in ("pq", "abcd")] == [0, 4]
    cache.evict(FULL, 2)
    cache.put("xy").release()
    # "ab" was used when "abcd" was, before "xy".
    cache.evict(FULL, 1)
    assert [cache.match(digests(word)).full_pages for word in ("ab", "xy")] == [1, 2]


def test_windows_inside_a_prefix_go_before_the_last_one_of_any_branch(cache: Cache) -> None:
    cache.put("ab", 1).release()  # the oldest, but a parked session's only window
    cache.put("pqrstu", 1, 3, 5).release()
    assert cache.evict(SWA, 2) == 2
    assert cache.match(digests("pqrs")) == Match(pages=0, full_pages=4)
    assert cache.match(digests("pqrstu")).pages == 6
    assert cache.match(digests("ab")).pages == 2
    cache.check({})


def test_retained_windows_go_after_other_inner_ones(cache: Cache) -> None:
    cache = Cache(full=64, swa=16, retained_windows=16)
    assert [page for page in range(12) if cache.retains(page)] == [3, 7, 11]
    cache.put("abcdefgh", 3, 5, 7).release()
    assert cache.evict(SWA, 1) == 1
    assert [cache.match(digests(word)).pages for word in ("abcd", "abcdef", "abcdefgh")] == [4, 4, 8]
    assert cache.evict(SWA, 1) == 1
    assert [cache.match(digests(word)).pages for word in ("abcd", "abcdefgh")] == [0, 8]


def test_the_last_windows_to_go_unlock_the_longest_prefixes(cache: Cache) -> None:
    cache.put("abcdefghijkl", 11).release()  # oldest and longest
    cache.put("pq", 1).release()
    cache.put("xyz", 2).release()
    assert cache.evict(SWA, 2) == 2
    assert [cache.match(digests(word)).pages for word in ("abcdefghijkl", "pq", "xyz")] == [12, 0, 0]


def test_a_long_prefix_nobody_comes_back_to_gives_way_in_the_end(cache: Cache) -> None:
    cache.put("abcdefgh", 7).release()
    for word in ("mn", "op", "qr", "st", "uv"):
        cache.put(word, 1).release()
        assert cache.evict(SWA, 1) == 1
    assert cache.match(digests("abcdefgh")) == Match(pages=0, full_pages=8)


def test_events_tell_what_can_be_matched(cache: Cache) -> None:
    abcd = digests("abcd")
    cache.put("ab", 1).release()
    cache.put("abcd", 3).release()
    assert cache.drain_events() == [
        Stored(digests=tuple(abcd[:2]), parent=b""),
        Stored(digests=tuple(abcd[2:]), parent=abcd[1]),
    ]
    cache.evict(SWA, 2)
    assert cache.drain_events() == []
    cache.evict(FULL, 3)
    assert cache.drain_events() == [Removed(digests=tuple(abcd[1:]))]
    assert cache.digests() == [(b"", abcd[0])]


def test_tombstones_without_users_between_them_are_one_node(cache: Cache) -> None:
    with cache.lease(digests("abcdefgh")) as prefix:
        for end in (2, 4, 6, 8):
            cache.put("abcdefgh"[:end], end - 1, lease=prefix)
    assert len(list(cache._nodes())) == 8
    assert cache.evict(SWA, 3) == 3
    assert [len(node.pages) for node in cache._nodes()] == [7, 1]
    cache.check({})


def test_asking_for_nothing_evicts_nothing(cache: Cache) -> None:
    cache.put("abcd", 1, 3).release()
    assert [cache.evict(component, n) for component in (FULL, SWA) for n in (0, -1, -5)] == [0] * 6
    assert cache.match(digests("ab")).pages == 2
