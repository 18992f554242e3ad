"""How fast pages cross between two processes over NIXL, beside one contiguous NIXL read and a plain memcpy.

One buffer is registered three ways in both processes: as our FULL pool (a page of V4-Flash, all its layers' C4, C4
index and C128 rows side by side), as one region a layer and kind (62 of them), the way pools are usually laid out, and
as one single item. All cases read the same bytes through the same `NixlTransport`, take turns in one run, and the
bytes are compared.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.record import append_rows, commit, machine
from kvtransfer.nixl import NixlTransport
from kvtransfer.plan import MAX_SLICE_BYTES, plan
from kvtransfer.transport import ReadState
from wire.types import OwnerCard, PageClass, PageGroup, Region, RegionClass

PARTS = [37_440] * 21 + [8_448] * 21 + [1_728] * 20
"""Bytes of one full page in each region of V4-Flash."""
PAGE_BYTES = sum(PARTS)
RUN_PAGES = 8
OWNER_TIMEOUT_S = 60

# Three views of one buffer. The transport does not care what a class is called.
REGIONS, WHOLE_PAGES, ONE_ITEM = PageClass.FULL, PageClass.SWA, PageClass.STATE


class Buffer:
    """`pages` pages of anonymous memory, filled with bytes that depend on `seed`, or zeros without one."""

    def __init__(self, pages: int, seed: int | None) -> None:
        self.pages = pages
        self.bytes = np.frombuffer(mmap.mmap(-1, pages * PAGE_BYTES), dtype=np.uint8)
        if seed is None:
            self.bytes[:] = 0  # fault every page in before anything is timed
        else:
            self.bytes[:] = np.random.default_rng(seed).integers(0, 256, self.bytes.size, dtype=np.uint8)
        starts = np.cumsum([0, *PARTS[:-1]]) * pages
        self.parts = [
            self.bytes[start : start + size * pages].reshape(pages, size)
            for start, size in zip(starts, PARTS, strict=True)
        ]

    @property
    def classes(self) -> tuple[RegionClass, ...]:
        base = self.bytes.ctypes.data
        regions = tuple(
            Region(name=f"r{i}", address=part.ctypes.data, item_bytes=part.shape[1], num_items=self.pages)
            for i, part in enumerate(self.parts)
        )
        page = Region(name="page", address=base, item_bytes=PAGE_BYTES, num_items=self.pages)
        whole = Region(name="whole", address=base, item_bytes=self.bytes.size, num_items=1)
        return (
            RegionClass(name=REGIONS, regions=regions),
            RegionClass(name=WHOLE_PAGES, regions=(page,)),
            RegionClass(name=ONE_ITEM, regions=(whole,)),
        )


def run(pages: int = 128, repeats: int = 9, slice_bytes: int = MAX_SLICE_BYTES) -> list[dict[str, object]]:
    """Measure, print a table, append a row per case to bench/results/transfer.csv, and return the rows."""
    owner = subprocess.Popen(
        [sys.executable, "-m", "bench.transfer", str(pages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert owner.stdout is not None
        agent, metadata, addresses = json.loads(owner.stdout.readline())
        rows = _measure(pages, repeats, slice_bytes, agent, bytes.fromhex(metadata), addresses)
    finally:
        owner.kill()
        owner.communicate(timeout=OWNER_TIMEOUT_S)
    _print(rows, pages, slice_bytes)
    append_rows("transfer", rows)
    return rows


def _measure(
    pages: int, repeats: int, slice_bytes: int, agent: str, metadata: bytes, addresses: list[list[int]]
) -> list[dict[str, object]]:
    source, target = Buffer(pages, seed=1), Buffer(pages, seed=None)
    spare = np.zeros_like(target.bytes)
    transport = NixlTransport("bench-reader")
    transport.register(target.classes)
    card = OwnerCard(
        worker_id="bench-owner",
        epoch=1,
        transport=transport.name,
        agent=agent,
        metadata=metadata,
        signature="bench",
        classes=tuple(
            RegionClass(
                name=c.name,
                regions=tuple(
                    dataclasses.replace(r, address=address) for r, address in zip(c.regions, theirs, strict=True)
                ),
            )
            for c, theirs in zip(target.classes, addresses, strict=True)
        ),
    )
    transport.connect(card)
    rng = np.random.default_rng(2)

    def read(page_class: PageClass, remote: Sequence[int], local: Sequence[int]) -> None:
        offered = PageGroup(
            page_class=page_class,
            positions=tuple(range(len(remote))),
            items=tuple(remote),
            generations=(1,) * len(remote),
            checksums=(0,) * len(remote),
        )
        places = {page_class: dict(enumerate(local))}
        for part in plan([offered], places, target.classes, card.classes, slice_bytes):
            handle = transport.read(card, part.page_class, part.remote, part.local)
            while (state := handle.poll()) is ReadState.RUNNING:
                pass
            handle.close()
            if state is not ReadState.DONE:
                raise RuntimeError("the owner process died during the benchmark")

    def permuted() -> list[int]:
        return [int(i) for i in rng.permutation(pages)]

    def runs() -> list[int]:
        """Runs of RUN_PAGES neighbours, the runs in random order, as allocators under load hand pages out."""
        starts = rng.permutation(pages // RUN_PAGES) * RUN_PAGES
        return [int(start) + i for start in starts for i in range(RUN_PAGES)]

    remote, local = permuted(), permuted()
    remote_runs, local_runs = runs(), runs()
    in_order = list(range(pages))
    # name -> (what to time, which of our pages then equals which of theirs)
    cases: dict[str, tuple[Callable[[], None], list[int], list[int]]] = {
        "contiguous": (lambda: read(ONE_ITEM, [0], [0]), in_order, in_order),
        "62 regions, permuted": (lambda: read(REGIONS, remote, local), local, remote),
        f"62 regions, runs of {RUN_PAGES}": (lambda: read(REGIONS, remote_runs, local_runs), local_runs, remote_runs),
        "62 regions, in order": (lambda: read(REGIONS, in_order, in_order), in_order, in_order),
        "our pages, permuted": (lambda: read(WHOLE_PAGES, remote, local), local, remote),
        "memcpy": (lambda: np.copyto(spare, source.bytes), in_order, in_order),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (work, ours, theirs) in cases.items():
            began = time.perf_counter()
            work()
            took = time.perf_counter() - began
            if repeat:  # the first round connects and warms up, and is compared instead
                seconds[name].append(took)
            else:
                _compare(name, source, target, spare, ours, theirs)
    transport.close()
    size = pages * PAGE_BYTES
    median = {name: size / statistics.median(times) / 1e9 for name, times in seconds.items()}
    # Both run within a second of each other; their ratio outlives a change in the machine's load.
    ratios = {
        name: statistics.median(c / t for c, t in zip(seconds["contiguous"], times, strict=True))
        for name, times in seconds.items()
    }
    return [
        {
            "case": name,
            "median_gb_per_s": f"{median[name]:.2f}",
            "best_gb_per_s": f"{size / min(seconds[name]) / 1e9:.2f}",
            "of_contiguous": f"{ratios[name]:.2f}",
            "pages": pages,
            "bytes": size,
            "slice_mib": slice_bytes >> 20,
        }
        for name in cases
    ]


def _compare(name: str, source: Buffer, target: Buffer, spare: np.ndarray, ours: list[int], theirs: list[int]) -> None:
    if name == "memcpy":
        same = np.array_equal(spare, source.bytes)
    elif name.startswith("62 regions"):
        same = all(
            np.array_equal(here[ours], there[theirs]) for here, there in zip(target.parts, source.parts, strict=True)
        )
    else:
        shape = (target.pages, PAGE_BYTES)
        same = np.array_equal(target.bytes.reshape(shape)[ours], source.bytes.reshape(shape)[theirs])
    if not same:
        raise RuntimeError(f"{name}: the bytes that arrived are not the bytes that were read")
    target.bytes[:] = 0


def _print(rows: list[dict[str, object]], pages: int, slice_bytes: int) -> None:
    table = Table(title=f"{pages} pages of {PAGE_BYTES:,} bytes between two processes", title_justify="left")
    for column, justify in (("case", "left"), ("median GB/s", "right"), ("best GB/s", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("of contiguous", justify="right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("case", "median_gb_per_s", "best_gb_per_s", "of_contiguous")))
    console = Console()
    console.print(table)
    console.print(f"{machine()} · commit {commit()} · slices of {slice_bytes >> 20} MiB", highlight=False)


def _own(pages: int) -> None:
    """The owner process: prints how to reach its buffer, serves until its stdin closes."""
    buffer = Buffer(pages, seed=1)
    transport = NixlTransport("bench-owner")
    transport.register(buffer.classes)
    agent, metadata = transport.describe()
    addresses = [[region.address for region in c.regions] for c in buffer.classes]
    print(json.dumps([agent, metadata.hex(), addresses]), flush=True)
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    _own(int(sys.argv[1]))
