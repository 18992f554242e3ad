"""The chart, rendered by a real Helm, and what the tests ask of a render."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import yaml

from tests.helm.binaries import PACKAGES, ROOT, helm

CHART = ROOT / "deploy" / "helm" / "penumbra"
VALUES = ("cpu", "8xh200", "multinode")
HELMS = tuple(PACKAGES)
NEWEST = HELMS[-1]
WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet")

Manifest = dict[str, Any]


def run_helm(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(helm(name)), *words], capture_output=True, text=True, timeout=60, check=False)


@cache
def text_of(values: str, sets: tuple[str, ...] = (), program: str = NEWEST) -> str:
    """The rendered YAML of one of the values files, with `--set` words over it."""
    words = [word for one in sets for word in ("--set", one)]
    done = run_helm(
        program, "template", "rel", str(CHART), "--namespace", "llm", "--values", str(CHART / f"values-{values}.yaml"),
        *words,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(values: str, *sets: str, program: str = NEWEST) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(text_of(values, sets, program)) if one]


def of_kind(found: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in found if one["kind"] in kinds]


def pod_templates(found: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(kind/name, pod template) of everything that runs."""
    for one in found:
        where = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield where, one["spec"]["template"]
        elif one["kind"] == "LeaderWorkerSet":
            yield where, one["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        elif one["kind"] == "Pod":
            yield where, one


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def matches(selector: Manifest, labels: Manifest) -> bool:
    """Whether a label selector takes a pod with these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        has = labels.get(rule["key"]) in rule.get("values", [])
        if has is not (rule["operator"] == "In"):
            return False
    return True


def allowed(found: Sequence[Manifest], source: Manifest, target: Manifest, port: int) -> bool:
    """Whether the render's NetworkPolicies let a pod labelled `source` open TCP `port` of one labelled `target`."""
    policies = of_kind(found, "NetworkPolicy")
    return all(
        _one_way(policies, direction, own, other, port)
        for direction, own, other in (("Egress", source, target), ("Ingress", target, source))
    )


def _one_way(policies: Sequence[Manifest], direction: str, own: Manifest, other: Manifest, port: int) -> bool:
    ours = [p["spec"] for p in policies if matches(p["spec"]["podSelector"], own)]
    ours = [spec for spec in ours if direction in spec["policyTypes"]]
    if not ours:
        return True
    side = "to" if direction == "Egress" else "from"
    rules = [rule for spec in ours for rule in spec.get(direction.lower(), [])]
    return any(_peers(rule.get(side), other) and _ports(rule.get("ports"), port) for rule in rules)


def _peers(peers: list[Manifest] | None, labels: Manifest) -> bool:
    # A peer in another namespace is nobody of ours.
    return peers is None or any("namespaceSelector" not in p and matches(p["podSelector"], labels) for p in peers)


def _ports(ports: list[Manifest] | None, port: int) -> bool:
    return ports is None or any(one["port"] == port and one.get("protocol") == "TCP" for one in ports)
