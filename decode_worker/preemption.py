"""What a preempted request takes along: the bytes that a transfer of its tokens would carry, kept in host memory.

Copying is the engine thread's work; the scheduler only says which items and when. A copy knows its checksums, so
a request comes back with exactly the bytes it left with, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from wire.types import PageClass

Items = Mapping[PageClass, Sequence[int]]


class PageMemory(Protocol):
    """What copying needs of `engine.cache.pools.KvPools`."""

    def export_pages(self, page_class: PageClass, items: Sequence[int]) -> list[int]: ...

    def import_pages(self, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]: ...

    def copy_out(self, page_class: PageClass, items: Sequence[int]) -> Tensor: ...

    def copy_in(self, page_class: PageClass, items: Sequence[int], rows: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class HostPages:
    """Bytes of one request's items, row i of a class being its i-th item, and what their checksums were."""

    rows: dict[PageClass, Tensor] = field(repr=False)  # [items, bytes of one item] uint8
    checksums: dict[PageClass, list[int]] = field(repr=False)


def save(memory: PageMemory, items: Items) -> HostPages:
    return HostPages(
        rows={cls: memory.copy_out(cls, ids) for cls, ids in items.items()},
        checksums={cls: memory.export_pages(cls, ids) for cls, ids in items.items()},
    )


def restore(memory: PageMemory, items: Items, pages: HostPages) -> int:
    """Write the last len(items) rows of each class to `items`; how many of them are not what was saved."""
    damaged = 0
    for cls, ids in items.items():
        skipped = len(pages.checksums[cls]) - len(ids)
        memory.copy_in(cls, ids, pages.rows[cls][skipped:])
        damaged += len(memory.import_pages(cls, ids, pages.checksums[cls][skipped:]))
    return damaged
