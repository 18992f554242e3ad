"""What a decode worker is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    engine: EngineConfig
    redis_url: str
    worker_id: str
    host: str = "127.0.0.1"
    port: int = 0  # gRPC; 0 takes a free one
    http_port: int = 0  # health and metrics
    advertise_host: str = ""  # what others dial, where it is not `host`
    transport: Literal["nixl", "loopback"] = "nixl"
    max_waiting: int = 256
    queue_timeout_s: float = 30.0  # how long a request waits for pages
    offer_timeout_s: float = 300.0  # how long a living prefill worker may offer nothing
    growth_tokens: int = 512  # kept free behind each request when another one comes in
    host_memory_bytes: int = 1 << 30  # for requests that made room for others
    draft_tokens: int | None = 0  # verified in one step at most, 0 to 3; None: as many as pay
    local_prefill: bool = True  # compute prompts itself when a router asks for it
    prefix_cache: bool = True  # keep prompts and answers for requests that begin with them
    drain_s: float = 30.0
    log_level: str = "info"
    otlp_traces_endpoint: str = ""  # see `wire.tracing.tracer`
