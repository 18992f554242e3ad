"""Scale the pools of a release that the Helm chart installed, through the Kubernetes API.

A pool is the StatefulSet or LeaderWorkerSet labelled penumbra.ai/pool. Kubernetes stops the pods that are too many with
SIGTERM and a grace period longer than a worker needs to hand over what it runs, so scaling down loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from wire.errors import ConfigError, PenumbraError

PART_OF = "app.kubernetes.io/part-of=penumbra"
POOL_LABEL = "penumbra.ai/pool"
POLL_S = 1.0
LWS = {"group": "leaderworkerset.x-k8s.io", "version": "v1", "plural": "leaderworkersets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One pool as the cluster has it. `ready` counts workers that take requests, `present` all that still run."""

    name: str
    workload: str  # of the StatefulSet or LeaderWorkerSet
    spans_nodes: bool
    wanted: int
    ready: int
    present: int

    def has(self, count: int) -> bool:
        return self.wanted == self.ready == self.present == count


class Release:
    """The pools of one release. `client` is a `kubernetes.client.ApiClient`."""

    def __init__(self, client: Any, *, release: str, namespace: str) -> None:
        from kubernetes.client import AppsV1Api, CustomObjectsApi

        self._apps = AppsV1Api(client)
        self._custom = CustomObjectsApi(client)
        self._namespace = namespace
        self._selector = f"{PART_OF},app.kubernetes.io/instance={release},{POOL_LABEL}"
        self._release = release

    def pools(self) -> dict[str, Pool]:
        """By name. Raises PenumbraError when the API refuses or can not be reached."""
        found = [
            Pool(
                name=one.metadata.labels[POOL_LABEL],
                workload=one.metadata.name,
                spans_nodes=False,
                wanted=one.spec.replicas,
                ready=(one.status and one.status.ready_replicas) or 0,
                present=(one.status and one.status.replicas) or 0,
            )
            for one in _asked(
                self._apps.list_namespaced_stateful_set, self._namespace, label_selector=self._selector
            ).items
        ]
        found += [
            Pool(
                name=one["metadata"]["labels"][POOL_LABEL],
                workload=one["metadata"]["name"],
                spans_nodes=True,
                wanted=one["spec"].get("replicas", 1),
                ready=one.get("status", {}).get("readyReplicas", 0),
                present=one.get("status", {}).get("replicas", 0),
            )
            for one in self._groups()
        ]
        return {pool.name: pool for pool in found}

    def scale(self, counts: Mapping[str, int], *, timeout_s: float) -> None:
        """Ask for so many workers in each pool, and wait until they are there and the others gone.

        Raises ConfigError for a pool that the release does not have, before anything is changed, and PenumbraError when
        it takes longer than `timeout_s`.
        """
        pools = self.pools()
        if unknown := sorted(set(counts) - set(pools)):
            raise ConfigError(
                f"The release '{self._release}' in namespace '{self._namespace}' has no pool {', '.join(unknown)}; "
                f"it has {', '.join(sorted(pools)) or 'none at all'}."
            )
        for name, count in counts.items():
            pool, body = pools[name], {"spec": {"replicas": count}}
            if pool.spans_nodes:
                _asked(
                    self._custom.patch_namespaced_custom_object_scale,
                    **LWS,
                    namespace=self._namespace,
                    name=pool.workload,
                    body=body,
                )
            else:
                _asked(self._apps.patch_namespaced_stateful_set_scale, pool.workload, self._namespace, body)
        deadline = time.monotonic() + timeout_s
        while late := [pool for name, pool in self.pools().items() if name in counts and not pool.has(counts[name])]:
            if time.monotonic() > deadline:
                told = "; ".join(f"{p.name}: {p.ready} ready of {p.present}, {counts[p.name]} wanted" for p in late)
                raise PenumbraError(f"Not there after {timeout_s:g} s: {told}. Kubernetes goes on with it.")
            time.sleep(POLL_S)

    def _groups(self) -> list[dict[str, Any]]:
        """LeaderWorkerSets; none where the cluster does not know the kind."""
        from kubernetes.client import ApiException

        try:
            found = _asked(
                self._custom.list_namespaced_custom_object,
                **LWS,
                namespace=self._namespace,
                label_selector=self._selector,
            )
        except PenumbraError as error:
            if isinstance(error.__cause__, ApiException) and error.__cause__.status == 404:
                return []
            raise
        items: list[dict[str, Any]] = found["items"]
        return items


@contextmanager
def connected(client: Any) -> Iterator[Any]:
    """The client for the length of the block. Closing it is not enough: its connections would stay open."""
    try:
        yield client
    finally:
        client.rest_client.pool_manager.clear()
        client.close()


def find_client(context: str | None) -> Any:
    """An API client from the usual kubeconfig, or from inside a pod. Raises ConfigError when there is neither."""
    try:
        from kubernetes import config as untyped
    except ImportError as error:
        raise ConfigError('Scaling on Kubernetes needs its client: make install EXTRAS="k8s".') from error
    config: Any = untyped
    try:
        return config.new_client_from_config(context=context)
    except config.ConfigException as error:
        if context is not None:
            raise ConfigError(f"No usable kubeconfig: {error}.") from error
    from kubernetes.client import ApiClient, Configuration

    inside = Configuration()
    try:
        config.load_incluster_config(client_configuration=inside)
    except config.ConfigException as error:
        raise ConfigError(f"Neither a kubeconfig nor a pod's service account was found: {error}.") from error
    return ApiClient(inside)


def _asked(call: Any, *words: Any, **more: Any) -> Any:
    """One API call with an end, its failure told in our words."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call(*words, **more, _request_timeout=10)
    except ApiException as error:
        raise PenumbraError(f"Kubernetes answered {error.status} {error.reason}; may this account scale?") from error
    except HTTPError as error:
        raise PenumbraError(f"The Kubernetes API can not be reached: {error}.") from error
