"""The physical pools: which item is whose, and the tensors behind them.

A page of 256 tokens lives in three places. Its FULL item holds the compressed rows (C4, C4 index, C128), its SWA
item the window rows of every layer and both C4 rings, and a request slot's C128 rings make two STATE items. Virtual
slots have no memory of their own: a token at position p of a sequence sits in FULL item pages[p // 256] and in SWA
item swa_pages[p // 256], at offset p % 256, and every row address follows by division. Item 0 of every pool is a sink.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import C4_RATIO, C4_RING, C128_RATIO, C128_RING, EngineConfig, KvLayout, ModelConfig
from engine.kernels.checksum import item_checksums
from engine.kernels.rows import RowPool
from wire.errors import ConfigError
from wire.types import PAGE_TOKENS, PageClass, Region, RegionClass

LAYOUT_VERSION = 2
"""Moves when bytes inside an item change meaning; part of the layout signature."""

STATE_ROWS = 128
"""Raw rows in one STATE item: a request slot's ring of 256 is two items."""


class OutOfPages(Exception):
    """An allocator has fewer free items than asked for; nothing was taken."""


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Items of one pool. Of those in use a prefix cache may own some, which are evictable or protected by a lease."""

    free: int
    used: int
    quarantined: int
    evictable: int = 0
    protected: int = 0


class PageAllocator:
    """Ids of one pool. Every item is free, used or quarantined; an item's generation moves on when it is freed.

    A quarantined item has no owner and may still be written by an unsettled read; `settle` frees it.
    """

    def __init__(self, num_items: int) -> None:
        self.capacity = num_items - 1
        # Popped from the end, so that a fresh pool hands out 1, 2, 3, ... and neighbours travel together.
        self._free = list(range(num_items - 1, 0, -1))
        self._generation = [0] * num_items
        self._used: set[int] = set()
        self._quarantined: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def counts(self) -> PoolCounts:
        return PoolCounts(free=len(self._free), used=len(self._used), quarantined=len(self._quarantined))

    def generation(self, item: int) -> int:
        return self._generation[item]

    def in_use(self, item: int) -> bool:
        return item in self._used

    def allocate(self, n: int) -> list[int]:
        """n items, all or nothing. Raises OutOfPages."""
        if n > len(self._free):
            raise OutOfPages(f"{n} items wanted, {len(self._free)} of {self.capacity} free")
        taken = [self._free.pop() for _ in range(n)]
        self._used.update(taken)
        return taken

    def release(self, items: Iterable[int]) -> None:
        for item in items:
            assert item in self._used, f"item {item} released but not in use"
            self._used.remove(item)
            self._give_back(item)

    def quarantine(self, items: Iterable[int]) -> None:
        for item in items:
            assert item in self._used, f"item {item} quarantined but not in use"
            self._used.remove(item)
            self._quarantined.add(item)

    def settle(self, items: Iterable[int]) -> None:
        for item in items:
            assert item in self._quarantined, f"item {item} settled but not quarantined"
            self._quarantined.remove(item)
            self._give_back(item)

    def _give_back(self, item: int) -> None:
        self._generation[item] += 1
        self._free.append(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """Items in each pool, sinks included."""

    full: int
    swa: int
    slots: int


def item_bytes(model: ModelConfig, layout: KvLayout) -> dict[PageClass, int]:
    """Bytes of one item of each class, over all layers."""
    return {cls: sum(size for _, size in regions) for cls, regions in _regions(model, layout).items()}


def _regions(model: ModelConfig, layout: KvLayout) -> dict[PageClass, list[tuple[str, int]]]:
    """(name, bytes of one item) of every region, in the order readers and owners share."""
    c4, c128 = model.layers_of(C4_RATIO), model.layers_of(C128_RATIO)

    def latent(rows: int) -> int:
        return RowPool.item_bytes_for(rows, "latent", layout, model.head_dim, model.rope_dim)

    index = RowPool.item_bytes_for(PAGE_TOKENS // C4_RATIO, "index", layout, model.index_head_dim, model.rope_dim)
    c4_ring, index_ring = (C4_RING * 4 * dim * 4 for dim in (model.head_dim, model.index_head_dim))
    # Also on a worker that does not run the draft layer, so that it pairs with one that does.
    draft = [("window.draft", latent(PAGE_TOKENS)), ("draft_state", 4 * draft_state_floats(model))]
    return {
        PageClass.FULL: [
            *((f"c4.{layer}", latent(PAGE_TOKENS // C4_RATIO)) for layer in c4),
            *((f"index.{layer}", index) for layer in c4),
            *((f"c128.{layer}", latent(PAGE_TOKENS // C128_RATIO)) for layer in c128),
        ],
        PageClass.SWA: [
            *((f"window.{layer}", latent(PAGE_TOKENS)) for layer in range(model.num_layers)),
            *((f"c4_ring.{layer}", c4_ring) for layer in c4),
            *((f"index_ring.{layer}", index_ring) for layer in c4),
            *(draft if model.draft_layer else []),
        ],
        PageClass.STATE: [(f"c128_ring.{layer}", STATE_ROWS * 2 * model.head_dim * 4) for layer in c128],
    }


def draft_state_floats(model: ModelConfig) -> int:
    """Float32 values of one SWA item's `draft_state`: four numbers, then the residual streams of one token."""
    return 4 + model.hc_mult * model.hidden_size


def plan_sizes(model: ModelConfig, config: EngineConfig) -> PoolSizes:
    """Split the memory budget: slots and windows for every request first, full pages with the rest.

    A request holds at most three SWA pages while decoding (its window crosses one boundary and the next page is
    being filled); prefill adds the pages of the chunk in flight, which the slack of one page per request covers
    together with the requests that are not at their peak.
    """
    sizes = item_bytes(model, config.kv_layout)
    slots = config.max_requests + 1
    swa = 4 * config.max_requests + 1
    fixed = slots * 2 * sizes[PageClass.STATE] + swa * sizes[PageClass.SWA]
    full_bytes = max(sizes[PageClass.FULL], 1)
    full = (config.kv_memory_bytes - fixed) // full_bytes
    if full < 2:
        raise ConfigError(
            f"kv_memory_bytes={config.kv_memory_bytes} leaves no full page: windows and rings of "
            f"max_requests={config.max_requests} alone take {fixed} bytes. "
            f"Give at least {fixed + 16 * full_bytes} bytes or lower max_requests."
        )
    # A model with no compressed layers needs page ids but no bytes behind them.
    return PoolSizes(full=min(full, 1 << 24), swa=swa, slots=slots)


class KvPools:
    """Every pool of one worker: allocators, tensors, and the regions a transport registers.

    `classes` are those this model has bytes for: what a transport registers and what moves. `memory` is the kind they
    lie in, as transports call it: DRAM or VRAM.
    """

    def __init__(self, model: ModelConfig, layout: KvLayout, sizes: PoolSizes, fingerprint: str, device: str) -> None:
        self.layout = layout
        self.memory = "DRAM" if device == "cpu" else "VRAM"
        self.full = PageAllocator(sizes.full)
        self.swa = PageAllocator(sizes.swa)
        self.slots = PageAllocator(sizes.slots)
        counts = {PageClass.FULL: sizes.full, PageClass.SWA: sizes.swa, PageClass.STATE: 2 * sizes.slots}
        named = _regions(model, layout)
        self._moved: dict[PageClass, list[tuple[str, Tensor]]] = {}  # regions as they move: [items, bytes] uint8 each
        self._by_name: dict[str, Tensor] = {}
        classes = []
        for cls, regions in named.items():
            n, total = counts[cls], sum(size for _, size in regions)
            memory = _zeroed(total * n, device)
            # A prompt is thousands of FULL pages and one or two of the others. Every layer's rows of a FULL page lie
            # side by side, so that a page moves as one range whatever its neighbours are.
            whole = cls is PageClass.FULL
            offset = 0
            for name, size in regions:
                if whole:
                    self._by_name[name] = memory.view(n, total)[:, offset : offset + size]
                    offset += size
                else:
                    self._by_name[name] = memory[offset : offset + n * size].view(n, size)
                    offset += n * size
            if not regions:
                moved = []  # no C128 layers, so no state; or no compressed rows at all
            elif whole:
                moved = [("page", memory.view(n, total))]
            else:
                moved = [(name, self._by_name[name]) for name, _ in regions]
            self._moved[cls] = moved
            if moved:
                parts = tuple(
                    Region(name=name, address=tensor.data_ptr(), item_bytes=tensor.shape[1], num_items=n)
                    for name, tensor in moved
                )
                classes.append(RegionClass(name=cls, regions=parts))
        self.classes = tuple(classes)
        described = {
            "version": LAYOUT_VERSION,
            "layout": layout,
            "page_tokens": PAGE_TOKENS,
            "model": fingerprint,
            "regions": {str(cls): regions for cls, regions in named.items()},
        }
        self.signature = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

        def rows(name: str, per_item: int, kind: str, dim: int) -> RowPool:
            return RowPool(
                data=self._by_name[name],
                rows_per_item=per_item,
                kind=kind,  # type: ignore[arg-type]
                layout=layout,
                dim=dim,
                rope_dim=model.rope_dim,
            )

        c4, c128 = model.layers_of(C4_RATIO), model.layers_of(C128_RATIO)
        head, index = model.head_dim, model.index_head_dim
        self.window = {n: rows(f"window.{n}", PAGE_TOKENS, "latent", head) for n in range(model.num_layers)}
        self.draft_state: Tensor | None = None  # [items, 4 + 4D] float32; engine/model/mtp.py says what
        if model.draft_layer:
            # The draft layer counts as the one above the last.
            self.window[model.num_layers] = rows("window.draft", PAGE_TOKENS, "latent", head)
            self.draft_state = self._floats("draft_state")
        self.c4 = {n: rows(f"c4.{n}", PAGE_TOKENS // C4_RATIO, "latent", head) for n in c4}
        self.index = {n: rows(f"index.{n}", PAGE_TOKENS // C4_RATIO, "index", index) for n in c4}
        self.c128 = {n: rows(f"c128.{n}", PAGE_TOKENS // C128_RATIO, "latent", head) for n in c128}
        self.c4_ring = {n: self._floats(f"c4_ring.{n}").view(sizes.swa, C4_RING, 4 * head) for n in c4}
        self.index_ring = {n: self._floats(f"index_ring.{n}").view(sizes.swa, C4_RING, 4 * index) for n in c4}
        self.c128_ring = {n: self._floats(f"c128_ring.{n}").view(sizes.slots, C128_RING, 2 * head) for n in c128}

    def _floats(self, name: str) -> Tensor:
        return self._by_name[name].view(torch.float32)

    def export_pages(self, page_class: PageClass, items: Sequence[int]) -> list[int]:
        """Checksums of the bytes now at these items: what a reader, a host tier or a resumed request compares with.

        The bytes themselves move by whatever reaches this memory; this pair only says what they must be.
        """
        moved = [tensor for _, tensor in self._moved[page_class]]
        return item_checksums(moved, items) if moved else [0] * len(items)

    def import_pages(self, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]:
        """Items among `items` whose bytes are not the exported ones. An empty list means all may be used."""
        found = self.export_pages(page_class, items)
        return [item for item, ours, theirs in zip(items, found, checksums, strict=True) if ours != theirs]

    def scribble(self, page_class: PageClass, items: Sequence[int]) -> None:
        """Overwrite these items with bytes that mean nothing, other ones in each: what reads are measured on."""
        noise = torch.Generator().manual_seed(0)
        for _, tensor in self._moved[page_class]:
            row = torch.randint(0, 256, (tensor.shape[1],), generator=noise, dtype=torch.uint8).to(tensor.device)
            for item in items:
                # Turned by another number of words each, so that no two pages have one checksum.
                tensor[item].copy_(row.roll(8 * item))

    def copy_out(self, page_class: PageClass, items: Sequence[int]) -> Tensor:
        """The bytes now at these items, in host memory. [len(items), bytes of one item] uint8, regions in order."""
        tensors = [tensor for _, tensor in self._moved[page_class]]
        rows = torch.empty(len(items), sum(tensor.shape[1] for tensor in tensors), dtype=torch.uint8)
        # Item by item: an item's part of a region is one range, and gathering many would need room for them twice.
        for item, row in zip(items, rows, strict=True):
            for tensor, part in zip(tensors, row.split([tensor.shape[1] for tensor in tensors]), strict=True):
                part.copy_(tensor[item])
        return rows

    def copy_in(self, page_class: PageClass, items: Sequence[int], rows: Tensor) -> None:
        """Write what `copy_out` returned, row i to items[i]."""
        tensors = [tensor for _, tensor in self._moved[page_class]]
        expected = (len(items), sum(tensor.shape[1] for tensor in tensors))
        assert tuple(rows.shape) == expected, f"{page_class} rows of shape {tuple(rows.shape)}, expected {expected}"
        for item, row in zip(items, rows, strict=True):
            for tensor, part in zip(tensors, row.split([tensor.shape[1] for tensor in tensors]), strict=True):
                tensor[item].copy_(part)


def _zeroed(num_bytes: int, device: str) -> Tensor:
    """Zeros, so that rows nobody wrote decode to finite values. [num_bytes] uint8.

    On a CPU it is mapped rather than allocated: the kernel hands out pages of it as they are first written, so an idle
    worker's pools cost no memory (torch.zeros would write all of it at once).
    """
    if device != "cpu" or num_bytes == 0:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def state_item(slot: int, num_tokens: int) -> int | None:
    """The STATE item holding the open C128 block after `num_tokens` tokens; None when no block is open."""
    if num_tokens % C128_RATIO == 0:
        return None
    return 2 * slot + ((num_tokens - 1) % C128_RING) // STATE_ROWS
