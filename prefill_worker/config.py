"""What a prefill worker is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig
from engine.window import most_window_pages

CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = (2048, 1024)
"""Kernels of a shorter chunk take a GPU less than it takes to launch them; and each chunk reads the weights again."""
AT_ONCE = 8
"""Prompts that windows should be there for, if there may be as many."""


def suitable_chunk(device: str, window_pages: int, max_requests: int) -> int:
    """Tokens of a chunk on this device, for a pool of so many SWA pages: of longer ones each prompt needs more."""
    fits = [n for n in GPU_CHUNK_TOKENS if window_pages // most_window_pages(n) >= min(AT_ONCE, max_requests)]
    return fits[0] if device == "cuda" and fits else CHUNK_TOKENS


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
    chunk_tokens: int | None = None  # of one prompt in one step; None: see `suitable_chunk`
    max_batch_tokens: int = 1024  # of all prompts in one step, or as many as a chunk's
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
