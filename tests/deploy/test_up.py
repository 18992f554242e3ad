"""`penumbra up` as a user meets it: real services, in the background, until `down` or worse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.state import ClusterState, fetch_json
from engine.model.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def penumbra(tmp_path):
    """Run the program to its end from a folder of no meaning; keyword arguments are environment variables."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PENUMBRA_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=100,
        )

    yield run
    run("down")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small enough to load at once; what it computes does not matter here."""
    return write_tiny(
        tmp_path_factory.mktemp("models") / "small",
        seed=1,
        layers=(0, 4, 128),
        hidden=64,
        heads=2,
        experts=4,
        q_lora_rank=32,
        o_lora_rank=32,
        moe_intermediate=32,
    )


def pids(state: ClusterState) -> list[int]:
    return [member.pid for member in (state.supervisor, *state.members)]


@pytest.mark.timeout(240)
def test_a_detached_cluster_serves_has_a_status_and_goes_down_whole(penumbra, tmp_path, process_gone):
    up = penumbra("up", "--detach", "--port", "0")
    assert up.returncode == 0, up.stdout + up.stderr
    assert up.stdout.splitlines()[-1].startswith("ready: curl http://127.0.0.1:")

    state = ClusterState.load(tmp_path / "home" / "clusters" / "default")
    assert state is not None
    assert state.ready
    assert [member.name for member in state.members] == ["prefill-0", "decode-0", "router", "redis"]
    with urllib.request.urlopen(f"{state.url}/v1/models", timeout=10) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["penumbra-nano"]
    # What the members write is in their own logs, and nowhere twice.
    folder = tmp_path / "home" / "clusters" / "default"
    assert "prefill-0 | " not in (folder / "penumbra.log").read_text()
    assert (folder / "logs" / "prefill-0.log").stat().st_size
    resident_bytes = sum(psutil.Process(pid).memory_info().rss for pid in pids(state))
    assert resident_bytes < 2.5e9

    again = penumbra("up", "--port", "0")
    assert again.returncode == 78
    assert "The cluster 'default' is already up" in again.stderr

    status = penumbra("status", COLUMNS="120")
    assert status.returncode == 0, status.stdout
    alive = [line.split()[0] for line in status.stdout.splitlines() if " alive " in line]
    assert alive == ["supervisor", "prefill-0", "decode-0", "router", "redis"]
    assert f"{state.url} ready" in status.stdout

    down = penumbra("down")
    assert (down.returncode, down.stdout) == (0, "stopped\n")
    assert all(process_gone(pid) for pid in pids(state))
    assert penumbra("status").returncode == 3


@pytest.mark.timeout(240)
def test_a_cluster_with_keys_serves_who_has_one_and_nothing_outlives_its_supervisor(
    penumbra, model, tmp_path, process_gone, eventually
):
    key, stored = penumbra("key").stdout.splitlines()
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[tenants.me]\nkeys = ["{stored}"]\n')
    up = penumbra("up", "--detach", "--port", "0", "--model", str(model), "--keys", str(keys))
    assert up.returncode == 0, up.stdout + up.stderr
    state = ClusterState.load(tmp_path / "home" / "clusters" / "default")
    assert state is not None
    assert key not in (tmp_path / "home" / "clusters" / "default" / "penumbra.log").read_text()
    body = {"model": state.model, "prompt": "who", "max_tokens": 2}
    for headers, status in (({}, 401), ({"authorization": f"Bearer {key}"}, 200)):
        answer = httpx.post(f"{state.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
    assert penumbra("status").returncode == 0  # by the port for administrators
    os.kill(state.supervisor.pid, signal.SIGKILL)
    eventually(lambda: all(process_gone(pid) for pid in pids(state)))
    assert penumbra("status").returncode == 3
    assert penumbra("down").stdout == "the cluster 'default' is not up\n"


@pytest.mark.timeout(240)
def test_a_worker_that_dies_is_named_and_started_again(penumbra, model, tmp_path, process_gone):
    up = penumbra("up", "--detach", "--port", "0", "--model", str(model))
    assert up.returncode == 0, up.stdout + up.stderr
    folder = tmp_path / "home" / "clusters" / "default"
    state = ClusterState.load(folder)
    assert state is not None
    (decode,) = (member for member in state.members if member.name == "decode-0")
    os.kill(decode.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while True:
        now = ClusterState.load(folder)
        assert now is not None
        new = [member.pid for member in now.members if member.name == "decode-0" and member.pid != decode.pid]
        loads = fetch_json(f"{state.url}/workers") or {"workers": []}
        if new and [w["state"] for w in loads["workers"]] == ["serving", "serving"]:
            break
        assert time.monotonic() < deadline, (folder / "penumbra.log").read_text()
        time.sleep(0.2)
    assert "decode-0 ended by itself with signal SIGKILL" in (folder / "penumbra.log").read_text()
    body = json.dumps({"model": state.model, "prompt": "again", "max_tokens": 2}).encode()
    request = urllib.request.Request(
        f"{state.url}/v1/completions", data=body, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
    assert penumbra("down").returncode == 0
    assert all(process_gone(pid) for pid in [*pids(state), *new])


@pytest.mark.timeout(240)
def test_a_checkpoint_that_can_not_be_served_ends_up_with_78_and_the_reason(penumbra, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    up = penumbra("up", "--port", "0", "--model", str(broken))
    assert up.returncode == 78
    assert "ended by itself with exit code 78" in up.stdout
    assert f"{broken}/config.json" in up.stdout
    assert "Traceback" not in up.stdout
