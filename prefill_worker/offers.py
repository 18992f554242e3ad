"""What one prompt offers its reader: finished pages after each chunk; the window, the open rows and the tail
last.

Compressed rows of whole pages never change again, so they may travel while later chunks are computed. The
last, ragged page, the window pages and the request's own C128 rows are only right at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Protocol

from engine.batch import Sequence
from engine.cache.pools import PageAllocator, state_item
from engine.window import first_window_page, num_pages
from wire.types import PAGE_TOKENS, PageClass, PageGroup, RegionClass, Tail, TokenEvent


class Pools(Protocol):
    """What the prefill core needs of `engine.cache.pools.KvPools`."""

    full: PageAllocator
    swa: PageAllocator
    slots: PageAllocator
    classes: tuple[RegionClass, ...]

    def export_pages(self, page_class: PageClass, items: Items[int]) -> list[int]: ...

    def scribble(self, page_class: PageClass, items: Items[int]) -> None: ...


class PageChecksums:
    """Checksums of FULL pages as they were when first offered, for as long as each page lives.

    Taken again at every offer, a checksum would vouch for whatever a cached page has become meanwhile.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._kept: dict[int, tuple[int, int]] = {}  # item -> (generation, checksum)

    def of(self, items: Items[int]) -> tuple[int, ...]:
        """The checksums to offer: kept ones, or for pages offered for the first time those of their bytes now."""
        fresh = [item for item in items if self._known(item) is None]
        for item, checksum in zip(fresh, self._pools.export_pages(PageClass.FULL, fresh), strict=True):
            self._kept[item] = (self._pools.full.generation(item), checksum)
        return tuple(self._kept[item][1] for item in items)

    def changed(self, items: Items[int]) -> bool:
        """Whether any of these pages no longer holds the bytes it was offered with."""
        known = [item for item in items if self._known(item) is not None]
        found = self._pools.export_pages(PageClass.FULL, known)
        return any(checksum != self._known(item) for item, checksum in zip(known, found, strict=True))

    def _known(self, item: int) -> int | None:
        generation, checksum = self._kept.get(item, (-1, 0))
        return checksum if generation == self._pools.full.generation(item) else None


class Offers:
    """Offers of one run from page `skip // 256` on: each full page once, each window page and open row once.

    Classes without regions have no bytes to move and are never offered.
    """

    def __init__(
        self, pools: Pools, checksums: PageChecksums, sequence: Sequence, prompt_tokens: int, skip: int
    ) -> None:
        self._pools = pools
        self._checksums = checksums
        self._sequence = sequence
        self._prompt_tokens = prompt_tokens
        self._next_page = skip // PAGE_TOKENS
        self._moving = {cls.name for cls in pools.classes if cls.regions}
        self._total = 0
        self._closing: tuple[PageGroup, ...] = ()
        self._tail: Tail | None = None

    def ready(self, num_pages: int) -> tuple[PageGroup, ...]:
        """Full pages not offered yet of the first `num_pages`, which have all their rows."""
        return self._full(num_pages)

    def last(self, first: TokenEvent, cached_tokens: int) -> tuple[tuple[PageGroup, ...], Tail]:
        """Everything else, with the first token. The whole prompt has been computed."""
        n, sequence = self._prompt_tokens, self._sequence
        window = range(first_window_page(n), num_pages(n))
        open_rows = state_item(sequence.slot, n)
        groups = self._full(num_pages(n))
        closing = self._group(PageClass.SWA, sequence.swa_pages, self._pools.swa, window)
        if open_rows is not None and PageClass.STATE in self._moving:
            # One slot, two items: the slot's generation stands for both.
            closing += (
                PageGroup(
                    page_class=PageClass.STATE,
                    positions=(num_pages(n) - 1,),
                    items=(open_rows,),
                    generations=(self._pools.slots.generation(sequence.slot),),
                    checksums=tuple(self._pools.export_pages(PageClass.STATE, [open_rows])),
                ),
            )
            self._total += 1
        self._closing = closing
        self._tail = Tail(prompt_tokens=n, cached_tokens=cached_tokens, first=first, total_pages=self._total)
        return groups + closing, self._tail

    @property
    def closed(self) -> bool:
        """The last offer has been made."""
        return self._tail is not None

    def again(self, skip: int) -> tuple[Offers, tuple[PageGroup, ...], Tail]:
        """For another reader, which holds what is before token `skip`: the same pages in one offer, with the checksums
        they were first offered with.
        """
        assert self._tail is not None, "only what has been offered can be offered again"
        offers = Offers(self._pools, self._checksums, self._sequence, self._prompt_tokens, skip)
        groups = offers._full(num_pages(self._prompt_tokens)) + self._closing
        offers._total += sum(len(group.items) for group in self._closing)
        offers._closing = self._closing
        offers._tail = replace(self._tail, cached_tokens=self._prompt_tokens, total_pages=offers._total)
        return offers, groups, offers._tail

    def _full(self, end: int) -> tuple[PageGroup, ...]:
        positions = range(self._next_page, end)
        self._next_page = max(self._next_page, end)
        return self._group(PageClass.FULL, self._sequence.pages, self._pools.full, positions)

    def _group(
        self, page_class: PageClass, pages: list[int], allocator: PageAllocator, positions: range
    ) -> tuple[PageGroup, ...]:
        if not positions or page_class not in self._moving:
            return ()
        items = pages[positions.start : positions.stop]
        assert all(items), f"{page_class} pages {positions} of {self._sequence.request_id} are not all mapped"
        self._total += len(items)
        if page_class is PageClass.FULL:
            checksums = self._checksums.of(items)
        else:
            checksums = tuple(self._pools.export_pages(page_class, items))
        return (
            PageGroup(
                page_class=page_class,
                positions=tuple(positions),
                items=tuple(items),
                generations=tuple(allocator.generation(item) for item in items),
                checksums=checksums,
            ),
        )
