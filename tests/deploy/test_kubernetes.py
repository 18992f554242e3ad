"""Scaling pools against a server that speaks the Kubernetes API over real HTTP and remembers what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import kmock
import pytest
from kubernetes.client import ApiClient, Configuration

from deploy.kubernetes import Release, connected
from wire.errors import ConfigError, PenumbraError

NAMESPACE = "llm"


def workload(kind: str, pool: str, replicas: int, release: str = "rel") -> dict[str, Any]:
    labels = {
        "app.kubernetes.io/part-of": "penumbra",
        "app.kubernetes.io/instance": release,
        "penumbra.ai/pool": pool,
    }
    name = f"{release}-penumbra-{pool}"
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "worker", "image": "penumbra"}]}}
    spec: dict[str, Any] = {"replicas": replicas}
    if kind == "StatefulSet":
        spec |= {"serviceName": name, "selector": {"matchLabels": labels}, "template": pod}
    else:
        spec |= {"leaderWorkerTemplate": {"size": 2, "workerTemplate": pod}}
    status = {"replicas": replicas, "readyReplicas": replicas}
    return {
        "apiVersion": "apps/v1" if kind == "StatefulSet" else "leaderworkerset.x-k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": spec,
        "status": status,
    }


def client_of(url: str, **settings: Any) -> ApiClient:
    configuration = Configuration()
    configuration.host = url.rstrip("/")
    for name, value in settings.items():
        setattr(configuration, name, value)
    return ApiClient(configuration)


STATEFUL = kmock.resource("apps", "v1", "statefulsets")
GROUPS = kmock.resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")


class Cluster:
    """What the API knows, and a controller that brings workers up and down by one at a time."""

    def __init__(self, server: kmock.KubernetesEmulator, client: ApiClient) -> None:
        self._server = server
        self.client = client
        self.obeys = True

    def add(self, kind: str, pool: str, replicas: int) -> None:
        resource = STATEFUL if kind == "StatefulSet" else GROUPS
        manifest = workload(kind, pool, replicas)
        self._server.resources[resource] = kmock.ResourceInfo(namespaced=True, kind=kind, subresources={"scale"})
        self._server.objects[resource, NAMESPACE, manifest["metadata"]["name"]] = manifest

    async def scale(self, counts: dict[str, int], timeout_s: float = 30.0) -> None:
        release = Release(self.client, release="rel", namespace=NAMESPACE)
        await asyncio.to_thread(release.scale, counts, timeout_s=timeout_s)

    async def control(self) -> None:
        """Until cancelled: the part of Kubernetes that the server does not play."""
        while True:
            await asyncio.sleep(0.02)
            for one in self._server.objects.values():
                raw = one.raw
                now, wanted = raw["status"]["replicas"], raw["spec"]["replicas"]
                if self.obeys and now != wanted:
                    now += 1 if wanted > now else -1
                    one.patch({"status": {"replicas": now, "readyReplicas": now}})

    def asked(self) -> list[str]:
        return [f"{one.method.value} {one.url.path}?{one.url.query_string}" for one in self._server]

    def count(self, resource: kmock.resource, pool: str) -> int:
        return int(self._server.objects[resource, NAMESPACE, f"rel-penumbra-{pool}"].raw["status"]["replicas"])


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with kmock.KubernetesEmulator() as server, kmock.Server(server) as door:
        with connected(client_of(str(door.url))) as client:
            found = Cluster(server, client)
            found.add("StatefulSet", "prefill", 2)
            found.add("StatefulSet", "decode", 1)
            async with asyncio.TaskGroup() as tasks:
                control = tasks.create_task(found.control())
                yield found
                control.cancel()


async def test_pools_are_scaled_and_waited_for_until_their_workers_are_there_and_the_others_gone(
    cluster: Cluster,
) -> None:
    await cluster.scale({"prefill": 1, "decode": 3})
    assert cluster.count(STATEFUL, "prefill") == 1
    assert cluster.count(STATEFUL, "decode") == 3
    patched = [one for one in cluster.asked() if one.startswith("PATCH")]
    assert len(patched) == 2
    assert all("/scale?" in one for one in patched), "a Role for the scale subresource is enough"
    listed = next(one for one in cluster.asked() if one.startswith("GET"))
    assert "instance%3Drel" in listed


async def test_workers_that_span_nodes_are_scaled_by_their_groups(cluster: Cluster) -> None:
    cluster.add("LeaderWorkerSet", "prefill-long", 1)
    await cluster.scale({"prefill-long": 2})
    assert cluster.count(GROUPS, "prefill-long") == 2
    assert cluster.count(STATEFUL, "prefill") == 2


async def test_a_pool_that_is_not_there_is_refused_before_anything_changes(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="has no pool prefil; it has decode, prefill"):
        await cluster.scale({"decode": 5, "prefil": 1})
    assert not [one for one in cluster.asked() if one.startswith("PATCH")]


async def test_a_cluster_that_does_not_follow_is_told_of_in_time(cluster: Cluster) -> None:
    cluster.obeys = False
    with pytest.raises(PenumbraError, match="decode: 1 ready of 1, 4 wanted"):
        await cluster.scale({"decode": 4}, timeout_s=0.5)


async def test_an_api_that_is_not_there_is_told_of_in_one_line() -> None:
    with connected(client_of("http://127.0.0.1:9", retries=False)) as client:
        release = Release(client, release="rel", namespace=NAMESPACE)
        with pytest.raises(PenumbraError, match="can not be reached"):
            await asyncio.to_thread(release.pools)


async def test_a_client_that_was_let_go_holds_no_connection(cluster: Cluster) -> None:
    await cluster.scale({"decode": 1})
    pools = cluster.client.rest_client.pool_manager.pools
    assert len(pools) == 1
    with connected(cluster.client):
        pass
    assert len(pools) == 0
