"""What the doctor makes of what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from cli.doctor import Findings, Pair, lonely, verdict
from wire.types import ProbeReply


def worker(name: str, host: str = "10.0.0.1", rdma_ports: int = 0, signature: str = "s") -> dict[str, Any]:
    return {
        "worker_id": name,
        "role": name.partition("-")[0],
        "address": f"{host}:50051",
        "model": "m",
        "signature": signature,
        "protocol": 1,
        "rdma_ports": rdma_ports,
    }


def reply(carrier: str) -> ProbeReply:
    return ProbeReply(
        num_bytes=1_000_000,
        page_bytes=50_000,
        window_bytes=200_000,
        page_us=(100, 300, 200),
        large_us=(1000, 500, 2000),
        connect_us=9000,
        carrier=carrier,
        device="eth0" if carrier == "tcp" else "",
    )


def test_speeds_are_medians_and_a_long_prompt_is_all_its_pages() -> None:
    found = Findings.of(reply("memory"))
    assert found.bytes_per_s == 1e9
    assert found.page_p50_s == 200e-6
    assert found.long_s == pytest.approx((3516 * 50_000 + 200_000) / 1e9)


@pytest.mark.parametrize(
    ("carrier", "ports", "hosts", "expect", "faulty"),
    [
        ("tcp", 1, 2, "auto", True),  # both have RDMA, and it was not used
        ("tcp", 0, 2, "auto", False),  # nothing better is there
        ("tcp", 0, 2, "rdma", True),
        ("tcp", 1, 2, "any", False),
        ("rdma", 1, 2, "auto", False),
        ("rdma", 1, 2, "rdma", False),
        ("memory", 1, 1, "auto", False),  # one host: memory is the right way
        ("memory", 1, 1, "rdma", True),
    ],
)
def test_a_slow_path_is_a_fault_where_a_fast_one_was_expected(
    carrier: str, ports: int, hosts: int, expect: Any, faulty: bool
) -> None:
    pair = Pair(
        prefill=worker("prefill-0", rdma_ports=ports),
        decode=worker("decode-0", host=f"10.0.0.{hosts}", rdma_ports=ports),
        reply=reply(carrier),
    )
    assert bool(verdict(pair, expect)) is faulty
    if faulty and carrier == "tcp":
        assert "TCP eth0 where RDMA was expected" in verdict(pair, expect)


def test_a_probe_that_failed_is_its_own_verdict() -> None:
    pair = Pair(prefill=worker("prefill-0"), decode=worker("decode-0"), problem="worker gone")
    assert verdict(pair, "any") == "worker gone"


def test_a_worker_without_a_partner_of_its_layout_is_found() -> None:
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1", signature="other")]
    assert lonely(workers) == ["decode-1"]
