"""A cluster on a Ray that somebody else runs: it takes its place there, and leaves it as it was."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deploy.redis import free_port
from tests.cluster.local_cluster import ROOT, local_cluster
from tests.cluster.test_losses import penumbra, settle, stream_ids

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='Ray is not installed: make install EXTRAS="ray"'
    ),
]
TOKENS = 400
UP_S = 120.0


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]

    def resources(self) -> dict[str, float]:
        """What the Ray cluster has to spare, by one who joins it as any driver would."""
        words = "import json, ray; ray.init(address='auto'); print('left', json.dumps(ray.available_resources()))"
        done = subprocess.run(
            [sys.executable, "-c", words],
            env={**self.environment, "RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=UP_S,
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("left ")]
        found: dict[str, float] = json.loads(line[5:])
        return found


@contextmanager
def ray_head(folder: Path, auth: str) -> Iterator[Head]:
    """`ray start --head` on loopback with two CPUs, ended by its pid."""
    lean = folder / "lean"
    lean.mkdir(parents=True)
    (lean / "rfc3987_syntax.py").write_text("raise ImportError('left out, as in a real installation')\n")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    address = f"127.0.0.1:{free_port()}"
    scratch = tempfile.mkdtemp(prefix="penumbra-head-", dir="/tmp")
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": auth,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join((str(lean), str(ROOT))),
    }
    words = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "2"]
    words += ["--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2], "--include-dashboard", "false"]
    words += ["--object-store-memory", str(80 << 20), "--temp-dir", scratch]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + UP_S
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield Head(address, environment)
    finally:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=30)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


def test_it_joins_by_address_and_token_is_replaced_while_it_answers_and_leaves_ray_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_head(tmp_path / "ray", "token") as head:
        # What a user of such a Ray has in his shell. The second keeps Ray from taking loopback for another address.
        for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            monkeypatch.setenv(name, head.environment[name])
        flags = ("--on", "ray", "--ray-address", head.address, "--worker-cpus", "0.4", "--grace-s", "30")
        with local_cluster(tmp_path / "home", model, *flags, packages=tmp_path / "ray" / "lean") as cluster:
            undisturbed = stream_ids(cluster, model, TOKENS)
            assert len(undisturbed) == TOKENS
            for name in ("prefill-0", "decode-0"):
                above = {process.name() for process in psutil.Process(cluster.pid(name)).parents()}
                assert "raylet" in above, "Ray's own node process started it, not ours"
            assert head.resources()["CPU"] == pytest.approx(2 - 2 * 0.4)
            before = {name: cluster.pid(name) for name in ("prefill-0", "decode-0", "router")}
            with ThreadPoolExecutor(1) as one:
                restarting = one.submit(penumbra, cluster, "restart", timeout_s=400)
                answered = 0
                while not restarting.done() or answered == 0:
                    assert stream_ids(cluster, model, TOKENS) == undisturbed
                    answered += 1
                restarting.result()
            assert all(cluster.pid(name) != pid for name, pid in before.items())
            settle(cluster)
        assert head.resources()["CPU"] == 2.0, "every place it held is given back"


def test_a_ray_cluster_that_takes_anybody_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_head(tmp_path / "ray", "disabled") as head:
        words = [sys.executable, "-m", "cli", "up", "--port", "0", "--model", str(model), "--home", str(tmp_path)]
        done = subprocess.run(
            [*words, "--on", "ray", "--ray-address", head.address],
            env={**head.environment, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=UP_S,
        )
    assert done.returncode == 78, done.stdout + done.stderr
    assert "takes calls without a token" in done.stderr
