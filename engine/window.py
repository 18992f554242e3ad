"""SWA pages of the sequences one worker holds: mapped just ahead of the computation, released behind the
window.

Window pages weigh eight times as much as full pages, so a sequence keeps only those its next token can still
see.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.batch import Sequence
from engine.cache.pools import PageAllocator
from engine.config import WINDOW
from wire.types import PAGE_TOKENS


def num_pages(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens from position 0 on."""
    return -(-num_tokens // PAGE_TOKENS)


def first_window_page(length: int) -> int:
    """Index of the first page a sequence of `length` tokens still needs in the window.

    One token more than the next position sees is kept: the draft layer looks back from position length - 1.
    Owner and reader both use this, so they agree on which pages travel.
    """
    return max(0, length - WINDOW) // PAGE_TOKENS


def most_window_pages(step_tokens: int) -> int:
    """The most SWA pages a sequence can have mapped while a step of `step_tokens` tokens runs."""
    return (step_tokens + WINDOW - 2) // PAGE_TOKENS + 2


class WindowPages:
    """One budget of SWA pages for many sequences.

    A sequence reserves the most it will ever hold at once, mapped here or leased from a prefix cache, so mapping ahead
    cannot fail half way through a prompt. Sequences are told apart by their request slot.

    reclaim  frees so many pages that are in use but needed by no sequence: a prefix cache's. Nobody else may take
             pages from this pool.
    """

    def __init__(self, allocator: PageAllocator, reclaim: Callable[[int], object] | None = None) -> None:
        self._allocator = allocator
        self._reclaim = reclaim
        self._reserved: dict[int, int] = {}  # request slot -> pages it may hold
        self._mapped: dict[int, set[int]] = {}  # request slot -> page indexes mapped here, not leased

    @property
    def available(self) -> int:
        """Pages promised to no sequence."""
        return self._allocator.capacity - self._allocator.counts().quarantined - sum(self._reserved.values())

    def reserve(self, sequence: Sequence, pages: int) -> None:
        assert pages <= self.available, f"{pages} window pages reserved, {self.available} available"
        assert sequence.slot not in self._reserved, f"slot {sequence.slot} reserves twice"
        self._reserved[sequence.slot] = pages
        self._mapped[sequence.slot] = set()

    def cover(self, sequence: Sequence, start: int, end: int) -> None:
        """Map every page that holds a position in [start, end)."""
        pages, mapped = sequence.swa_pages, self._mapped[sequence.slot]
        pages.extend([0] * (num_pages(end) - len(pages)))
        missing = [j for j in range(start // PAGE_TOKENS, num_pages(end)) if pages[j] == 0]
        mapped.update(missing)
        assert len(mapped) <= self._reserved[sequence.slot], (
            f"slot {sequence.slot} maps {len(mapped)} window pages of {self._reserved[sequence.slot]} reserved"
        )
        shortage = len(missing) - self._allocator.free
        if shortage > 0 and self._reclaim is not None:
            self._reclaim(shortage)
        for j, item in zip(missing, self._allocator.allocate(len(missing)), strict=True):
            pages[j] = item

    def trim(self, sequence: Sequence) -> None:
        """Release the pages wholly behind the window of the sequence's present length, and forget leased ones."""
        pages = sequence.swa_pages
        # Behind a page released earlier everything is released: walk back from the window's edge to the first
        # gap.
        j = min(first_window_page(sequence.length), len(pages)) - 1
        while j >= 0 and pages[j]:
            self.release(sequence, j)
            pages[j] = 0
            j -= 1

    def mapped(self, sequence: Sequence) -> list[int]:
        """Indexes of the pages mapped here, ascending."""
        return sorted(self._mapped[sequence.slot])

    def take(self, sequence: Sequence, page: int) -> int:
        """Hand a mapped page's item over to the caller; the sequence goes on seeing it."""
        self._mapped[sequence.slot].remove(page)
        return sequence.swa_pages[page]

    def release(self, sequence: Sequence, page: int) -> None:
        """Release one page if it is mapped here; what the sequence sees there is the caller's to say."""
        if page in self._mapped[sequence.slot]:
            self._allocator.release([self.take(sequence, page)])

    def keep_mapped(self, sequence: Sequence, leased: int = 0) -> None:
        """Shrink the reservation to what is mapped now, and leased: this sequence will not grow."""
        self._reserved[sequence.slot] = len(self._mapped[sequence.slot]) + leased

    def drop(self, sequence: Sequence) -> list[int]:
        """End the reservation; the items still mapped here, for the caller to release or quarantine."""
        del self._reserved[sequence.slot]
        return [sequence.swa_pages[j] for j in sorted(self._mapped.pop(sequence.slot))]
