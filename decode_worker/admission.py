"""Room for requests on a decode worker: what a request needs now, one page more each time it has filled one, and
everything back when it leaves, whatever happened.

Prompts say how long they are, answers do not. So a request comes in with the pages of its tokens, while some pages
stay free for those already in to grow; when that was not enough, the scheduler has somebody make room.

A page that a read may still write is not free when its request is gone. It is quarantined, and comes back
when the reader says that the read has settled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.batch import Sequence
from engine.cache.pools import PageAllocator, state_item
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


def places_of(sequence: Sequence, num_tokens: int) -> dict[PageClass, dict[int, int]]:
    """Position -> item of everything that stands for the sequence's first `num_tokens` tokens.

    What a prompt of so many tokens brings from prefill, and what a preempted request takes to host memory: every
    full page, the window before the next token, and the open C128 block if there is one.
    """
    end = num_pages(num_tokens)
    open_rows = state_item(sequence.slot, num_tokens)
    return {
        PageClass.FULL: dict(enumerate(sequence.pages[:end])),
        PageClass.SWA: {j: sequence.swa_pages[j] for j in range(first_window_page(num_tokens), end)},
        PageClass.STATE: {} if open_rows is None else {end - 1: open_rows},
    }


class Admission:
    """Gives requests their places and takes them back."""

    def __init__(self, pools: Pools, growth_tokens: int) -> None:
        self._pools = pools
        self._growth_pages = num_pages(growth_tokens)
        self._inside: dict[int, tuple[Sequence, int]] = {}  # request slot -> sequence, the most pages it may need
        self.window = WindowPages(pools.swa)
        self.quarantined_total = 0

    def check(self, request: StartRequest) -> None:
        """Raises InvalidRequest for a request that could not run here even alone."""
        needed, capacity = _most_pages(request), self._pools.full.capacity
        if needed > capacity:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens and max_tokens={request.sampling.max_tokens} need {needed} "
                f"pages and this worker has {capacity} in all; lower max_tokens or shorten the prompt",
                param="max_tokens",
            )

    def admit(self, request: StartRequest, num_tokens: int) -> Sequence | None:
        """Places for the request's first `num_tokens` tokens: full pages, the window before the next one, and a
        slot; or None.

        Behind its pages a request finds room to grow, unless it has the worker to itself and needs nobody's leave.
        """
        pools, most = self._pools, _most_pages(request)
        now, window = num_pages(num_tokens), most_window_pages(1)
        growth = sum(self._growth_of(sequence, limit) for sequence, limit in self._inside.values())
        if self._inside:
            growth += min(self._growth_pages, most - now)
        if pools.full.free < now + growth or self.window.available < window or not pools.slots.free:
            return None
        sequence = Sequence(
            request_id=request.request_id,
            sampling=request.sampling,
            slot=pools.slots.allocate(1)[0],
            pages=pools.full.allocate(now),
        )
        self._inside[sequence.slot] = sequence, most
        self.window.reserve(sequence, window)
        self.window.cover(sequence, first_window_page(num_tokens) * PAGE_TOKENS, num_tokens)
        return sequence

    def grow(self, sequence: Sequence) -> bool:
        """See to a full page for the sequence's next token; False when there is none."""
        if not has_room(sequence):
            if not self._pools.full.free:
                return False
            sequence.pages += self._pools.full.allocate(1)
        return True

    def leave(self, sequence: Sequence, unsettled: Iterable[Place] = ()) -> None:
        """Everything back. `unsettled` are those of the sequence's items that a read may still write."""
        del self._inside[sequence.slot]
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

    def _growth_of(self, sequence: Sequence, limit: int) -> int:
        """Pages kept free for this sequence to grow into."""
        return min(self._growth_pages, limit - len(sequence.pages))

    def _by_class(self, places: Iterable[Place]) -> dict[PageClass, dict[int, None]]:
        """Items by class, in order; a STATE item is half a request slot and counts as the slot."""
        found: dict[PageClass, dict[int, None]] = {cls: {} for cls in PageClass}
        for page_class, item in places:
            found[page_class][item // 2 if page_class is PageClass.STATE else item] = None
        return found


def has_room(sequence: Sequence) -> bool:
    """Whether the sequence has a full page for its next token."""
    return len(sequence.pages) * PAGE_TOKENS > sequence.length


def _most_pages(request: StartRequest) -> int:
    return num_pages(len(request.prompt) + request.sampling.max_tokens)
