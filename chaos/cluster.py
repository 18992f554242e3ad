"""A cluster to do things to: `penumbra up` in a folder of its own, its processes, and what its workers hold."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from deploy.cluster import ClusterConfig, start_detached
from deploy.state import ClusterState, cluster_folder, fetch_json, stop
from wire.errors import PenumbraError

READY_S = 600.0
NAME = "chaos"


class ChaosFailed(PenumbraError):
    """The cluster did not come to where a fault could be done to it, or back from one."""

    code = "chaos_failed"


class NotHere(ChaosFailed):
    """This machine, or this user, can not do the fault."""

    code = "fault_not_here"


class Cluster(abc.ABC):
    """Processes by name, a router, and what its workers say."""

    def __init__(self, url: str, logs: Path) -> None:
        self.url, self.logs = url, logs

    @abc.abstractmethod
    def pids(self) -> dict[str, int]:
        """Every process there should be, by name; dead ones too, until they are replaced."""

    @abc.abstractmethod
    def wanted(self) -> set[str]:
        """Workers there should be."""

    @abc.abstractmethod
    def mend(self) -> None:
        """Start who died again, if nobody else does."""

    def pid(self, name: str) -> int:
        return self.pids()[name]

    def workers(self, role: str = "") -> list[dict[str, Any]]:
        found = fetch_json(f"{self.url}/workers", timeout_s=10.0) or {"workers": []}
        return [worker for worker in found["workers"] if worker["role"] == role or not role]

    def samples(self, address: str) -> dict[str, float]:
        """What a process's /metrics says, by name and labels; empty when it does not answer."""
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10.0) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return {}
        return {name: float(value) for name, _, value in (ln.rpartition(" ") for ln in lines if not ln.startswith("#"))}

    def held(self) -> dict[str, float]:
        """What workers hold for requests: pages used or quarantined, claims, places in a batch or a queue."""
        found = {}
        for worker in self.workers():
            for name, value in self.samples(worker["http_address"]).items():
                is_page = 'state="used"' in name or 'state="quarantined"' in name
                if value and (is_page or name.startswith(("penumbra_num_requests_", "penumbra_claims"))):
                    found[f"{worker['worker_id']} {name}"] = value
        return found

    def busiest(self, role: str) -> str:
        """The worker of this role that holds most."""

        def used(worker: dict[str, Any]) -> float:
            samples = self.samples(worker["http_address"])
            return sum(value for name, value in samples.items() if 'state="used"' in name)

        return str(max(self.workers(role), key=used)["worker_id"])

    def signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(name), number)

    def wait_until_whole(self, timeout_s: float = READY_S) -> float:
        """Until every worker there should be serves, and the router too; -> seconds."""

        def whole() -> bool:
            self.mend()
            serving = {w["worker_id"] for w in self.workers() if w["state"] == "serving"}
            return serving == self.wanted() and all(map(is_alive, self.pids().values()))

        return until(whole, timeout_s, f"{sorted(self.wanted())} do not all serve")

    def wait_until_idle(self, timeout_s: float) -> float:
        """Until no worker holds anything; -> seconds. Raises ChaosFailed naming what is still held."""
        began = time.monotonic()
        while held := self.held():
            if time.monotonic() - began > timeout_s:
                raise ChaosFailed(f"still held after {timeout_s:g} s: {held}")
            time.sleep(0.2)
        return time.monotonic() - began


class LocalCluster(Cluster):
    """What `penumbra up` started."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url, folder)
        self.folder = folder

    def state(self) -> ClusterState:
        state = ClusterState.load(self.folder)
        if state is None:
            raise ChaosFailed(f"The cluster of {self.folder} is gone; its logs are there.")
        return state

    def pids(self) -> dict[str, int]:
        return {member.name: member.pid for member in self.state().members}

    def mend(self) -> None:
        """Its supervisor does."""

    def wanted(self) -> set[str]:
        state = self.state()
        return {f"{role}-{i}" for role, n in (("prefill", state.prefill), ("decode", state.decode)) for i in range(n)}


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> float:
    """Seconds until the condition held. Raises ChaosFailed when it does not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise ChaosFailed(f"{otherwise} after {timeout_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


@contextlib.contextmanager
def running(home: Path, model: Path, prefill: int, decode: int, *flags: str) -> Iterator[LocalCluster]:
    """A cluster for the length of the block, on a free port."""
    words = ("up", "--cluster", NAME, "--home", str(home), "--model", str(model), "--port", "0")
    counts = ("--prefill", str(prefill), "--decode", str(decode), "--ready-timeout-s", str(READY_S))
    settings = ClusterConfig(
        cluster=NAME, home=home, model=model, prefill=prefill, decode=decode, port=0, ready_timeout_s=READY_S
    )
    folder = cluster_folder(home, NAME)
    if (code := start_detached(settings, (*words, *counts, *flags), Console(quiet=True))) != 0:
        raise ChaosFailed(f"The cluster did not start (exit code {code}); its log is {folder / 'penumbra.log'}.")
    try:
        state = ClusterState.load(folder)
        assert state is not None, "start_detached saw it"
        yield LocalCluster(state.url, folder)
    finally:
        stop(folder)
