"""Registered memory for tests: a few small classes over numpy arrays, with checksums. Also an owner process."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from wire.types import OwnerCard, PageClass, PageGroup, Region, RegionClass

# Two regions of unlike item sizes, as C4 rows and their index are; one; three.
SHAPE = {
    PageClass.FULL: {"c4": 1728, "c4_index": 576},
    PageClass.SWA: {"swa": 2048},
    PageClass.STATE: {"raw_a": 64, "raw_b": 256, "raw_c": 64},
}


class Memory:
    """Pools of `num_items` items a class. Filled with bytes that depend on `seed`, or zeros without one."""

    def __init__(self, num_items: int, seed: int | None = None, shape: dict = SHAPE) -> None:
        self.shape = shape
        rng = np.random.default_rng(seed)
        self.regions: dict[PageClass, dict[str, np.ndarray]] = {
            page_class: {
                name: (
                    np.zeros((num_items, size), np.uint8)
                    if seed is None
                    else rng.integers(0, 256, (num_items, size), np.uint8)
                )
                for name, size in sizes.items()
            }
            for page_class, sizes in shape.items()
        }

    @property
    def classes(self) -> tuple[RegionClass, ...]:
        return tuple(
            RegionClass(
                name=page_class,
                regions=tuple(
                    Region(name=name, address=a.ctypes.data, item_bytes=a.shape[1], num_items=a.shape[0])
                    for name, a in arrays.items()
                ),
            )
            for page_class, arrays in self.regions.items()
        )

    def item(self, page_class: PageClass, item: int) -> bytes:
        return b"".join(a[item].tobytes() for a in self.regions[page_class].values())

    def checksum(self, page_class: PageClass, item: int) -> int:
        return zlib.crc32(self.item(page_class, item))

    def verify(self, page_class: PageClass, items: Sequence[int], checksums: Sequence[int]) -> list[int]:
        return [i for i, c in zip(items, checksums, strict=True) if self.checksum(page_class, i) != c]

    def group(self, page_class: PageClass, positions: Iterable[int], items: Iterable[int]) -> PageGroup:
        """These items offered as these positions, with their true checksums."""
        items = tuple(items)
        return PageGroup(
            page_class=page_class,
            positions=tuple(positions),
            items=items,
            generations=(1,) * len(items),
            checksums=tuple(self.checksum(page_class, item) for item in items),
        )


def card(memory: Memory, transport, worker_id: str = "prefill-0", epoch: int = 1) -> OwnerCard:
    agent, metadata = transport.describe()
    return OwnerCard(
        worker_id=worker_id,
        epoch=epoch,
        transport=transport.name,
        agent=agent,
        metadata=metadata,
        signature="s",
        classes=memory.classes,
    )


def card_to_json(card: OwnerCard) -> str:
    from wire.convert import owner_card_to_wire

    return json.dumps(base64.b64encode(owner_card_to_wire(card).SerializeToString()).decode())


def card_from_json(line: str) -> OwnerCard:
    from wire.convert import owner_card_from_wire
    from wire.v1 import kv_pb2

    return owner_card_from_wire(kv_pb2.OwnerCard.FromString(base64.b64decode(json.loads(line))))


def own(num_items: int, seed: int, epoch: int) -> None:
    """An owner process: prints its card, serves until its stdin closes."""
    from kvtransfer.nixl import NixlTransport

    memory = Memory(num_items, seed)
    transport = NixlTransport(f"prefill-0-{epoch:016x}")
    transport.register(memory.classes)
    print(card_to_json(card(memory, transport, epoch=epoch)), flush=True)
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    own(*map(int, sys.argv[1:]))
