"""Room for requests on a decode worker: taken whole before anything is fetched, given back whole, whatever
happened.

A page that a read may still write is not free when its request is gone. It is quarantined, and comes back
when the reader says that the read has settled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.batch import Sequence
from engine.cache.pools import PageAllocator
from engine.window import WindowPages, first_window_page, most_window_pages, num_pages
from wire.errors import InvalidRequest
from wire.types import PAGE_TOKENS, PageClass, RegionClass, StartRequest

Place = tuple[PageClass, int]
"""One item of one class of our own pools."""


class Pools(Protocol):
    """What the decode core needs of `engine.cache.pools.KvPools`."""

    full: PageAllocator
    swa: PageAllocator
    slots: PageAllocator
    classes: tuple[RegionClass, ...]
    signature: str


class Admission:
    """Gives requests their places and takes them back."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.window = WindowPages(pools.swa)
        self.quarantined_total = 0

    def check(self, request: StartRequest) -> None:
        """Raises InvalidRequest for a request that could not run here even alone."""
        needed, capacity = self._full_pages(request), self._pools.full.capacity
        if needed > capacity:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens and max_tokens={request.sampling.max_tokens} need {needed} "
                f"pages and this worker has {capacity} in all; lower max_tokens or shorten the prompt",
                param="max_tokens",
            )

    def admit(self, request: StartRequest) -> Sequence | None:
        """Full pages to the last token it may generate, the window before its next one, and a slot; or None."""
        pools, n = self._pools, len(request.prompt)
        window = most_window_pages(1)
        if pools.full.free < self._full_pages(request) or self.window.available < window or not pools.slots.free:
            return None
        sequence = Sequence(
            request_id=request.request_id,
            sampling=request.sampling,
            slot=pools.slots.allocate(1)[0],
            pages=pools.full.allocate(self._full_pages(request)),
        )
        self.window.reserve(sequence, window)
        self.window.cover(sequence, first_window_page(n) * PAGE_TOKENS, n)
        return sequence

    def leave(self, sequence: Sequence, unsettled: Iterable[Place]) -> None:
        """Everything back. `unsettled` are those of the sequence's items that a read may still write."""
        slots = [sequence.slot]
        held = {
            PageClass.FULL: (self._pools.full, sequence.pages),
            PageClass.SWA: (self._pools.swa, self.window.drop(sequence)),
            PageClass.STATE: (self._pools.slots, slots),
        }
        busy = self._by_class(unsettled)
        for page_class, (allocator, items) in held.items():
            allocator.quarantine(busy[page_class])
            self.quarantined_total += len(busy[page_class])
            allocator.release(item for item in items if item not in busy[page_class])

    def settle(self, places: Iterable[Place]) -> None:
        """These items' reads have settled after their sequence left."""
        settled = self._by_class(places)
        self._pools.full.settle(settled[PageClass.FULL])
        self._pools.swa.settle(settled[PageClass.SWA])
        self._pools.slots.settle(settled[PageClass.STATE])

    def _by_class(self, places: Iterable[Place]) -> dict[PageClass, dict[int, None]]:
        """Items by class, in order; a STATE item is half a request slot and counts as the slot."""
        found: dict[PageClass, dict[int, None]] = {cls: {} for cls in PageClass}
        for page_class, item in places:
            found[page_class][item // 2 if page_class is PageClass.STATE else item] = None
        return found

    def _full_pages(self, request: StartRequest) -> int:
        return num_pages(len(request.prompt) + request.sampling.max_tokens)
