"""Who owns which item, how the memory budget is split, and what the layout signature tells apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.cache.pools import KvPools, OutOfPages, PageAllocator, PoolSizes, item_bytes, plan_sizes, state_item
from engine.config import EngineConfig
from tests.engine.geometries import tiny_config
from wire.errors import ConfigError
from wire.types import PageClass

PRODUCTION = {"head_dim": 512, "rope_dim": 64, "index_head_dim": 128}


class AllocatorAgainstSets(RuleBasedStateMachine):
    """A PageAllocator must behave like three disjoint sets and a counter per item."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(33)
        self.used: set[int] = set()
        self.quarantined: set[int] = set()
        self.generations = dict.fromkeys(range(1, 33), 0)

    @rule(n=st.integers(0, 40))
    def allocate(self, n: int) -> None:
        if n > 32 - len(self.used) - len(self.quarantined):
            with pytest.raises(OutOfPages):
                self.allocator.allocate(n)
            return
        items = self.allocator.allocate(n)
        assert len(set(items)) == n
        assert not set(items) & (self.used | self.quarantined | {0})
        self.used |= set(items)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        items = data.draw(st.sets(st.sampled_from(sorted(self.used)))) if self.used else set()
        self.allocator.release(items)
        self.used -= items
        for item in items:
            self.generations[item] += 1

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        items = data.draw(st.sets(st.sampled_from(sorted(self.used)))) if self.used else set()
        self.allocator.quarantine(items)
        self.used -= items
        self.quarantined |= items

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        items = data.draw(st.sets(st.sampled_from(sorted(self.quarantined)))) if self.quarantined else set()
        self.allocator.settle(items)
        self.quarantined -= items
        for item in items:
            self.generations[item] += 1

    @invariant()
    def every_item_has_one_state_and_its_generation(self) -> None:
        counts = self.allocator.counts()
        assert (counts.used, counts.quarantined) == (len(self.used), len(self.quarantined))
        assert counts.free + counts.used + counts.quarantined == 32
        assert {item: self.allocator.generation(item) for item in self.generations} == self.generations


TestAllocatorAgainstSets = AllocatorAgainstSets.TestCase


def test_an_item_cannot_be_released_twice() -> None:
    allocator = PageAllocator(4)
    items = allocator.allocate(2)
    allocator.release(items)
    with pytest.raises(AssertionError, match="not in use"):
        allocator.release(items)


def test_packed_items_have_production_bytes() -> None:
    config = tiny_config(0, "all", **PRODUCTION)  # layers 0, 4, 128, 4, 128, 0
    sizes = item_bytes(config, "v4")
    assert sizes[PageClass.FULL] == 2 * (37_440 + 8_448) + 2 * 1_728
    assert sizes[PageClass.SWA] == 6 * 149_760 + 2 * (131_072 + 32_768)
    assert sizes[PageClass.STATE] == 2 * 128 * 4_096


def test_pools_fill_the_budget_and_not_more() -> None:
    config = tiny_config(0, "all", **PRODUCTION)
    budget = 64 << 20
    engine = EngineConfig(model=Path(), kv_memory_bytes=budget, max_requests=4)
    sizes, each = plan_sizes(config, engine), item_bytes(config, "v4")
    used = sizes.full * each[PageClass.FULL] + sizes.swa * each[PageClass.SWA] + 2 * sizes.slots * each[PageClass.STATE]
    assert used <= budget < used + each[PageClass.FULL]


def test_a_budget_without_room_for_a_page_is_refused_with_the_bytes_it_needs() -> None:
    config = tiny_config(0, "all", **PRODUCTION)
    with pytest.raises(ConfigError, match=r"kv_memory_bytes=1048576 leaves no full page.*Give at least \d+ bytes"):
        plan_sizes(config, EngineConfig(model=Path(), kv_memory_bytes=1 << 20, max_requests=8))


def test_regions_cover_each_class_without_overlap() -> None:
    pools = KvPools(tiny_config(0, "flash"), "exact", PoolSizes(full=3, swa=4, slots=2), "f", "cpu")
    counts = {PageClass.FULL: 3, PageClass.SWA: 4, PageClass.STATE: 4}
    for group in pools.classes:
        ranges = sorted((r.address, r.address + r.item_bytes * r.num_items) for r in group.regions)
        assert all(r.num_items == counts[group.name] for r in group.regions)
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_a_class_without_bytes_does_not_move() -> None:
    pools = KvPools(tiny_config(0, "c4"), "exact", PoolSizes(full=3, swa=3, slots=2), "f", "cpu")
    assert [group.name for group in pools.classes] == [PageClass.FULL, PageClass.SWA]


def test_the_signature_tells_layouts_and_checkpoints_apart_but_not_pool_sizes() -> None:
    config, small, large = (
        tiny_config(0, "pro", **PRODUCTION),
        PoolSizes(full=2, swa=2, slots=2),
        PoolSizes(full=5, swa=3, slots=4),
    )
    base = KvPools(config, "v4", small, "a", "cpu").signature
    assert KvPools(config, "v4", large, "a", "cpu").signature == base
    assert KvPools(config, "exact", small, "a", "cpu").signature != base
    assert KvPools(config, "v4", small, "b", "cpu").signature != base


def test_imported_pages_are_those_whose_bytes_match() -> None:
    config = tiny_config(0, "flash")
    source, target = (KvPools(config, "exact", PoolSizes(full=6, swa=2, slots=2), "f", "cpu") for _ in range(2))
    for pool in (*source.c4.values(), *source.index.values(), *source.c128.values()):
        pool.data.random_(generator=torch.Generator().manual_seed(pool.data.shape[1]))
    checksums = source.export_pages(PageClass.FULL, [1, 2, 3])
    assert len(set(checksums)) == 3
    for ours, theirs in ((target.c4, source.c4), (target.index, source.index), (target.c128, source.c128)):
        for layer in ours:
            ours[layer].data[[4, 5, 1]] = theirs[layer].data[[1, 2, 3]]
    assert target.import_pages(PageClass.FULL, [4, 5, 1], checksums) == []
    target.c128[3].data[5, 17] ^= 1
    assert target.import_pages(PageClass.FULL, [4, 5, 1], checksums) == [5]


@pytest.mark.parametrize(
    ("slot", "tokens", "item"),
    [(3, 128, None), (3, 512, None), (3, 1, 6), (3, 127, 6), (3, 129, 7), (3, 255, 7), (1, 257, 2)],
)
def test_the_open_c128_block_lies_in_one_state_item(slot: int, tokens: int, item: int | None) -> None:
    assert state_item(slot, tokens) == item


def test_scribbled_pages_hold_nothing_of_before_and_no_two_are_alike() -> None:
    pools = KvPools(tiny_config(0, "flash"), "exact", PoolSizes(full=7, swa=2, slots=2), "f", "cpu")
    items = pools.full.allocate(4)
    before = pools.export_pages(PageClass.FULL, items)
    untouched = pools.export_pages(PageClass.FULL, [5])
    pools.scribble(PageClass.FULL, items)
    after = pools.export_pages(PageClass.FULL, items)
    assert len(set(after)) == 4
    assert not set(after) & set(before)
    assert pools.export_pages(PageClass.FULL, [5]) == untouched
