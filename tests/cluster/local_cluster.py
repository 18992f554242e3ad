"""A real cluster for tests: `penumbra up` as a user starts it, every process real, on ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
READY_S = 240.0
STOP_S = 45.0


@dataclass
class LocalCluster:
    url: str
    folder: Path
    supervisor: subprocess.Popen[bytes]

    @property
    def members(self) -> dict[str, int]:
        """Name -> pid, as the supervisor last said."""
        state = _state(self.folder)
        return {} if state is None else {member["name"]: member["pid"] for member in state["members"]}

    def busiest(self, role: str) -> str:
        """The worker of this role that most is assigned to: once its own word, a moment old, names one alone."""

        def held(worker: dict[str, Any]) -> tuple[float, float]:
            samples = parse_metrics(httpx.get(f"http://{worker['http_address']}/metrics", timeout=10).text)
            pages = sum(value for name, value in samples.items() if 'state="used"' in name)
            return samples.get("penumbra_num_requests_running", 0.0), pages

        workers = [worker for worker in self.workers() if worker["role"] == role]
        deadline = time.monotonic() + 1
        while len(workers) > 1:
            loads = {str(worker["worker_id"]): held(worker) for worker in workers}
            alone = sum(running > 0 for running, _ in loads.values()) == 1
            if alone or time.monotonic() > deadline:
                return max(loads, key=lambda name: loads[name])
            time.sleep(0.02)
        return str(workers[0]["worker_id"])

    def wait_until_whole(self) -> None:
        """Until every worker there should be serves."""
        deadline = time.monotonic() + READY_S
        while True:
            state = _state(self.folder)
            assert state is not None
            wanted = {f"{role}-{i}" for role in ("prefill", "decode") for i in range(state[role])}
            serving = {worker["worker_id"] for worker in self.workers() if worker["state"] == "serving"}
            if serving == wanted and all(psutil.pid_exists(pid) for pid in self.members.values()):
                return
            assert time.monotonic() < deadline, f"{serving} of {wanted} serve\n{self.logs()}"
            time.sleep(0.2)

    def pid(self, name: str) -> int:
        return self.members[name]

    def metrics(self) -> dict[str, float]:
        """Every sample of the router's /metrics, by its full name with labels."""
        return parse_metrics(httpx.get(f"{self.url}/metrics", timeout=10).text)

    def workers(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.url}/workers", timeout=10).json()["workers"])

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=timeout)

    def logs(self) -> str:
        return "\n".join(
            f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            for log in sorted(self.folder.rglob("*.log"))
        )


def parse_metrics(text: str) -> dict[str, float]:
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


@contextmanager
def local_cluster(home: Path, model: Path, *flags: str, packages: Path | None = None) -> Iterator[LocalCluster]:
    """Start, wait until ready, hand over, stop with SIGTERM, and insist that nothing is left running.

    packages  a folder whose modules its processes import before all others
    """
    name = "test"
    command = [sys.executable, "-m", "cli", "up", "--port", "0", "--cluster", name, "--model", str(model), *flags]
    path = os.pathsep.join(map(str, (packages, ROOT) if packages else (ROOT,)))
    environment = {**os.environ, "PENUMBRA_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    folder = home / "clusters" / name
    folder.mkdir(parents=True)
    with (folder / "up.log").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=home)
    cluster = LocalCluster(url="", folder=folder, supervisor=process)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + READY_S
        while True:
            state = _state(folder)
            if state and state["ready"]:
                break
            assert process.poll() is None, f"the cluster ended by itself\n{cluster.logs()}"
            assert time.monotonic() < deadline, f"not ready after {READY_S} s\n{cluster.logs()}"
            time.sleep(0.1)
        cluster.url = state["url"]
        family = psutil.Process(process.pid).children(recursive=True)
        yield cluster
    finally:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise AssertionError(f"the cluster did not stop in {STOP_S} s\n{cluster.logs()}") from None
        finally:
            _, alive = psutil.wait_procs(family, timeout=5)
            for survivor in alive:
                survivor.kill()
    assert not alive, f"left behind: {[survivor.pid for survivor in alive]}"


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except FileNotFoundError:
        return None
