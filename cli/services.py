"""Commands that run one service of a cluster, as the container images do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.flags import (
    AdvertiseHost,
    Backends,
    ChunkTokens,
    ConfigFile,
    Device,
    DraftTokens,
    Dtype,
    Grace,
    Graphs,
    GrpcPort,
    Host,
    HostMemory,
    HttpPort,
    Insecure,
    JsonKeepalive,
    Kernels,
    Keys,
    KvLayout,
    KvMemory,
    LocalPrefillTokens,
    LogLevel,
    MaxContext,
    MaxRequests,
    MigrationLimit,
    Model,
    OnNoPrefill,
    Policy,
    PrefillBacklog,
    PrefixCache,
    QueueSize,
    QueueTimeout,
    RedisUrl,
    RetainedMemory,
    ServedName,
    SseKeepalive,
    TestFailpoints,
    Threads,
    TlsCert,
    TlsKey,
    TracesEndpoint,
    Transport,
    WorkerHttpPort,
    WorkerId,
)
from cli.settings import flag, read_secret


def router(
    model: Model,
    redis: RedisUrl,
    config: ConfigFile = None,
    served_model_name: ServedName = None,
    host: Host = "127.0.0.1",
    port: HttpPort = 8000,
    listen_fd: Annotated[
        int | None, flag("listen-fd", "Open listening socket to serve on, instead of --port.", min=0)
    ] = None,
    migration_limit: MigrationLimit = 3,
    keys: Keys = None,
    insecure: Insecure = False,
    tls_cert_path: TlsCert = None,
    tls_key_path: TlsKey = None,
    admin_host: Annotated[str, flag("admin-host", "Address of the administrators' port.")] = "127.0.0.1",
    admin_port: Annotated[
        int | None, flag("admin-port", "Port for what only administrators may see; else --port.", min=0, max=65535)
    ] = None,
    admin_listen_fd: Annotated[
        int | None, flag("admin-listen-fd", "Open listening socket, instead of --admin-port.", min=0)
    ] = None,
    stream_key: Annotated[
        Path | None, flag("stream-key", "File of 32 random bytes or more, the same on all routers: signs stream ids.")
    ] = None,
    expected_routers: Annotated[
        int, flag("expected-routers", "Routers of the cluster, for each one's share of limits without Redis.", min=1)
    ] = 1,
    max_concurrent_requests: Annotated[
        int, flag("max-concurrent-requests", "Requests one router holds at once, waiting ones included.", min=1)
    ] = 1024,
    queue_size: QueueSize = 256,
    queue_timeout_s: QueueTimeout = 60.0,
    prefill_backlog_s: PrefillBacklog = 10.0,
    sse_keepalive_s: SseKeepalive = 5.0,
    json_keepalive_s: JsonKeepalive = 30.0,
    policy: Policy = "expected_ttft",
    local_prefill_tokens: LocalPrefillTokens = 0,
    on_no_prefill: OnNoPrefill = "reject",
    grace_s: Grace = 30.0,
    prometheus_duration_buckets: Annotated[
        str, flag("prometheus-duration-buckets", "Edges in seconds, such as 0.1,1,10,60; else 5 ms to 600 s.")
    ] = "",
    log_level: LogLevel = "info",
    otlp_traces_endpoint: TracesEndpoint = "",
) -> int:
    """Run the router: HTTP in, tokens out. Needs the checkpoint's tokenizer and config, not its weights."""
    from router.config import RouterConfig
    from router.process import run
    from wire.telemetry import TTFT_BUCKETS_S

    try:
        buckets = tuple(float(edge) for edge in prometheus_duration_buckets.split(",") if edge) or TTFT_BUCKETS_S
    except ValueError as error:
        raise typer.BadParameter(f"'{prometheus_duration_buckets}' is no list of seconds such as 0.1,1,10") from error
    return run(
        RouterConfig(
            model=model,
            served_model_names=tuple(served_model_name.split(",")) if served_model_name else (),
            host=host,
            port=port,
            listen_fd=listen_fd,
            admin_listen_fd=admin_listen_fd,
            redis_url=read_secret(redis),
            migration_limit=migration_limit,
            keys_file=keys,
            insecure=insecure,
            tls_cert_path=tls_cert_path,
            tls_key_path=tls_key_path,
            admin_host=admin_host,
            admin_port=admin_port,
            stream_key_file=stream_key,
            expected_routers=expected_routers,
            max_concurrent_requests=max_concurrent_requests,
            queue_size=queue_size,
            queue_timeout_s=queue_timeout_s,
            prefill_backlog_s=prefill_backlog_s,
            sse_keepalive_s=sse_keepalive_s,
            json_keepalive_s=json_keepalive_s,
            policy=policy,
            local_prefill_tokens=local_prefill_tokens,
            on_no_prefill=on_no_prefill,
            shutdown_grace_s=grace_s,
            duration_buckets_s=buckets,
            log_level=log_level,
            otlp_traces_endpoint=otlp_traces_endpoint,
        )
    )


def prefill(
    model: Model,
    redis: RedisUrl,
    config: ConfigFile = None,
    worker_id: WorkerId = None,
    host: Host = "127.0.0.1",
    port: GrpcPort = 50051,
    http_port: WorkerHttpPort = 50052,
    advertise_host: AdvertiseHost = "",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    kernels: Kernels = "cuda",
    backends: Backends = "auto",
    graphs: Graphs = True,
    kv_layout: KvLayout = "v4",
    kv_memory: KvMemory = "1GiB",  # type: ignore[assignment]
    prefix_cache: PrefixCache = True,
    retained_window_memory: RetainedMemory = None,
    draft_tokens: DraftTokens = "auto",
    max_requests: MaxRequests = 64,
    max_context: MaxContext = 0,
    threads: Threads = 1,
    transport: Transport = "nixl",
    chunk_tokens: ChunkTokens = 512,
    grace_s: Grace = 30.0,
    log_level: LogLevel = "info",
    otlp_traces_endpoint: TracesEndpoint = "",
    test_failpoints: TestFailpoints = None,
) -> int:
    """Run a prefill worker: reads prompts, offers their KV pages."""
    from engine.config import EngineConfig
    from prefill_worker.config import PrefillConfig
    from prefill_worker.process import run
    from wire import failpoints

    failpoints.enable(test_failpoints)
    return run(
        PrefillConfig(
            engine=EngineConfig(
                model=model,
                device=device,
                dtype=dtype,
                kernels=kernels,
                backends=backends,
                graphs=graphs,
                kv_layout=kv_layout,
                kv_memory_bytes=kv_memory,
                max_requests=max_requests,
                max_context=max_context,
                threads=threads,
                draft=draft_tokens != "0",
            ),
            host=host,
            port=port,
            http_port=http_port,
            advertise_host=advertise_host,
            redis_url=read_secret(redis),
            worker_id=worker_id or _made_up_name("prefill"),
            transport=transport,
            chunk_tokens=chunk_tokens,
            prefix_cache=prefix_cache,
            retained_window_bytes=retained_window_memory,
            drain_s=grace_s,
            log_level=log_level,
            otlp_traces_endpoint=otlp_traces_endpoint,
        )
    )


def decode(
    model: Model,
    redis: RedisUrl,
    config: ConfigFile = None,
    worker_id: WorkerId = None,
    host: Host = "127.0.0.1",
    port: GrpcPort = 50051,
    http_port: WorkerHttpPort = 50052,
    advertise_host: AdvertiseHost = "",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    kernels: Kernels = "cuda",
    backends: Backends = "auto",
    graphs: Graphs = True,
    kv_layout: KvLayout = "v4",
    kv_memory: KvMemory = "1GiB",  # type: ignore[assignment]
    host_memory: HostMemory = "1GiB",  # type: ignore[assignment]
    prefix_cache: PrefixCache = True,
    draft_tokens: DraftTokens = "auto",
    max_requests: MaxRequests = 64,
    max_context: MaxContext = 0,
    threads: Threads = 1,
    transport: Transport = "nixl",
    grace_s: Grace = 30.0,
    log_level: LogLevel = "info",
    otlp_traces_endpoint: TracesEndpoint = "",
    test_failpoints: TestFailpoints = None,
) -> int:
    """Run a decode worker: pulls pages, draws tokens."""
    from decode_worker.config import DecodeConfig
    from decode_worker.process import run
    from engine.config import EngineConfig
    from wire import failpoints

    failpoints.enable(test_failpoints)
    return run(
        DecodeConfig(
            engine=EngineConfig(
                model=model,
                device=device,
                dtype=dtype,
                kernels=kernels,
                backends=backends,
                graphs=graphs,
                kv_layout=kv_layout,
                kv_memory_bytes=kv_memory,
                max_requests=max_requests,
                max_context=max_context,
                threads=threads,
                draft=draft_tokens != "0",
            ),
            host=host,
            port=port,
            http_port=http_port,
            advertise_host=advertise_host,
            redis_url=read_secret(redis),
            worker_id=worker_id or _made_up_name("decode"),
            transport=transport,
            host_memory_bytes=host_memory,
            draft_tokens=None if draft_tokens == "auto" else int(draft_tokens),
            prefix_cache=prefix_cache,
            drain_s=grace_s,
            log_level=log_level,
            otlp_traces_endpoint=otlp_traces_endpoint,
        )
    )


def _made_up_name(role: str) -> str:
    import secrets

    return f"{role}-{secrets.token_hex(4)}"
