"""SWA pages of the sequences one worker holds: mapped just ahead of the computation, released behind the
window.

Window pages weigh eight times as much as full pages, so a sequence keeps only those its next token can still
see.
"""

from __future__ import annotations

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

    A sequence reserves the most it will ever map at once, so mapping ahead cannot fail half way through a
    prompt. Sequences are told apart by their request slot.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._reserved: dict[int, int] = {}  # request slot -> pages it may have mapped
        self._mapped: dict[int, int] = {}

    @property
    def available(self) -> int:
        """Pages neither in use nor promised to a sequence."""
        promised = sum(self._reserved.values()) - sum(self._mapped.values())
        return self._allocator.free - promised

    def reserve(self, sequence: Sequence, pages: int) -> None:
        assert pages <= self.available, f"{pages} window pages reserved, {self.available} available"
        assert sequence.slot not in self._reserved, f"slot {sequence.slot} reserves twice"
        self._reserved[sequence.slot] = pages
        self._mapped[sequence.slot] = 0

    def cover(self, sequence: Sequence, start: int, end: int) -> None:
        """Map every page that holds a position in [start, end)."""
        pages = sequence.swa_pages
        pages.extend([0] * (num_pages(end) - len(pages)))
        missing = [j for j in range(start // PAGE_TOKENS, num_pages(end)) if pages[j] == 0]
        self._mapped[sequence.slot] += len(missing)
        assert self._mapped[sequence.slot] <= self._reserved[sequence.slot], (
            f"slot {sequence.slot} maps {self._mapped[sequence.slot]} window pages of "
            f"{self._reserved[sequence.slot]} reserved"
        )
        for j, item in zip(missing, self._allocator.allocate(len(missing)), strict=True):
            pages[j] = item

    def trim(self, sequence: Sequence) -> None:
        """Release the pages wholly behind the window of the sequence's present length."""
        pages = sequence.swa_pages
        # Behind a page released earlier everything is released: walk back from the window's edge to the first
        # gap.
        j = min(first_window_page(sequence.length), len(pages)) - 1
        while j >= 0 and pages[j]:
            self._allocator.release([pages[j]])
            self._mapped[sequence.slot] -= 1
            pages[j] = 0
            j -= 1

    def keep_mapped(self, sequence: Sequence) -> None:
        """Shrink the reservation to what is mapped now: this sequence will not grow."""
        self._reserved[sequence.slot] = self._mapped[sequence.slot]

    def drop(self, sequence: Sequence) -> list[int]:
        """End the reservation; the items still mapped, for the caller to release or quarantine."""
        del self._reserved[sequence.slot], self._mapped[sequence.slot]
        return [item for item in sequence.swa_pages if item]
