"""Room for requests on a decode worker: what a request needs now, one page more each time it has filled one, and
everything back when it leaves, whatever happened.

Prompts say how long they are, answers do not. So a request comes in with the pages of its tokens, while some pages
stay free for those already in to grow; when that was not enough, the scheduler has somebody make room.

Full pages outlive their request: prompts and answers stay in a prefix tree until their room is needed, and a request
that begins with the same tokens uses them where they are. The tree here holds no windows. A window serves to resume
computing behind it, which is prefill's work, and its owner sends the one behind the prompt anyway.

A page that a read may still write is not free when its request is gone. It is quarantined, and comes back
when the reader says that the read has settled.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Sequence
from engine.cache.pools import PageAllocator, state_item
from engine.cache.shadow_radix import Lease, ShadowRadix
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


@dataclass(slots=True)
class _Inside:
    """A request that holds places: its first pages through a lease, the others for itself."""

    sequence: Sequence
    most_pages: int
    lease: Lease


class Admission:
    """Gives requests their places and takes them back."""

    def __init__(self, pools: Pools, growth_tokens: int) -> None:
        self._pools = pools
        self._growth_pages = num_pages(growth_tokens)
        self._inside: dict[int, _Inside] = {}  # by request slot
        self.cache = ShadowRadix(pools.full, pools.swa)
        self.window = WindowPages(pools.swa)
        self._borrowed: dict[str, list[int]] = {}  # full pages that reads are measured with, by probe
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

    @property
    def free_pages(self) -> int:
        """Full pages that nobody holds, those of resident prefixes included."""
        counts = self.cache.counts(PageClass.FULL)
        return counts.free + counts.evictable

    def admit(
        self, request: StartRequest, num_tokens: int, digests: Items[bytes], *, computed: bool = True
    ) -> tuple[Sequence, int] | None:
        """Places for the request's first `num_tokens` tokens: full pages, the window before the next one, and a
        slot; and how many pages, of those that `digests` name, are resident and need not be fetched. Or None.

        The next token has its page as well. So whoever is let in, or let in again, says at least one more word before
        it can be asked to make room: requests that take turns all get ahead.
        Behind its pages a request finds room to grow, unless it has the worker to itself and needs nobody's leave.
        Tokens that are not `computed` anywhere yet have no window: whoever computes them maps it as they go.
        """
        pools, most = self._pools, _most_pages(request)
        total, window = num_pages(num_tokens + 1), most_window_pages(1)
        if self.window.available < window or not pools.slots.free:
            return None
        growth = sum(self._growth_of(len(one.sequence.pages), one.most_pages) for one in self._inside.values())
        if self._inside:
            growth += self._growth_of(total, most)
        lease = self.cache.lease(digests, window=False)
        resident = lease.pages
        if self.free_pages < total - resident + growth:
            lease.release()
            return None
        sequence = Sequence(
            request_id=request.request_id,
            sampling=request.sampling,
            slot=pools.slots.allocate(1)[0],
            pages=lease.items() + self._allocate(total - resident),
            prompt=request.prompt,
        )
        self._inside[sequence.slot] = _Inside(sequence, most, lease)
        self.window.reserve(sequence, window)
        if computed:
            self.window.cover(sequence, first_window_page(num_tokens) * PAGE_TOKENS, num_tokens)
        return sequence, resident

    def grow(self, sequence: Sequence, position: int) -> bool:
        """See to full pages up to the one of `position`; False when there are none."""
        missing = num_pages(1 + position) - len(sequence.pages)
        if missing > 0:
            if self.free_pages < missing:
                return False
            sequence.pages += self._allocate(missing)
        return True

    def share(self, sequence: Sequence, digests: Items[bytes]) -> None:
        """Let others that begin with the same tokens use the sequence's first pages: complete ones, and verified."""
        inside, n = self._inside[sequence.slot], len(digests)
        self.cache.insert(digests, sequence.pages[:n], lease=inside.lease)
        sequence.pages[:n] = inside.lease.items()

    def leave(self, sequence: Sequence, unsettled: Iterable[Place] = (), *, trusted: bool = True) -> None:
        """Everything back. `unsettled` are those of the sequence's items that a read may still write; prefixes that
        are not `trusted` are forgotten.
        """
        lease = self._inside.pop(sequence.slot).lease
        slots = [sequence.slot]
        held = {
            PageClass.FULL: (self._pools.full, sequence.pages[lease.pages :]),
            PageClass.SWA: (self._pools.swa, self.window.drop(sequence)),
            PageClass.STATE: (self._pools.slots, slots),
        }
        busy = self._by_class(unsettled)
        for page_class, (allocator, items) in held.items():
            allocator.quarantine(busy[page_class])
            self.quarantined_total += len(busy[page_class])
            allocator.release(item for item in items if item not in busy[page_class])
        if trusted:
            lease.release()
        else:
            self.cache.discard(lease)

    def borrow(self, probe_id: str, num_pages: int) -> tuple[int, ...]:
        """Full pages to measure reads with: none that a request holds or may grow into, and one in eight at most. Fewer
        than asked for, or none.
        """
        growth = sum(self._growth_of(len(one.sequence.pages), one.most_pages) for one in self._inside.values())
        lent = sum(map(len, self._borrowed.values()))
        spare = min(num_pages, self._pools.full.capacity // 8 - lent, self.free_pages - growth)
        if spare < 1:
            return ()
        self._borrowed[probe_id] = self._allocate(spare)
        return tuple(self._borrowed[probe_id])

    def give_back(self, probe_id: str, unsettled: Iterable[Place]) -> None:
        """Idempotent: what is not known any more has been given back."""
        if (items := self._borrowed.pop(probe_id, None)) is None:
            return
        busy = self._by_class(unsettled)[PageClass.FULL]
        self._pools.full.quarantine(busy)
        self.quarantined_total += len(busy)
        self._pools.full.release(item for item in items if item not in busy)

    def settle(self, places: Iterable[Place]) -> None:
        """These items' reads have settled after their sequence left."""
        settled = self._by_class(places)
        self._pools.full.settle(settled[PageClass.FULL])
        self._pools.swa.settle(settled[PageClass.SWA])
        self._pools.slots.settle(settled[PageClass.STATE])

    def _allocate(self, num_pages: int) -> list[int]:
        """Full pages, at the expense of prefixes that nobody has used for longest."""
        if (missing := num_pages - self._pools.full.free) > 0:
            self.cache.evict(PageClass.FULL, missing)
        return self._pools.full.allocate(num_pages)

    def _growth_of(self, pages: int, most_pages: int) -> int:
        """Pages kept free for a sequence of so many to grow into."""
        return max(0, min(self._growth_pages, most_pages - pages))

    def _by_class(self, places: Iterable[Place]) -> dict[PageClass, dict[int, None]]:
        """Items by class, in order; a STATE item is half a request slot and counts as the slot."""
        found: dict[PageClass, dict[int, None]] = {cls: {} for cls in PageClass}
        for page_class, item in places:
            found[page_class][item // 2 if page_class is PageClass.STATE else item] = None
        return found


def has_room(sequence: Sequence, position: int | None = None) -> bool:
    """Whether the sequence has a full page for its next token, or the one at `position`."""
    return len(sequence.pages) * PAGE_TOKENS > (sequence.length if position is None else position)


def _most_pages(request: StartRequest) -> int:
    return num_pages(len(request.prompt) + request.sampling.max_tokens)
