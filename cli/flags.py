"""Flags that several commands have: declared once, and meaning the same on every one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cli.settings import config_flag, flag, parse_bytes

ConfigFile = Annotated[Path | None, config_flag()]
Cluster = Annotated[str, flag("cluster", "Name of the cluster, where several run on one machine.")]
Home = Annotated[
    Path | None, flag("home", "Folder for models, logs and state, instead of ~/.cache and ~/.local/state.")
]
Host = Annotated[str, flag("host", "Address to listen on.")]
Model = Annotated[Path, flag("model", "Checkpoint folder in the official DeepSeek-V4 layout.")]
ServedName = Annotated[
    str | None,
    flag(
        "served-model-name",
        "The model's name in the API, or several with commas between; else its folder's name.",
        metavar="NAME[,NAME...]",
    ),
]
RedisUrl = Annotated[str, flag("redis", "URL of the Redis that is the registry, or @FILE with the URL in it.")]
Device = Annotated[Literal["cpu", "cuda"], flag("device", "Where the model runs.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    flag("dtype", "Type of products' operands; auto: float32 on a CPU, bfloat16 on a GPU."),
]
Kernels = Annotated[
    Literal["cuda", "triton"],
    flag("kernels", "On a GPU, what computes steps of few tokens: CUDA C++ where it can, or Triton alone."),
]
Backends = Annotated[
    str,
    flag(
        "backends",
        "On a GPU, libraries that compute in place of our own kernels, such as attention=flash-mla; auto: those of the "
        "`peers` extra that are faster at prompts, as far as they are installed; own: none.",
        metavar="auto|own|OP=LIBRARY[,...]",
    ),
]
Graphs = Annotated[bool, flag("graphs", "On a GPU, replay steps of few tokens as CUDA graphs.", switch=True)]
KvLayout = Annotated[
    Literal["v4", "exact"], flag("kv-layout", "v4: production pages; exact: float32 rows, for parity tests.")
]
KvMemory = Annotated[
    int, flag("kv-memory", "Memory for KV pages of one worker, such as 512MiB.", parser=parse_bytes, metavar="BYTES")
]
HostMemory = Annotated[
    int,
    flag(
        "host-memory",
        "Memory for requests that made room for others on a decode worker, such as 2GiB.",
        parser=parse_bytes,
        metavar="BYTES",
    ),
]
PrefixCache = Annotated[
    bool, flag("prefix-cache", "Keep prompts and answers for requests that begin with them.", switch=True)
]
DraftTokens = Annotated[
    Literal["auto", "0", "1", "2", "3"],
    flag("draft-tokens", "Tokens the checkpoint's draft layer guesses a step, if it has one; auto: as many as pay."),
]
MaxRequests = Annotated[int, flag("max-requests", "Requests one worker holds at once.", min=1)]
MaxContext = Annotated[int, flag("max-context", "Longest request in tokens; 0: what the checkpoint allows.", min=0)]
Threads = Annotated[int, flag("threads", "Compute threads of one worker.", min=1)]
Transport = Annotated[Literal["nixl"], flag("transport", "How pages travel.")]
RetainedMemory = Annotated[
    int | None,
    flag(
        "retained-window-memory",
        "Memory for windows kept inside long prefixes, for prompts that part there; else a quarter of the windows.",
        parser=parse_bytes,
        metavar="BYTES",
    ),
]
ChunkTokens = Annotated[int, flag("chunk-tokens", "Tokens of one prompt computed in one step.", min=1)]
AdvertiseHost = Annotated[str, flag("advertise-host", "Host name others dial, where it is not --host.")]
Grace = Annotated[float, flag("grace-s", "Seconds running requests may take to finish after SIGTERM.", min=0)]
MigrationLimit = Annotated[
    int, flag("migration-limit", "Times an answer may move to other workers in its middle; 0: it fails.", min=0)
]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], flag("log-level", "Least severe event to log.")]
TracesEndpoint = Annotated[
    str,
    flag(
        "otlp-traces-endpoint",
        "OTLP/HTTP collector that spans go to, such as http://127.0.0.1:4318/v1/traces; empty: nothing is traced.",
        or_variable="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    ),
]
TestFailpoints = Annotated[
    Path | None, flag("test-failpoints", "For tests: files in this folder make workers fail; see wire/failpoints.py.")
]
WorkerId = Annotated[str | None, flag("worker-id", "Name in the registry; else one is made up.")]
RouterUrl = Annotated[str | None, flag("url", "The router; else that of the cluster on this machine.")]
ApiKey = Annotated[str | None, flag("api-key", "Key to show the router, where it asks for one.")]
GrpcPort = Annotated[int, flag("port", "gRPC port; 0 picks a free one.", min=0, max=65535)]
WorkerHttpPort = Annotated[int, flag("http-port", "Health and metrics port; 0 picks a free one.", min=0, max=65535)]
Keys = Annotated[
    Path | None, flag("keys", "File of tenants and their hashed API keys; without it everybody may do everything.")
]
TlsCert = Annotated[
    Path | None, flag("tls-cert-path", "PEM file of the certificate to serve HTTPS with, and of those that signed it.")
]
TlsKey = Annotated[Path | None, flag("tls-key-path", "PEM file of the certificate's key.")]
Insecure = Annotated[bool, flag("insecure", "Serve others than this machine without API keys.", switch=True)]
Policy = Annotated[
    Literal["expected_ttft", "round_robin", "power_of_two", "least_tokens"],
    flag("policy", "How a pair of workers is chosen."),
]
LocalPrefillTokens = Annotated[
    int,
    flag(
        "local-prefill-tokens",
        "A decode worker computes at most so many tokens of a prompt itself, where that is measured faster; 0: none.",
        min=0,
    ),
]
OnNoPrefill = Annotated[
    Literal["local", "reject"],
    flag("on-no-prefill", "Without any prefill worker: let decode workers compute prompts, or refuse requests."),
]
QueueSize = Annotated[int, flag("queue-size", "Requests that may wait for room on one router.", min=1)]
PrefillBacklog = Annotated[
    float, flag("prefill-backlog-s", "Seconds of prefill's work that may be let in ahead, for each lane.", min=0)
]
SseKeepalive = Annotated[
    float, flag("sse-keepalive-s", "Seconds after which a silent stream gets a sign of life; 0: never.", min=0)
]
JsonKeepalive = Annotated[
    float,
    flag("json-keepalive-s", "Seconds after which an answer that is not streamed says it is coming; 0: never.", min=0),
]
QueueTimeout = Annotated[float, flag("queue-timeout-s", "Seconds a request may wait for room.", min=0)]
HttpPort = Annotated[int, flag("port", "HTTP port of the router; 0 picks a free one.", min=0, max=65535)]
