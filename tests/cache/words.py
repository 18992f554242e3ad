from __future__ import annotations

from engine.cache.pools import PageAllocator
from engine.cache.shadow_radix import Lease, ShadowRadix
from wire.prefix import page_hashes
from wire.types import PAGE_TOKENS, PageClass


class Cache(ShadowRadix):
    """A tree with pools of its own, and prompts written as words: one letter a page."""

    def __init__(self, full: int = 64, swa: int = 16, retained_windows: int = 0) -> None:
        self.full, self.swa = PageAllocator(full + 1), PageAllocator(swa + 1)
        super().__init__(self.full, self.swa, retained_windows=retained_windows)

    def put(self, word: str, *windows: int, lease: Lease | None = None) -> Lease:
        """Insert a prompt with fresh pages, and fresh windows for the pages named."""
        held = lease.pages if lease is not None else 0
        pages = [0] * held + self.full.allocate(len(word) - held)
        items = dict(zip(windows, self.swa.allocate(len(windows)), strict=True))
        return self.insert(digests(word), pages, items, lease)

    def evictable(self, component: PageClass) -> int:
        return self.counts(component).evictable

    def protected(self, component: PageClass) -> int:
        return self.counts(component).protected


def digests(word: str, space: bytes = b"") -> list[bytes]:
    """Page digests as the router and the workers make them: each letter stands for a page of one token."""
    return page_hashes([ord(letter) for letter in word for _ in range(PAGE_TOKENS)], space)
