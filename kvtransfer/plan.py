"""Which items to read into which, in slices small enough to stay responsive. Pure: data in, data out.

Owner and reader never exchange item ids of each other's pools. An offer names pages by position, the reader
knows where each position goes in its own pools, and this file pairs the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wire.errors import LayoutMismatch, TransferFailed
from wire.types import PAGE_TOKENS, PageClass, PageGroup, RegionClass

MAX_SLICE_BYTES = 32 << 20
"""Between processes of one host a read is copied inside the call that posts it: about 10 ms for 32 MiB."""

MAX_DESCRIPTORS = 1 << 31
"""NIXL indexes descriptors with int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Pages of one class that are read by one handle and verified together; the tuples run in parallel."""

    page_class: PageClass
    remote: tuple[int, ...]
    local: tuple[int, ...]
    checksums: tuple[int, ...]
    num_bytes: int


def item_bytes(region_class: RegionClass) -> int:
    """Bytes of one item over every region of its class."""
    return sum(region.item_bytes for region in region_class.regions)


def token_bytes(classes: Sequence[RegionClass]) -> int:
    """Bytes that stay for each token of a long prompt: its share of a full page."""
    return sum(item_bytes(cls) for cls in classes if cls.name is PageClass.FULL) // PAGE_TOKENS


def num_items(region_class: RegionClass) -> int:
    """Items that every region of the class holds."""
    return min((region.num_items for region in region_class.regions), default=0)


def check_congruent(ours: Sequence[RegionClass], theirs: Sequence[RegionClass]) -> None:
    """Raises LayoutMismatch unless both describe the same regions, in the same order, of the same item sizes.

    Pools may differ in size: items are paired one by one.
    """
    if [c.name for c in ours] != [c.name for c in theirs]:
        raise LayoutMismatch(
            f"The owner has page classes {', '.join(c.name for c in theirs) or 'none'}, we have "
            f"{', '.join(c.name for c in ours) or 'none'}. Run both workers from one version and checkpoint."
        )
    for mine, other in zip(ours, theirs, strict=True):
        if len(mine.regions) != len(other.regions):
            raise LayoutMismatch(
                f"The owner's {mine.name} pages have {len(other.regions)} regions, ours {len(mine.regions)}. "
                f"Both workers must serve the same checkpoint with the same kv_layout."
            )
        for here, there in zip(mine.regions, other.regions, strict=True):
            if (here.name, here.item_bytes) != (there.name, there.item_bytes):
                raise LayoutMismatch(
                    f"The owner's {mine.name} region {there.name!r} has items of {there.item_bytes} bytes where "
                    f"ours is {here.name!r} with {here.item_bytes}. Both workers must serve the same checkpoint "
                    f"with the same kv_layout."
                )
        for region_class in (mine, other):
            if len(region_class.regions) * num_items(region_class) > MAX_DESCRIPTORS:
                raise LayoutMismatch(
                    f"{len(region_class.regions)} regions of {num_items(region_class)} {mine.name} items are more "
                    f"than {MAX_DESCRIPTORS} descriptors. Give this worker a smaller pool."
                )


def plan(
    groups: Sequence[PageGroup],
    local: Mapping[PageClass, Mapping[int, int]],
    ours: Sequence[RegionClass],
    theirs: Sequence[RegionClass],
    max_slice_bytes: int = MAX_SLICE_BYTES,
) -> tuple[Slice, ...]:
    """The reads that bring every offered page to its place.

    local[page_class][position] is the reader's item for that position; positions not offered here are left
    alone. Pages whose neighbours are neighbours on both sides come next to each other, so that the transport
    can merge them. A slice holds at least one page and at most `max_slice_bytes`.

    Raises TransferFailed for a page offered twice, an item read or written twice, a position the reader did not
    ask for, and an item outside either pool.
    """
    slices: list[Slice] = []
    sizes = {c.name: (item_bytes(c), num_items(c)) for c in ours}
    limits = {c.name: num_items(c) for c in theirs}
    for page_class in PageClass:
        offered = [group for group in groups if group.page_class is page_class and group.positions]
        if not offered:
            continue
        if page_class not in sizes or page_class not in limits:
            raise TransferFailed(f"The owner offers {page_class} pages, a class that is not registered.")
        bytes_each, our_items = sizes[page_class]
        places = local.get(page_class, {})
        pairs: list[tuple[int, int, int]] = []  # (owner's item, our item, checksum)
        positions: list[int] = []
        for group in offered:
            columns = zip(group.positions, group.items, group.checksums, strict=True)
            for position, item, checksum in columns:
                if position not in places:
                    raise TransferFailed(f"The owner offers {page_class} page {position}, which was not asked for.")
                pairs.append((item, places[position], checksum))
                positions.append(position)
        _refuse_repeats(f"{page_class} position", positions)
        _refuse_repeats(f"{page_class} item of the owner", [pair[0] for pair in pairs])
        _refuse_repeats(f"{page_class} item of ours", [pair[1] for pair in pairs])
        _refuse_outside(f"{page_class} item of the owner", [pair[0] for pair in pairs], limits[page_class])
        _refuse_outside(f"{page_class} item of ours", [pair[1] for pair in pairs], our_items)
        pairs.sort()
        step = max(1, max_slice_bytes // bytes_each)
        for start in range(0, len(pairs), step):
            remote, here, checksums = zip(*pairs[start : start + step], strict=True)
            slices.append(
                Slice(
                    page_class=page_class,
                    remote=remote,
                    local=here,
                    checksums=checksums,
                    num_bytes=bytes_each * len(remote),
                )
            )
    return tuple(slices)


def _refuse_repeats(what: str, values: Sequence[int]) -> None:
    if len(set(values)) != len(values):
        value, times = Counter(values).most_common(1)[0]
        raise TransferFailed(f"{what} {value} appears {times} times in one read; each page is read once.")


def _refuse_outside(what: str, values: Sequence[int], limit: int) -> None:
    worst = max(values, key=lambda value: value if value >= 0 else limit - value)
    if not 0 <= worst < limit:
        raise TransferFailed(f"{what} {worst} is outside its pool of {limit}.")
