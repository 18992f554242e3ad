"""The chart as two versions of Helm, the API's own schemas and an operator's auditor see it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from tests.helm.chart import (
    CHART,
    HELMS,
    VALUES,
    WORKLOADS,
    Manifest,
    allowed,
    containers,
    manifests,
    of_kind,
    pod_templates,
    run_helm,
    text_of,
)
from wire.telemetry import WorkerMetrics

KUBERNETES = ("1.31", "1.34", "1.37")
GOLDEN = Path(__file__).parent / "golden"
CUSTOM = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize("values", VALUES)
def test_helm_has_nothing_to_say_against_the_chart(program: str, values: str) -> None:
    done = run_helm(program, "lint", str(CHART), "--strict", "--values", str(CHART / f"values-{values}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", VALUES)
def test_both_helms_render_the_same_and_twice_the_same(values: str) -> None:
    first, second = (manifests(values, program=program) for program in HELMS)
    order = lambda one: (one["kind"], one["metadata"]["name"])  # noqa: E731
    assert sorted(first, key=order) == sorted(second, key=order)
    before = text_of(values)
    text_of.cache_clear()
    assert text_of(values) == before


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUES)
def test_every_manifest_is_one_that_kubernetes_knows(values: str, version: str) -> None:
    checked = 0
    for one in manifests(values):
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)
            checked += 1
    assert checked >= 15


@pytest.mark.parametrize("values", VALUES)
def test_custom_resources_keep_to_their_definitions(values: str) -> None:
    for one in manifests(values):
        if one["kind"] in CUSTOM:
            jsonschema.validate(one, CUSTOM[one["kind"]] | {"additionalProperties": False, "$defs": CUSTOM["$defs"]})
        else:
            group = one["apiVersion"].rpartition("/")[0]
            own = "." not in group or group in ("networking.k8s.io", "rbac.authorization.k8s.io")
            assert own, f"{one['kind']} is not Kubernetes' own and has no schema in custom_resources.yaml"
    if values == "multinode":
        kinds = {one["kind"] for one in manifests(values)}
        assert kinds >= {"LeaderWorkerSet", "ScaledObject", "HTTPRoute", "ServiceMonitor", "PodMonitor"}


@pytest.mark.parametrize("values", VALUES)
def test_the_render_is_the_one_that_was_looked_at(values: str) -> None:
    """After a wanted change: PENUMBRA_UPDATE_GOLDEN=1 make test ARGS=tests/helm, and look at the difference."""
    shown = [one for one in manifests(values) if one["kind"] != "PrometheusRule"]
    for one in shown:
        if one["metadata"]["name"].endswith("-dashboards"):
            one["data"] = sorted(one["data"])
    text = yaml.safe_dump_all(shown, sort_keys=True, width=120)
    path = GOLDEN / f"{values}.yaml"
    if os.environ.get("PENUMBRA_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("router.replicas=-1", "/router/replicas"),
        ("router.replicas=two", "/router/replicas"),
        ("rooter.replicas=1", "rooter"),
        ("pools.decode.replica=1", "replica"),
        ("pools.decode.role=both", "/pools/decode"),
        ("pools.redis.role=decode", "redis"),
        ("poolDefaults.image.tag=latest", "/poolDefaults/image/tag"),
        ("redis.url=redis://:secret@elsewhere:6379", "/redis/url"),
        ("auth.insecure=false", "auth.existingSecret"),
        ("model.source.pvc=models", "model.source: choose exactly one"),
        ("redis.url=redis://elsewhere:6379", "redis: choose exactly one"),
        ("pools.decode=null", "at least one pool of role prefill and one of role decode"),
    ],
)
def test_a_wrong_value_is_refused_in_words_that_name_it(setting: str, complaint: str) -> None:
    done = run_helm(HELMS[-1], "template", "r", str(CHART), "-f", str(CHART / "values-cpu.yaml"), "--set", setting)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_router_serves_tls_from_a_secret_and_is_probed_over_it() -> None:
    found = manifests("cpu", "router.tls.existingSecret=router-tls")
    pod = dict(pod_templates(found))["Deployment/rel-penumbra-router"]["spec"]
    (container,) = pod["containers"]
    (volume,) = [one for one in pod["volumes"] if one.get("secret", {}).get("secretName") == "router-tls"]
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
    env = {one["name"]: one.get("value") for one in container["env"]}
    # The keys that a Secret of type kubernetes.io/tls has, under flags that the command has.
    assert env["PENUMBRA_TLS_CERT_PATH"] == f"{mount['mountPath']}/tls.crt"
    assert env["PENUMBRA_TLS_KEY_PATH"] == f"{mount['mountPath']}/tls.key"
    assert mount["readOnly"]
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[kind]["httpGet"]["scheme"] == "HTTPS"
    (test,) = of_kind(found, "Pod")
    assert '"https://rel-penumbra-router:80/' in test["spec"]["containers"][0]["args"][0]
    assert "router-tls" not in text_of("cpu")


def test_helm_test_shows_a_key_where_one_is_asked_for() -> None:
    (pod,) = of_kind(manifests("8xh200", "auth.testKeySecret=probe"), "Pod")
    (container,) = pod["spec"]["containers"]
    (volume,) = pod["spec"]["volumes"]
    assert volume["secret"]["secretName"] == "probe"
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    assert f'open("{mount["mountPath"]}/key")' in container["args"][0]
    (bare,) = of_kind(manifests("cpu"), "Pod")
    assert "authorization" not in json.dumps(bare)


def test_without_a_word_on_keys_nothing_is_installed() -> None:
    done = run_helm(HELMS[-1], "template", "r", str(CHART), "--set", "model.source.pvc=models")
    assert done.returncode != 0
    assert "auth.insecure=true" in done.stderr


@pytest.mark.parametrize("values", VALUES)
def test_containers_run_without_rights_and_within_limits(values: str) -> None:
    found = manifests(values)
    for where, template in pod_templates(found):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not pod.get("hostNetwork"), where
        rdma = "rdma/" in json.dumps(template)
        for container in containers(template):
            what = f"{where} {container['name']}"
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True, what
            assert rights["allowPrivilegeEscalation"] is False, what
            assert rights["capabilities"]["drop"] == ["ALL"], what
            worker = container["name"] in ("prefill", "decode")
            assert rights["capabilities"].get("add", []) == (["IPC_LOCK"] if rdma and worker else []), what
            assert container["resources"]["limits"]["memory"], what
            assert container["resources"]["requests"]["cpu"], what
            image = container["image"]
            assert "@sha256:" in image or re.search(r":[^:/]+$", image), what
            assert not image.endswith(":latest"), what


@pytest.mark.parametrize("values", VALUES)
def test_no_secret_is_written_down(values: str) -> None:
    found = manifests(values)
    assert not of_kind(found, "Secret")
    for where, template in pod_templates(found):
        for container in containers(template):
            for variable in container.get("env", []):
                assert "secretKeyRef" not in json.dumps(variable), f"{where}: secrets are mounted as files"
                assert not re.search(r"password|token=|://[^@/]*:[^@/]+@", json.dumps(variable), re.I), where
    sources = [one for path in CHART.rglob("*") if path.is_file() for one in path.read_text().splitlines()]
    assert not [line for line in sources if re.search(r"(sk-|hf_)[A-Za-z0-9]{16}|BEGIN [A-Z ]*PRIVATE KEY", line)]


@pytest.mark.parametrize("values", VALUES)
def test_labels_are_those_that_operators_select_by(values: str) -> None:
    for one in manifests(values):
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "penumbra"
        assert labels["app.kubernetes.io/instance"] == "rel"
    roles: set[str] = set()
    for _, template in pod_templates(manifests(values)):
        labels = template["metadata"]["labels"]
        if (role := labels.get("llm-d.ai/role")) is not None:
            roles.add(role)
            assert labels["llm-d.ai/engine-type"] == "penumbra"
            assert labels["llm-d.ai/model"]
    assert roles == {"prefill", "decode"}


@pytest.mark.parametrize("values", VALUES)
def test_selectors_take_their_own_pods_and_no_others(values: str) -> None:
    found = manifests(values)
    pods = {where: template["metadata"]["labels"] for where, template in pod_templates(found)}
    for one in of_kind(found, "Deployment", "StatefulSet", "PodDisruptionBudget", "Service"):
        selector = one["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        taken = [where for where, labels in pods.items() if wanted.items() <= labels.items()]
        assert [where.partition("/")[2] for where in taken] == [one["metadata"]["name"].removesuffix("-admin")]


@pytest.mark.parametrize("values", VALUES)
def test_a_pod_is_given_longer_to_stop_than_it_takes(values: str) -> None:
    for where, template in pod_templates(manifests(values)):
        for container in template["spec"]["containers"]:
            env = {one["name"]: one.get("value") for one in container.get("env", [])}
            if "PENUMBRA_GRACE_S" not in env:
                continue
            before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            grace = template["spec"]["terminationGracePeriodSeconds"]
            assert grace >= before + int(env["PENUMBRA_GRACE_S"]) + 10, where


@pytest.mark.parametrize("values", VALUES)
def test_the_network_lets_through_what_a_request_needs_and_nothing_else(values: str) -> None:
    found = manifests(values)
    pods = {where.partition("/")[2]: template for where, template in pod_templates(found)}
    router = pods["rel-penumbra-router"]["metadata"]["labels"]
    workers = {name: pod for name, pod in pods.items() if "llm-d.ai/role" in pod["metadata"]["labels"]}
    ports = {name: _ports(pod) for name, pod in workers.items()}
    for name, pod in workers.items():
        labels = pod["metadata"]["labels"]
        assert allowed(found, router, labels, ports[name]["grpc"])
        assert not allowed(found, router, labels, 22)
        assert not allowed(found, labels, router, 8000), "a worker has no business with the router"
        for other in workers.values():
            assert allowed(found, labels, other["metadata"]["labels"], 40_000), "UCX takes ports as it likes"
    stranger: Manifest = {"app.kubernetes.io/instance": "other"}
    for pod in workers.values():
        assert not allowed(found, stranger, pod["metadata"]["labels"], 50051)
    assert allowed(found, stranger, router, 8000) is (values != "multinode"), "only multinode names its clients"
    assert not allowed(found, stranger, router, 29000)
    if "rel-penumbra-redis" in pods:
        redis = pods["rel-penumbra-redis"]["metadata"]["labels"]
        assert allowed(found, router, redis, 6379)
        assert all(allowed(found, pod["metadata"]["labels"], redis, 6379) for pod in workers.values())
        assert not allowed(found, stranger, redis, 6379)
    test = pods["rel-penumbra-test"]["metadata"]["labels"]
    assert allowed(found, test, router, 8000)
    assert not any(allowed(found, test, pod["metadata"]["labels"], 50051) for pod in workers.values())


def _ports(template: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}


def test_pools_are_any_number_and_each_its_own_workload() -> None:
    found = manifests(
        "cpu", "pools.long.role=prefill", "pools.long.replicas=3", "pools.long.contextLengthRange=131072-1048576"
    )
    sets = {one["metadata"]["name"]: one for one in of_kind(found, *WORKLOADS)}
    assert set(sets) == {f"rel-penumbra-{name}" for name in ("router", "redis", "prefill", "decode", "long")}
    long = sets["rel-penumbra-long"]
    assert long["spec"]["replicas"] == 3
    assert long["spec"]["template"]["metadata"]["labels"]["llm-d.ai/context-length-range"] == "131072-1048576"
    assert sets["rel-penumbra-prefill"]["spec"]["replicas"] == 1


def test_gpus_and_rdma_are_asked_for_where_a_pool_has_them() -> None:
    found = manifests("multinode")
    (long,) = of_kind(found, "LeaderWorkerSet")
    assert long["spec"]["leaderWorkerTemplate"]["size"] == 2
    (container,) = long["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"]["rdma/ib"] == 8
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env["PENUMBRA_DEVICE"] == "cuda"
    assert env["UCX_NET_DEVICES"].startswith("mlx5_0:1,")
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "/dev/shm" in mounts


def test_each_way_to_bring_the_checkpoint_gives_every_pod_the_same_folder() -> None:
    by_source = {
        "pvc": ("model.source.pvc=models",),
        "hostPath": ("model.source.hostPath=/data/models",),
        "download": ("model.source.download.repository=deepseek-ai/DeepSeek-V4-Flash",),
        "generate": (),
    }
    for source, sets in by_source.items():
        words = [*sets, *(["model.source.generate=null"] if source != "generate" else [])]
        found = manifests("cpu", *words)
        for where, template in pod_templates(found):
            if "redis" in where or "test" in where:
                continue
            (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == "model"]
            expected = {"pvc": "persistentVolumeClaim", "hostPath": "hostPath"}.get(source, "emptyDir")
            assert expected in volume, (source, where)
            assert bool(template["spec"].get("initContainers")) is (source in ("download", "generate")), (source, where)
        opened = [p for p in of_kind(found, "NetworkPolicy") if p["metadata"]["name"].endswith("-download")]
        assert bool(opened) is (source == "download")


def test_scaling_takes_a_role_that_may_do_nothing_else() -> None:
    (role,) = of_kind(manifests("multinode"), "Role")
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == {
        (resource + part, verb)
        for resource in ("statefulsets", "leaderworkersets")
        for part, verbs in {"": ("get", "list"), "/scale": ("get", "patch", "update")}.items()
        for verb in verbs
    }
    named = {name for rule in role["rules"] for name in rule.get("resourceNames", ())}
    assert named == {f"rel-penumbra-{pool}" for pool in ("decode", "prefill-long", "prefill-short")}
    assert not of_kind(manifests("cpu"), "Role")


@pytest.mark.parametrize("values", VALUES)
def test_config_keys_are_flags_of_the_commands_that_read_them(values: str) -> None:
    from typer.main import get_command

    from cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    flags = {name: {p.name for p in commands[name].params} for name in ("router", "prefill", "decode")}
    every = set.union(*flags.values())
    (config,) = [one for one in of_kind(manifests(values), "ConfigMap") if "penumbra.yaml" in one["data"]]
    for key, value in yaml.safe_load(config["data"]["penumbra.yaml"]).items():
        assert set(value) <= flags[key] if isinstance(value, dict) else key in every, key
    for where, template in pod_templates(manifests(values)):
        for container in template["spec"]["containers"]:
            command = (container.get("args") or [""])[0]
            names = [one["name"] for one in container.get("env", []) if one["name"].startswith("PENUMBRA_")]
            unknown = [n for n in names if n.removeprefix("PENUMBRA_").lower() not in flags.get(command, set())]
            assert not unknown, f"{where}: {unknown} would be read by nobody"


def test_pools_scale_by_metrics_that_workers_have() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    known = {sample.name for metric in registry.collect() for sample in metric.samples} | {
        m.name for m in registry.collect()
    }
    asked = {
        name
        for one in of_kind(manifests("multinode"), "ScaledObject")
        for trigger in one["spec"]["triggers"]
        for name in re.findall(r"penumbra_[a-z_]+", trigger["metadata"]["query"])
    }
    assert len(asked) == 3
    assert {name.removesuffix("_bucket") for name in asked} <= known
