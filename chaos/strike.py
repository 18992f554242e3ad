"""One blow to a running cluster, and nothing measured: for load tests, which measure by themselves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from chaos.cluster import LocalCluster
from chaos.judge import CONT, KILL, STOP, TERM
from deploy.state import ClusterState
from wire.errors import ConfigError

FROZEN_S = 5.0

HOW = {"killed": KILL, "stopped": TERM, "frozen": STOP}
STRIKES: dict[str, tuple[str, signal.Signals]] = {
    f"{who}-{how}": (who, number)
    for who in ("prefill", "decode", "router", "redis")
    for how, number in HOW.items()
    if who in ("prefill", "decode") or how == "killed"
}
"""What can be done. Of several workers the one that holds most is struck; who is frozen is thawed after FROZEN_S."""


def do(name: str, folder: Path) -> str:
    """Strike the cluster of `folder`. -> what was done. Raises ConfigError for an unknown strike or no cluster."""
    if name not in STRIKES:
        raise ConfigError(f"'{name}' is no strike; choose from {', '.join(STRIKES)}.")
    state = ClusterState.load(folder)
    if state is None or state.supervisor.process() is None:
        raise ConfigError(f"No cluster runs in {folder}, so nothing can be done to it. Start one with `penumbra up`.")
    who, number = STRIKES[name]
    cluster = LocalCluster(state.admin_url or state.url, folder)
    target = cluster.busiest(who) if who in ("prefill", "decode") else who
    member = next((member for member in state.members if member.name == target), None)
    if member is None:
        raise ConfigError(f"The cluster of {folder} runs no {target} of its own.")
    cluster.signal(target, number)
    told = f"{target} (pid {member.pid}) got {number.name}"
    if number is STOP:
        try:
            time.sleep(FROZEN_S)
        finally:
            cluster.signal(target, CONT)
        told += f" and after {FROZEN_S:g} s {CONT.name}"
    return told
