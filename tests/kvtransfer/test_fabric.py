"""Which device carried a transfer is read off the kernel's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.fabric import LEAST_BYTES, Look, active_rdma_ports, carrier, look

MIB = 1 << 20


def port(root: Path, name: str, state: str, words: int) -> None:
    folder = root / "infiniband" / name / "ports" / "1"
    (folder / "counters").mkdir(parents=True)
    (folder / "state").write_text(f"{state}\n")
    (folder / "counters" / "port_rcv_data").write_text(f"{words}\n")


def interface(root: Path, name: str, num_bytes: int) -> None:
    folder = root / "net" / name / "statistics"
    folder.mkdir(parents=True)
    (folder / "rx_bytes").write_text(f"{num_bytes}\n")


def test_counters_are_bytes_whatever_they_are_kept_in(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", "4: ACTIVE", 250)
    interface(tmp_path, "eth0", 77)
    assert look(tmp_path).received == {("rdma", "mlx5_0:1"): 1000, ("tcp", "eth0"): 77}


def test_ports_that_are_down_do_not_count(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", "4: ACTIVE", 0)
    port(tmp_path, "mlx5_1", "1: DOWN", 0)
    assert active_rdma_ports(tmp_path) == 1
    assert active_rdma_ports(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    ("moved", "found"),
    [
        ({("rdma", "mlx5_0:1"): 64 * MIB, ("tcp", "eth0"): 64 * MIB}, ("rdma", "mlx5_0:1")),  # RoCE counts on both
        ({("rdma", "mlx5_0:1"): 1 * MIB, ("tcp", "eth0"): 65 * MIB}, ("tcp", "eth0")),
        ({("tcp", "eth0"): 2 * MIB, ("tcp", "lo"): 70 * MIB}, ("tcp", "lo")),
        ({("rdma", "mlx5_0:1"): 1 * MIB, ("tcp", "eth0"): 3 * MIB}, ("memory", "")),
        ({}, ("memory", "")),
    ],
)
def test_the_device_whose_counter_moved_by_the_transfer_carried_it(
    moved: dict[tuple[str, str], int], found: tuple[str, str]
) -> None:
    quiet = Look(0.0, dict.fromkeys(moved, 5 * MIB))
    before = Look(0.1, dict.fromkeys(moved, 5 * MIB))
    after = Look(0.2, {key: 5 * MIB + num_bytes for key, num_bytes in moved.items()})
    assert carrier(quiet, before, after, 64 * MIB) == found


def test_what_a_device_carries_anyway_is_not_taken_for_the_transfer() -> None:
    eth = ("tcp", "eth0")
    quiet, before = Look(0.0, {eth: 0}), Look(0.5, {eth: 100 * MIB})
    assert carrier(quiet, before, Look(1.0, {eth: 201 * MIB}), 64 * MIB) == ("memory", "")
    assert carrier(quiet, before, Look(1.0, {eth: 260 * MIB}), 64 * MIB) == eth


def test_of_too_few_bytes_nothing_is_said() -> None:
    eth = ("tcp", "eth0")
    assert carrier(Look(0, {eth: 0}), Look(1, {eth: 0}), Look(2, {eth: 9}), LEAST_BYTES - 1) == ("unknown", "")


def test_this_machines_own_counters_can_be_read() -> None:
    assert all(kind in ("rdma", "tcp") and count >= 0 for (kind, _), count in look().received.items())
