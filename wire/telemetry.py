"""What a process tells the people who run it: logs and metrics.

Metric names keep the shapes of vLLM, SGLang and llm-d under the prefix `penumbra_`, so a dashboard ports by
a change of prefix. Nothing is global: every metric lives in the CollectorRegistry its owner was given.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from wire.errors import ConfigError
from wire.types import PageClass, Role

# A prompt of a million tokens may wait minutes for its first token; the edges tell 146 s from 202 s.
TTFT_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45),
    *(60, 90, 120, 150, 180, 240, 300, 420, 600),
)
ITL_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 600),
)
STAGE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025)
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 16_384, 65_536, 131_072, 262_144, 524_288, 1_048_576)
SPEED_BUCKETS_GB_S = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 8, 12, 20, 30, 50, 100, 200, 400)
TRANSFER_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

PAGE_STATES = ("free", "used", "cached", "quarantined")
"""Cached pages hold prefixes that no request uses: as good as free to whoever needs room."""


# Logs


def configure_logging(service: str, worker_id: str = "", level: str = "info", json: bool = False) -> None:
    """One event a line on stderr, `key=value` or JSON, for our own events and the libraries' alike.

    Every event carries `service` and, when given, `worker_id`. Raises ConfigError for an unknown level.
    """
    threshold = logging.getLevelNamesMapping().get(level.upper())
    if threshold is None:
        raise ConfigError(f"log level {level!r} is unknown; use debug, info, warning or error.")
    who = {"service": service} | ({"worker_id": worker_id} if worker_id else {})

    def sign(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        for key, value in who.items():
            event.setdefault(key, value)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        sign,
        # A traceback is one field of its event, newlines escaped by the renderers: still one line.
        structlog.processors.format_exc_info,
    ]
    render: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    )
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        )
    )
    logging.basicConfig(handlers=[handler], level=threshold, force=True)
    for noisy in ("uvicorn.access", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(max(threshold, logging.WARNING))


# Metrics


def running_version() -> str:
    """Of the installed distribution; "unknown" when it runs out of a checkout."""
    try:
        return version("penumbra")
    except PackageNotFoundError:
        return "unknown"


def _count_process(registry: CollectorRegistry) -> None:
    """What every process tells of itself: version, memory, CPU time, open files, tasks."""
    build = Gauge("penumbra_build_info", "Always 1; which version this is", ["version"], registry=registry)
    build.labels(running_version()).set(1)
    ProcessCollector(registry=registry)
    _count_tasks(registry)


def _count_tasks(registry: CollectorRegistry) -> None:
    """Show how many asyncio tasks live; counted where the metrics are read, which is on the loop they belong to."""
    tasks = Gauge("penumbra_asyncio_tasks", "Tasks of the event loop that answers this", registry=registry)
    tasks.set_function(_tasks_now)


def _tasks_now() -> float:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read outside an event loop, as a test or a shell may
        return 0


class RouterMetrics:
    """What the router measures: every time is as its client sees it.

    Labels are bounded: routes and error codes are ours, statuses and reasons few, and series of a worker go with it.
    """

    def __init__(self, registry: CollectorRegistry, durations_s: Sequence[float] = TTFT_BUCKETS_S) -> None:
        """`durations_s`: edges of the histograms of whole requests, and of the longer parts of one."""
        _count_process(registry)
        self.success = Counter(
            "penumbra_request_success_total",
            "Answers that came to their end, by why",
            ["finished_reason"],
            registry=registry,
        )
        self.disconnected = Counter(
            "penumbra_disconnected_clients_total", "Clients that left before their answer's end", registry=registry
        )
        self.tpot = Histogram(
            "penumbra_request_time_per_output_token_seconds",
            "Mean time per token after the first, of each answer",
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.request_prompt_tokens = Histogram(
            "penumbra_request_prompt_tokens", "Prompt tokens of a request", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.request_generation_tokens = Histogram(
            "penumbra_request_generation_tokens", "Tokens of an answer", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.worker_health = Gauge(
            "penumbra_worker_health",
            "Whether a known worker takes requests, as this router sees it",
            ["worker_id", "role"],
            registry=registry,
        )
        self.viewers = Gauge("penumbra_page_viewers", "Front pages that follow this router", registry=registry)
        self.requests = Counter(
            "penumbra_http_requests_total",
            "HTTP requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.errors = Counter(
            "penumbra_request_errors_total", "Failed requests by error code", ["error_code"], registry=registry
        )
        self.moved = Histogram(
            "penumbra_request_move_seconds",
            "What a client waited for when its answer moved to another decode worker: the prompt's pages, the replay.",
            ["part"],
            registry=registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0),
        )
        self.retries = Counter(
            "penumbra_request_retries_total",
            "Attempts after the first, by error code",
            ["error_code"],
            registry=registry,
        )
        self.running = Gauge("penumbra_num_requests_running", "Requests being served", registry=registry)
        self.waiting = Gauge("penumbra_num_requests_waiting", "Requests waiting for a worker pair", registry=registry)
        self.ttft = Histogram(
            "penumbra_time_to_first_token_seconds",
            "From request to first token",
            buckets=durations_s,
            registry=registry,
        )
        self.stage = Histogram(
            "penumbra_stage_duration_seconds",
            "The parts of the time to first token, by stage; of one request they sum to it",
            ["stage"],
            buckets=(*STAGE_BUCKETS_S, *(edge for edge in durations_s if edge > STAGE_BUCKETS_S[-1])),
            registry=registry,
        )
        self.itl = Histogram(
            "penumbra_inter_token_latency_seconds",
            "Between two tokens of one request",
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.e2e = Histogram(
            "penumbra_e2e_request_latency_seconds",
            "From request to last token",
            buckets=durations_s,
            registry=registry,
        )
        self.queue_time = Histogram(
            "penumbra_queue_time_seconds",
            "From request to its placement",
            buckets=durations_s,
            registry=registry,
        )
        self.prompt_tokens = Counter("penumbra_prompt_tokens_total", "Prompt tokens accepted", registry=registry)
        self.generation_tokens = Counter("penumbra_generation_tokens_total", "Tokens delivered", registry=registry)
        self.placements = Counter(
            "penumbra_placement_total",
            "Placed attempts: on two workers or on the decode worker alone, and why",
            ["decision", "reason"],
            registry=registry,
        )
        self.workers = Gauge("penumbra_workers", "Workers known, by role", ["role"], registry=registry)
        self.registry_stale = Gauge("penumbra_registry_stale_seconds", "Age of the worker list", registry=registry)
        self.prefix_events = Counter(
            "penumbra_prefix_events_total",
            "Pages that workers told to have stored or removed, by kind",
            ["kind"],
            registry=registry,
        )
        self.prefix_gaps = Counter(
            "penumbra_prefix_gaps_total",
            "Times a worker's prefix events could not be followed and its snapshot was read",
            registry=registry,
        )
        self.mirror_pages = Gauge(
            "penumbra_prefix_mirror_pages", "Pages each worker is known to hold", ["worker_id"], registry=registry
        )
        self.cached_tokens = Counter(
            "penumbra_prompt_tokens_cached_total", "Prompt tokens found in a prefix cache", registry=registry
        )


class WorkerMetrics:
    """What a worker measures, of either role."""

    def __init__(self, registry: CollectorRegistry) -> None:
        _count_process(registry)
        self._info = Gauge(
            "penumbra_worker_info",
            "Always 1; who answers here, to join with its other series",
            ["worker_id", "role", "model"],
            registry=registry,
        )
        self.transfer_speed = Histogram(
            "penumbra_kv_transfer_speed_gb_s",
            "GB/s of one read job, verification included",
            buckets=SPEED_BUCKETS_GB_S,
            registry=registry,
        )
        self.reading_bytes = Gauge(
            "penumbra_kv_transfer_reading_bytes", "Page bytes of reads that have not ended", registry=registry
        )
        self.running = Gauge("penumbra_num_requests_running", "Requests in the current batch", registry=registry)
        self.waiting = Gauge("penumbra_num_requests_waiting", "Requests not yet computed on", registry=registry)
        self.queued_tokens = Gauge(
            "penumbra_queued_tokens", "Prompt tokens not yet computed (prefill) or fetched (decode)", registry=registry
        )
        self.kv_cache_usage = Gauge(
            "penumbra_kv_cache_usage_perc", "Share of full pages in use, 0 to 1", registry=registry
        )
        self.pages = Gauge(
            "penumbra_pages",
            "Pages by class and state; the states sum to the pool",
            ["page_class", "state"],
            registry=registry,
        )
        self.quarantined = Counter(
            "penumbra_pages_quarantined_total",
            "Destination pages set aside because a read had not settled",
            registry=registry,
        )
        self.prefix_queries = Counter(
            "penumbra_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache", registry=registry
        )
        self.prefix_hits = Counter(
            "penumbra_prefix_cache_hits_total",
            "Prompt tokens found there: not computed again by prefill, not fetched again by decode",
            registry=registry,
        )
        self.preemptions = Counter(
            "penumbra_num_preemptions_total",
            "Requests moved to host memory to make room for others",
            registry=registry,
        )
        self.host_bytes = Gauge(
            "penumbra_preempted_host_bytes", "Page bytes of preempted requests in host memory", registry=registry
        )
        self.draft_tokens = Counter(
            "penumbra_spec_draft_tokens_total", "Tokens drafted and verified", registry=registry
        )
        self.kept_drafts = Counter(
            "penumbra_spec_accepted_tokens_total", "Of those, how many were what was drawn", registry=registry
        )
        self.accept_length = Gauge(
            "penumbra_spec_accept_length",
            "Tokens a request's step with drafts brought of late, the drawn one counted",
            registry=registry,
        )
        self.queue_time = Histogram(
            "penumbra_queue_time_seconds",
            "From arrival to the first step",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.cancel_time = Histogram(
            "penumbra_cancel_seconds",
            "From hearing that a request's client has left to having stopped its work and given its pages up",
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self.step_time = Histogram(
            "penumbra_step_time_seconds", "One step of the engine", buckets=ITL_BUCKETS_S, registry=registry
        )
        self.transfer_bytes = Counter(
            "penumbra_kv_transfer_bytes_total", "Page bytes read from other workers", registry=registry
        )
        self.transfer_time = Histogram(
            "penumbra_kv_transfer_seconds",
            "From submitting a read job to its last verified page",
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self.transfer_exposed = Histogram(
            "penumbra_kv_transfer_exposed_seconds",
            "From the last offer of a prompt's pages to its first token: what computing did not hide",
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self.transfer_failures = Counter(
            "penumbra_kv_transfer_failures_total",
            "Read jobs that failed, by error code",
            ["error_code"],
            registry=registry,
        )
        self.claims = Gauge("penumbra_claims", "Claims that pin pages here", registry=registry)
        self.prompt_tokens = Counter("penumbra_prompt_tokens_total", "Prompt tokens computed", registry=registry)
        self.generation_tokens = Counter("penumbra_generation_tokens_total", "Tokens generated", registry=registry)

    def introduce(self, worker_id: str, role: Role, model: str) -> None:
        """Say once whose metrics these are. `model` is the checkpoint's fingerprint."""
        self._info.labels(worker_id, str(role), model[:16]).set(1)

    def set_pages(self, page_class: PageClass, *, free: int, used: int, quarantined: int, cached: int = 0) -> None:
        """Publish one pool's page counts, and the usage when it is the full pool."""
        for state, count in zip(PAGE_STATES, (free, used, cached, quarantined), strict=True):
            self.pages.labels(page_class, state).set(count)
        total = free + used + cached + quarantined
        if page_class is PageClass.FULL and total:
            self.kv_cache_usage.set((used + quarantined) / total)
