"""What the router tells of itself: its models, its health, the workers it knows, its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import fields
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from router.admission import Admission
from router.answers import Json
from router.board import state_of
from router.dialects import json_response
from router.fleet import Fleet, WorkerView
from router.mirror import PrefixMirror
from router.placement import choose, pair_counts, pair_states
from router.preparation import Preparation
from wire.telemetry import RouterMetrics, running_version
from wire.types import WorkerInfo

MOST_PAIRS = 1_024
"""Pairs of workers that are told one by one; of more, only how many there are of each kind."""

_FIELDS = tuple(field.name for field in fields(WorkerInfo))


class Status:
    """The routes that only look. None of them waits for anything."""

    def __init__(
        self,
        preparation: Preparation,
        admission: Admission,
        fleet: Fleet,
        mirror: PrefixMirror,
        metrics: RouterMetrics,
        registry: CollectorRegistry,
    ) -> None:
        self._preparation = preparation
        self._admission = admission
        self._fleet = fleet
        self._mirror = mirror
        self._metrics = metrics
        self._registry = registry
        self._started = int(time.time())

    def routes(self) -> dict[str, Callable[[Request], Coroutine[Any, Any, Response]]]:
        return {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/readiness": self._readiness,
            "/readyz": self._readiness,
            "/metrics": self._show_metrics,
            "/workers": self._workers,
            "/version": self._version,
        } | dict.fromkeys(("/health", "/healthz", "/liveness", "/livez", "/live"), self._liveness)

    async def _models(self, request: Request) -> Response:
        names = self._preparation.intake(request.state.tenant).model_names
        return json_response({"object": "list", "data": [self._model_card(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._preparation.intake(request.state.tenant).check_model(name)
        return json_response(self._model_card(name))

    def _model_card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "penumbra",
            "max_model_len": self._preparation.context(),
        }

    async def _liveness(self, _: Request) -> Response:
        return json_response({"status": "draining" if self._admission.draining else "ok"})

    async def _readiness(self, _: Request) -> Response:
        """200 when a request could be placed now."""
        fleet = self._fleet.snapshot()
        ready = not self._admission.draining and choose(fleet, 1, 1) is not None
        body = {
            "status": "ready" if ready else "not ready",
            "prefill": sum(view.usable for view in fleet.prefill),
            "decode": sum(view.usable for view in fleet.decode),
            "registry_stale_s": round(fleet.registry_stale_s, 3),
        }
        return json_response(body, status=200 if ready else 503)

    async def _workers(self, _: Request) -> Response:
        fleet = self._fleet.snapshot()
        mirrored = self._mirror.num_pages()
        workers = [
            _worker_card(view) | {"mirrored_pages": mirrored.get(view.info.worker_id, 0)}
            for view in (*fleet.prefill, *fleet.decode)
        ]
        counts = pair_counts(fleet)
        body = {
            "workers": workers,
            "num_pairs": counts,
            "pairs": pair_states(fleet) if sum(counts.values()) <= MOST_PAIRS else {},
            "registry_stale_s": round(fleet.registry_stale_s, 3),
        }
        return json_response(body)

    async def _show_metrics(self, _: Request) -> Response:
        fleet = self._fleet.snapshot()
        for role, views in (("prefill", fleet.prefill), ("decode", fleet.decode)):
            self._metrics.workers.labels(role).set(sum(view.usable for view in views))
        self._metrics.worker_health.clear()  # nobody asks after workers that are gone
        for view in (*fleet.prefill, *fleet.decode):
            self._metrics.worker_health.labels(view.info.worker_id, str(view.info.role)).set(view.usable)
        self._metrics.registry_stale.set(fleet.registry_stale_s)
        self._metrics.mirror_pages.clear()  # nobody sums up workers that are gone
        for worker_id, num_pages in self._mirror.num_pages().items():
            self._metrics.mirror_pages.labels(worker_id).set(num_pages)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _version(self, _: Request) -> Response:
        return json_response({"version": running_version()})


def _worker_card(view: WorkerView) -> Json:
    info = view.info
    # Not `asdict`, which copies what is inside, too: with a thousand workers that took a second and a half.
    card = {name: getattr(info, name) for name in _FIELDS}
    return card | {"epoch": f"{info.epoch:016x}", "state": state_of(view)}
