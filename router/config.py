"""What the router is told, and the few facts of the model it needs: no weights, no torch."""

from __future__ import annotations

import ipaddress
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router.gate import GateLimits
from router.placement import PlacementRules, Policy
from wire.errors import ConfigError
from wire.telemetry import TTFT_BUCKETS_S

MAX_BODY_BYTES = 32 << 20
"""A prompt of a million token ids is about 7 MiB of JSON; text of the same length about 5 MiB."""


MAX_BUCKETS = 64
"""Edges of one histogram; each is a series for every label it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """One router process. Times are seconds, sizes bytes; `port` 0 takes a free port.

    `model` is the checkpoint's directory; only its config.json and tokenizer.json are read.
    With no `served_model_names` the model is served under its directory's name.
    """

    model: Path
    redis_url: str
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    listen_fd: int | None = None  # an open listening socket to serve on instead, which its owner may give to others too
    namespace: str = "penumbra"
    router_id: str = "router"

    max_context: int = 0  # tokens, prompt and answer together; 0: what the checkpoint allows
    max_body_bytes: int = MAX_BODY_BYTES
    long_body_bytes: int = 256 << 10  # bodies above this are read in a process of their own
    max_concurrent_requests: int = 1024
    default_thinking: bool = False  # chat requests that do not say

    max_attempts: int = 3  # tries of one request before its first token
    migration_limit: int = 3  # times an answer may move to other workers after it; 0: it fails instead
    migration_patience_s: float = 5.0  # how long such an answer waits for workers while there are none
    admission_timeout_s: float = 30.0  # Decode.Start to Admitted
    prefill_queue_timeout_s: float = 120.0  # Prefill.Run to its first Progress
    prefill_silence_s: float = 30.0  # between two Progress messages, and from the last one to token 0
    token_silence_s: float = 5.0  # between two tokens: this, or `token_silence_factor` median gaps
    token_silence_factor: float = 10.0
    header_s: float = 10.0  # from a request's first byte to the end of its headers
    body_silence_s: float = 10.0  # between two pieces of a request body
    client_stall_s: float = 60.0  # a client that stops reading its stream
    sse_keepalive_s: float = 5.0  # a stream is never silent for longer; 0: it may be
    json_keepalive_s: float = 30.0  # an answer that is not streamed says by then that it is on its way; 0: not at all
    shutdown_grace_s: float = 30.0  # running requests may take this long after SIGTERM

    keys_file: Path | None = None  # tenants and their keys; None: everybody may do everything
    insecure: bool = False  # serve others than this machine without keys
    tls_cert_path: Path | None = None  # what `port` is served with over TLS, with tls_key_path; None: plain HTTP
    tls_key_path: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # for what only administrators may see; None: on `port`, for their keys
    admin_listen_fd: int | None = None  # as `listen_fd`, instead of `admin_port`
    stream_key_file: Path | None = None  # what signs stream ids, alike on all routers; None: good for this one alone
    expected_routers: int = 1  # what each router's share of a limit goes by while Redis is away

    queue_size: int = 256  # requests that may wait for room
    queue_tokens: int = 8_000_000  # and their prompts
    queue_timeout_s: float = 60.0
    prefill_backlog_s: float = 10.0  # of prefill's work that may be let in ahead, for each lane
    lane_edges: tuple[int, ...] = (8_192, 131_072)  # prompts of so many tokens are in the next lane
    policy: Policy = "expected_ttft"  # how a pair of workers is chosen
    local_prefill_tokens: int = 0  # a decode worker computes at most so many of a prompt itself, where that is faster
    on_no_prefill: Literal["local", "reject"] = "reject"  # what becomes of requests without any prefill worker

    registry_poll_s: float = 0.5
    duration_buckets_s: tuple[float, ...] = TTFT_BUCKETS_S  # edges of the histograms of requests' durations
    log_level: str = "info"
    log_json: bool = False
    otlp_traces_endpoint: str = ""  # see `wire.tracing.tracer`

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.served_model_names or (self.model.resolve().name,)

    @property
    def gate(self) -> GateLimits:
        return GateLimits(
            lane_edges=self.lane_edges,
            max_waiting=self.queue_size,
            max_waiting_tokens=self.queue_tokens,
            timeout_s=self.queue_timeout_s,
            backlog_s=self.prefill_backlog_s,
        )

    @property
    def placement(self) -> PlacementRules:
        return PlacementRules(
            policy=self.policy, local_prefill_tokens=self.local_prefill_tokens, on_no_prefill=self.on_no_prefill
        )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} is not a TCP port. Set it to 1..65535, or 0 for a free one.")
        for name in ("max_body_bytes", "max_concurrent_requests", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} leaves nothing to serve. Set it to 1 or more.")
        for name in ("sse_keepalive_s", "json_keepalive_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is no interval. Set it to seconds, or 0 for none.")
        if self.migration_limit < 0:
            raise ConfigError(f"migration_limit={self.migration_limit} is no number of times. Set it to 0 or more.")
        if self.keys_file is None and not self.insecure:
            for host in (self.host, self.admin_host):
                if not is_inside(host):
                    raise ConfigError(
                        f"Without API keys anybody who reaches {host} could use this router. Give it keys with --keys "
                        "FILE, listen on 127.0.0.1, or say --insecure if something else keeps strangers out."
                    )
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ConfigError("TLS takes a certificate and its key. Give both --tls-cert-path and --tls-key-path.")
        edges = self.duration_buckets_s
        rise = all(low < high for low, high in itertools.pairwise((0.0, *edges, math.inf)))
        if not rise or not 0 < len(edges) <= MAX_BUCKETS:
            raise ConfigError(
                f"duration_buckets_s={edges} are no edges of a histogram. Give 1 to {MAX_BUCKETS} seconds above 0, "
                "each more than the one before."
            )
        if any(not name for name in self.served_model_names):
            raise ConfigError("served_model_names holds an empty name. Give each name at least one character.")


def is_inside(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The part of config.json that text and admission depend on."""

    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, directory: Path) -> ModelFacts:
        """Raises ConfigError naming the file and the key."""
        path = directory / "config.json"
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} can not be read: {error}. Point the router at a DeepSeek-V4 checkpoint directory."
            ) from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, not an object. Restore the checkpoint's file.")
        eos = data.get("eos_token_id")
        return cls(
            vocab_size=_count(path, data, "vocab_size"),
            max_context=_count(path, data, "max_position_embeddings"),
            bos_token_id=None if data.get("bos_token_id") is None else _count(path, data, "bos_token_id", least=0),
            eos_token_ids=tuple(_token_id(path, value) for value in (eos if isinstance(eos, list) else [eos])),
        )


def _count(path: Path, data: dict[str, object], key: str, *, least: int = 1) -> int:
    value = data.get(key)
    if type(value) is not int or value < least:
        raise ConfigError(f"{path}: {key} is {value!r}, expected an integer >= {least}. Restore the checkpoint's file.")
    return value


def _token_id(path: Path, value: object) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(f"{path}: eos_token_id holds {value!r}, expected token ids. Restore the checkpoint's file.")
    return value
