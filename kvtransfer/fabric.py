"""What carried bytes to this host, as the kernel counted them: evidence, where a library's settings are only intent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys/class")

IB_WORD_BYTES = 4
"""port_rcv_data counts in words of four bytes."""

MOST_OF = 0.5
"""A device carried a transfer when its counter moved by this share of it, beyond what it moves anyway. What goes
between processes of one host through memory moves no counter at all."""

LEAST_BYTES = 4 << 20
"""Less than this is lost in what others do meanwhile, and nothing is said."""

Device = tuple[str, str]
"""("rdma" or "tcp", its name)"""


def active_rdma_ports(root: Path = SYS) -> int:
    """Ports of InfiniBand and RoCE devices that are up."""
    states = [_read(path) for path in root.glob("infiniband/*/ports/*/state")]
    return sum("ACTIVE" in state for state in states)


@dataclass(frozen=True, slots=True)
class Look:
    """Bytes that each device has received so far, at a monotonic time in seconds."""

    at_s: float
    received: Mapping[Device, int]


def look(root: Path = SYS) -> Look:
    """A device that can not be read is left out."""
    found: dict[Device, int] = {}
    for path in root.glob("infiniband/*/ports/*/counters/port_rcv_data"):
        if (words := _read(path)).isdecimal():
            found["rdma", f"{path.parts[-5]}:{path.parts[-3]}"] = int(words) * IB_WORD_BYTES
    for path in root.glob("net/*/statistics/rx_bytes"):
        if (count := _read(path)).isdecimal():
            found["tcp", path.parts[-3]] = int(count)
    return Look(time.monotonic(), found)


def carrier(quiet: Look, before: Look, after: Look, num_bytes: int) -> Device:
    """("rdma" | "tcp" | "memory" | "unknown", device) that brought `num_bytes` from `before` to `after`.

    From `quiet` to `before` none of them moved, so what did then goes on in the background. RDMA devices are looked at
    first, since an Ethernet port counts RoCE as well. "memory": no device's counter moved enough, so the bytes came
    through shared memory or CUDA IPC.
    """
    if num_bytes < LEAST_BYTES:
        return "unknown", ""
    share = (after.at_s - before.at_s) / max(before.at_s - quiet.at_s, 1e-3)
    moved: dict[Device, float] = {}
    for device, count in after.received.items():
        start = before.received.get(device, count)
        moved[device] = count - start - (start - quiet.received.get(device, start)) * share
    for kind in ("rdma", "tcp"):
        most, name = max(((n, name) for (k, name), n in moved.items() if k == kind), default=(0.0, ""))
        if most >= MOST_OF * num_bytes:
            return kind, name
    return "memory", ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
