"""Schedulers that look through their books after every step: what must hold of pages, windows and leases at any time.

Numbers in brackets name the invariants of the prefix cache's design. `ShadowRadix.check` holds the tree to I1-I6, I9,
I11 and I13; an item beside its page's FULL item is all the table there is, so I7 and I8 have nothing to go wrong.
"""

from __future__ import annotations

from typing import Any

from decode_worker.scheduler import DecodeCore
from engine.batch import Sequence
from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Lease, ShadowRadix
from engine.window import first_window_page, num_pages
from prefill_worker.scheduler import PrefillCore
from wire.types import PAGE_TOKENS, PageClass


class CheckedPrefill(PrefillCore):
    """A prefill core whose books agree after every step."""

    def step(self, *args: Any) -> Any:
        return self._checked(super().step(*args))

    def next_batch(self, *args: Any) -> Any:
        return self._checked(super().next_batch(*args))

    def finish(self, *args: Any) -> Any:
        return self._checked(super().finish(*args))

    def _checked(self, result: Any) -> Any:
        lent = [item for items in self._lent.values() for item in items]
        private: dict[PageClass, list[int]] = {PageClass.FULL: lent, PageClass.SWA: []}
        slots = 0
        for run in self._runs.values():
            sequence, lease = run.sequence, run.lease
            if sequence is None or lease is None:
                continue
            slots += 1
            private[PageClass.FULL] += sequence.pages[lease.pages :]
            private[PageClass.SWA] += [sequence.swa_pages[j] for j in self._window.mapped(sequence)]
            check_sequence(sequence, lease)
            assert num_pages(run.total) <= len(sequence.pages), "pages for the whole prompt are set aside at once"
            if sequence.length >= run.rebuilt_at:
                check_window(sequence)
        check_books(self._cache, self._pools, private, slots)
        return result


class CheckedDecode(DecodeCore):
    """A decode core whose books agree after every step."""

    def step(self, *args: Any) -> Any:
        return self._checked(super().step(*args))

    def next_batch(self, *args: Any) -> Any:
        return self._checked(super().next_batch(*args))

    def finish(self, *args: Any) -> Any:
        return self._checked(super().finish(*args))

    def _checked(self, result: Any) -> Any:
        inside = self._admission._inside.values()
        private = {
            PageClass.FULL: [item for one in inside for item in one.sequence.pages[one.lease.pages :]],
            PageClass.SWA: [item for one in inside for item in one.sequence.swa_pages if item],
        }
        private[PageClass.FULL] += [item for items in self._admission._borrowed.values() for item in items]
        for one in inside:
            check_sequence(one.sequence, one.lease)
        check_books(self._admission.cache, self._pools, private, len(inside))
        return result


def check_sequence(sequence: Sequence, lease: Lease) -> None:
    """[I12] What a request leases is the beginning of its pages, and its tokens have places."""
    assert lease.items() == sequence.pages[: lease.pages]
    assert sequence.length <= len(sequence.pages) * PAGE_TOKENS
    assert len(set(sequence.pages)) == len(sequence.pages)
    assert 0 not in sequence.pages


def check_window(sequence: Sequence) -> None:
    """[I12, I14] Whatever the next token can see has its rows."""
    needed = range(first_window_page(sequence.length), num_pages(sequence.length))
    assert all(sequence.swa_pages[j] for j in needed), f"{sequence.request_id} lost a page of its window"


def check_books(cache: ShadowRadix, pools: Any, private: dict[PageClass, list[int]], slots: int) -> None:
    """[I9, I10] Every item has one owner: free + evictable + protected + private + quarantined = capacity."""
    cache.check(private)
    for page_class, allocator in ((PageClass.FULL, pools.full), (PageClass.SWA, pools.swa)):
        assert isinstance(allocator, PageAllocator)
        counts = cache.counts(page_class)
        owned = counts.evictable + counts.protected + len(private[page_class])
        assert counts.free + owned + counts.quarantined == allocator.capacity, page_class
    counts = pools.slots.counts()
    assert counts.used == slots
    assert counts.free + counts.used + counts.quarantined == pools.slots.capacity
