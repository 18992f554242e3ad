"""What a prefill worker is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    engine: EngineConfig
    redis_url: str
    worker_id: str
    host: str = "127.0.0.1"
    port: int = 0  # gRPC; 0 takes a free one
    http_port: int = 0  # health and metrics
    advertise_host: str = ""  # what others dial, where it is not `host`
    transport: Literal["nixl", "loopback"] = "nixl"
    chunk_tokens: int = 512  # of one prompt in one step
    max_batch_tokens: int = 1024  # of all prompts in one step
    max_waiting: int = 256
    queue_timeout_s: float = 60.0  # how long a prompt waits for pages
    step_s: float = 0.5  # no step is planned to take longer
    prefix_cache: bool = True  # keep prompts for those that begin with them
    retained_window_bytes: int | None = (
        None  # for places inside long prefixes to resume at; None: a quarter of the pool
    )
    held_bytes: int | None = None  # read prompts kept for another reader while asked to; None: half of the pool
    drain_s: float = 30.0
    log_level: str = "info"
    otlp_traces_endpoint: str = ""  # see `wire.tracing.tracer`
