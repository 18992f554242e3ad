"""The chart's pods as processes of this machine: the same commands, environment, ports and probes, and one answer."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deploy.redis import find_server, free_port
from tests.helm.chart import ROOT, Manifest, allowed, containers, manifests, of_kind, pod_templates

READY_S = 120.0
NAMESPACE_WORDS = {"0.0.0.0": "127.0.0.1", "rel-penumbra-redis:": "127.0.0.1:"}
"""What the cluster's network would make of these words."""


@dataclass
class Pod:
    name: str
    template: Manifest
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ports(self) -> dict[str, int]:
        return {one["name"]: one["containerPort"] for one in self.template["spec"]["containers"][0].get("ports", [])}

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    def listening(self) -> set[int]:
        """TCP ports that the pod's processes listen on."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        found = [one for process in family for one in process.net_connections("tcp")]
        return {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN}


class Node:
    """Runs pod templates: volumes are folders, an image's program is found on this machine."""

    def __init__(self, folder: Path, found: list[Manifest], stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._config = {one["metadata"]["name"]: one["data"] for one in of_kind(found, "ConfigMap")}

    def run(self, name: str, template: Manifest) -> Pod:
        mounts = self._mounts(name, template["spec"])
        for container in template["spec"].get("initContainers", []):
            done = subprocess.run(
                self._command(container, mounts),
                env=self._environment(name, container, mounts),
                capture_output=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr.decode()
        (container,) = template["spec"]["containers"]
        log = self._folder / f"{name}.log"
        process = subprocess.Popen(
            self._command(container, mounts),
            env=self._environment(name, container, mounts),
            stdout=self._stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
        )
        self._stack.callback(_end, process)
        return Pod(name, template, process, log)

    def _mounts(self, name: str, spec: Manifest) -> dict[str, str]:
        """Mount path -> folder."""
        folders = {}
        for volume in spec["volumes"]:
            folder = self._folder / name / volume["name"]
            folder.mkdir(parents=True)
            for key, text in self._config.get(volume.get("configMap", {}).get("name"), {}).items():
                (folder / key).write_text(text)
            folders[volume["name"]] = str(folder)
        mounts = {
            one["mountPath"]: folders[one["name"]] for c in containers({"spec": spec}) for one in c["volumeMounts"]
        }
        mounts.pop("/dev/shm", None)  # this machine has one
        for one in (self._folder / name / "config").glob("*"):
            one.write_text(_translated(one.read_text(), mounts))
        return mounts

    def _command(self, container: Manifest, mounts: dict[str, str]) -> list[str]:
        words = [_translated(word, mounts) for word in container["args"]]
        if words[0] == "valkey-server":
            return [str(find_server()), *words[1:]]
        assert "command" not in container, "the images' entry point is `penumbra`"
        return [sys.executable, "-m", "cli", *words]

    def _environment(self, name: str, container: Manifest, mounts: dict[str, str]) -> dict[str, str]:
        fields = {"metadata.name": name, "status.podIP": "127.0.0.1"}
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for one in container.get("env", []):
            value = one.get("value")
            if value is None:
                value = fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            env[one["name"]] = _translated(value, mounts)
        return env


def _translated(text: str, mounts: dict[str, str]) -> str:
    for word, here in (mounts | NAMESPACE_WORDS).items():
        text = text.replace(word, here)
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def _probe(pod: Pod, kind: str) -> int | None:
    """The status that the kubelet would see; None when nobody answers, or there is no such HTTP probe."""
    asked = pod.template["spec"]["containers"][0][kind]["httpGet"]
    try:
        return httpx.get(f"http://127.0.0.1:{pod.ports[asked['port']]}{asked['path']}", timeout=5).status_code
    except httpx.TransportError:
        return None


@contextmanager
def _cluster(folder: Path) -> Iterator[tuple[list[Manifest], dict[str, Pod]]]:
    ports = [free_port() for _ in range(7)]
    found = manifests(
        "cpu",
        f"router.port={ports[0]}",
        f"router.adminPort={ports[6]}",
        f"redis.port={ports[1]}",
        f"pools.prefill.grpcPort={ports[2]}",
        f"pools.prefill.httpPort={ports[3]}",
        f"pools.decode.grpcPort={ports[4]}",
        f"pools.decode.httpPort={ports[5]}",
    )
    pods: dict[str, Pod] = {}
    with ExitStack() as stack:
        node = Node(folder, found, stack)
        for where, template in pod_templates(found):
            if template["metadata"]["labels"]["app.kubernetes.io/component"] != "test":
                name = where.rpartition("-")[2]
                pods[name] = node.run(f"{name}-0", template)
        yield found, pods


@pytest.mark.timeout(300)
def test_the_cpu_values_run_as_processes_and_answer(tmp_path: Path) -> None:
    with _cluster(tmp_path) as (found, pods):
        assert set(pods) == {"router", "redis", "prefill", "decode"}
        deadline = time.monotonic() + READY_S
        ours = [pods[name] for name in ("router", "prefill", "decode")]
        while any(_probe(pod, "readinessProbe") != 200 for pod in ours):
            for pod in pods.values():
                assert pod.process.poll() is None, f"{pod.name} ended:\n{pod.log.read_text()}"
            assert time.monotonic() < deadline, "\n".join(pod.log.read_text()[-2000:] for pod in ours)
            time.sleep(0.2)
        for pod in ours:
            assert _probe(pod, "livenessProbe") == _probe(pod, "startupProbe") == 200
            door = pod.ports["admin" if pod is pods["router"] else "http"]
            scraped = httpx.get(f"http://127.0.0.1:{door}/metrics", timeout=10)
            assert "penumbra_num_requests_running" in scraped.text
        _ports_are_those_that_the_chart_knows(found, pods)
        assert _answer(found, pods["router"])["usage"]["completion_tokens"] == 4


def _ports_are_those_that_the_chart_knows(found: list[Manifest], pods: dict[str, Pod]) -> None:
    for name, pod in pods.items():
        declared = set(pod.ports.values())
        opened = pod.listening()
        assert declared <= opened, name
        workers = [other for other in pods.values() if "llm-d.ai/role" in other.labels]
        for port in opened - declared:
            # UCX's own: workers reach each other's, nobody else does.
            assert pod in workers, f"{name} opened port {port}, which the chart does not know"
            assert all(allowed(found, other.labels, pod.labels, port) for other in workers)
            assert not allowed(found, pods["router"].labels, pod.labels, port)


def _answer(found: list[Manifest], router: Pod) -> Any:
    """What the chart's own test pod asks, with its own words."""
    (test,) = of_kind(found, "Pod")
    (container,) = test["spec"]["containers"]
    (_, script) = (container["command"], container["args"][0])
    script = script.replace("http://rel-penumbra-router:80/", f"http://127.0.0.1:{router.ports['http']}/")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"{shlex.join(container['command'])}: {done.stderr}"
    return yaml.safe_load(done.stdout)
