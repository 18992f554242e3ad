"""Pairing offered pages with our own items: values, slices, order, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.plan import check_congruent, item_bytes, num_items, plan
from wire.errors import LayoutMismatch, TransferFailed
from wire.types import PageClass, PageGroup, Region, RegionClass

FULL, SWA = PageClass.FULL, PageClass.SWA


def classes(num_items: int) -> tuple[RegionClass, ...]:
    region = lambda name, size: Region(  # noqa: E731
        name=name, address=4096, item_bytes=size, num_items=num_items
    )
    return (
        RegionClass(name=FULL, regions=(region("c4", 100), region("c128", 20))),
        RegionClass(name=SWA, regions=(region("swa", 300),)),
    )


def group(page_class: PageClass, positions: list[int], items: list[int]) -> PageGroup:
    return PageGroup(
        page_class=page_class,
        positions=tuple(positions),
        items=tuple(items),
        generations=(1,) * len(items),
        checksums=tuple(1000 + item for item in items),
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(100, 2_000), st.randoms(use_true_random=False))
def test_every_page_is_read_once_to_its_own_place(count: int, limit: int, rng: random.Random) -> None:
    positions = rng.sample(range(1_000), count)
    theirs, ours = rng.sample(range(80), count), rng.sample(range(70), count)
    parts = plan(
        [group(FULL, positions[:7], theirs[:7]), *([group(FULL, positions[7:], theirs[7:])] if count > 7 else [])],
        {FULL: dict(zip(positions, ours, strict=True))},
        classes(70),
        classes(80),
        limit,
    )
    moved = [pair for part in parts for pair in zip(part.remote, part.local, part.checksums, strict=True)]
    assert sorted(moved) == sorted(zip(theirs, ours, [1000 + item for item in theirs], strict=True))
    assert all(part.num_bytes == 120 * len(part.remote) for part in parts)
    assert all(part.num_bytes <= limit or len(part.remote) == 1 for part in parts)


def test_neighbours_on_both_sides_come_next_to_each_other() -> None:
    (part,) = plan(
        [group(FULL, [0, 1, 2, 3], [9, 4, 8, 5])], {FULL: {0: 21, 1: 10, 2: 20, 3: 11}}, classes(30), classes(30)
    )
    assert (part.remote, part.local) == ((4, 5, 8, 9), (10, 11, 20, 21))


def test_classes_are_kept_apart_and_positions_not_offered_are_left_alone() -> None:
    parts = plan(
        [group(SWA, [7], [3]), group(FULL, [7], [3])],
        {FULL: {7: 1, 8: 2}, SWA: {7: 5}},
        classes(30),
        classes(30),
    )
    assert [(p.page_class, p.remote, p.local, p.num_bytes) for p in parts] == [
        (FULL, (3,), (1,), 120),
        (SWA, (3,), (5,), 300),
    ]


def test_nothing_offered_is_nothing_to_read() -> None:
    assert plan([], {FULL: {0: 1}}, classes(4), classes(4)) == ()


@pytest.mark.parametrize(
    ("positions", "items", "local", "message"),
    [
        ([0, 0], [1, 2], {0: 1}, "full position 0 appears 2 times"),
        ([0, 1], [3, 3], {0: 1, 1: 2}, "full item of the owner 3 appears 2 times"),
        ([0, 1], [3, 4], {0: 5, 1: 5}, "full item of ours 5 appears 2 times"),
        ([9], [3], {0: 5}, "full page 9, which was not asked for"),
        ([0], [80], {0: 5}, "item of the owner 80 is outside its pool of 80"),
        ([0], [2**32 - 1], {0: 5}, "item of the owner 4294967295 is outside"),
        ([0], [-1], {0: 5}, "item of the owner -1 is outside"),
        ([0], [3], {0: 70}, "item of ours 70 is outside its pool of 70"),
    ],
)
def test_a_read_that_can_not_be_meant_is_refused(positions, items, local, message: str) -> None:
    with pytest.raises(TransferFailed, match=message):
        plan([group(FULL, positions, items)], {FULL: local}, classes(70), classes(80))


def test_the_same_page_in_two_groups_is_refused() -> None:
    with pytest.raises(TransferFailed, match="full position 0 appears 2 times"):
        plan([group(FULL, [0], [1]), group(FULL, [0], [2])], {FULL: {0: 3}}, classes(9), classes(9))


def test_a_class_that_was_not_registered_is_refused() -> None:
    with pytest.raises(TransferFailed, match="state pages, a class that is not registered"):
        plan([group(PageClass.STATE, [0], [1])], {PageClass.STATE: {0: 1}}, classes(9), classes(9))


def test_pools_of_unlike_size_are_congruent() -> None:
    check_congruent(classes(10), classes(20))
    assert (item_bytes(classes(10)[0]), num_items(classes(10)[0])) == (120, 10)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (classes(10)[:1], "has page classes full, we have full, swa"),
        (classes(10)[::-1], "has page classes swa, full"),
        ((replace(classes(10)[0], regions=()), classes(10)[1]), "have 0 regions, ours 2"),
        (
            (RegionClass(name=FULL, regions=classes(10)[0].regions[::-1]), classes(10)[1]),
            "region 'c128' has items of 20 bytes where ours is 'c4' with 100",
        ),
    ],
)
def test_a_layout_that_differs_is_named(theirs: tuple[RegionClass, ...], message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        check_congruent(classes(10), theirs)


def test_a_pool_beyond_int32_descriptors_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="Give this worker a smaller pool"):
        check_congruent(classes(2**30), classes(2**30 + 1))
