"""`penumbra`: every command, its flags, and how it ends.

Flags that several commands have are in cli/flags.py, benchmarks in cli/bench.py, load tests in cli/loadtest.py. What a
command needs is imported when it runs, so that `penumbra --help` costs no torch. Errors a user can mend end in one line
and exit code 78.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import bench, loadtest, plan, services, training
from cli.flags import (
    ApiKey,
    Backends,
    Cluster,
    ConfigFile,
    Device,
    DraftTokens,
    Dtype,
    Grace,
    Graphs,
    Home,
    Host,
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
    OnNoPrefill,
    Policy,
    PrefillBacklog,
    PrefixCache,
    QueueSize,
    QueueTimeout,
    RouterUrl,
    ServedName,
    SseKeepalive,
    TestFailpoints,
    Threads,
    TracesEndpoint,
    Transport,
)
from cli.settings import dump, effective, flag, integers, parse_bytes, variable
from wire.errors import ConfigError, PenumbraError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve DeepSeek-V4 as a disaggregated prefill/decode cluster. Every flag has an environment variable "
    "PENUMBRA_<FLAG> and a key in one config file.",
)
model_app = typer.Typer(no_args_is_help=True, help="Checkpoints: write a small random one, look into one.")
config_app = typer.Typer(no_args_is_help=True, help="What the flags, the environment and the config file add up to.")
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
app.add_typer(bench.app, name="bench")
app.add_typer(loadtest.app, name="loadtest")
app.command("train")(training.train)
app.command("eval")(training.evaluate)
model_app.command("export")(training.export_run)
app.command("plan")(plan.plan)

# The cluster on this machine.


@app.command()
def up(
    context: typer.Context,
    config: ConfigFile = None,
    model: Annotated[Path | None, flag("model", "Checkpoint folder; else the small model that comes along.")] = None,
    served_model_name: ServedName = None,
    prefill: Annotated[int, flag("prefill", "Prefill workers.", min=1)] = 1,
    decode: Annotated[int, flag("decode", "Decode workers.", min=1)] = 1,
    routers: Annotated[int, flag("routers", "Routers, on --port and the ports after it.", min=1)] = 1,
    host: Host = "127.0.0.1",
    port: HttpPort = 8000,
    keys: Keys = None,
    insecure: Insecure = False,
    policy: Policy = "expected_ttft",
    local_prefill_tokens: LocalPrefillTokens = 0,
    on_no_prefill: OnNoPrefill = "reject",
    queue_size: QueueSize = 256,
    queue_timeout_s: QueueTimeout = 60.0,
    prefill_backlog_s: PrefillBacklog = 10.0,
    sse_keepalive_s: SseKeepalive = 5.0,
    json_keepalive_s: JsonKeepalive = 30.0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    kernels: Kernels = "cuda",
    backends: Backends = "auto",
    graphs: Graphs = True,
    kv_layout: KvLayout = "v4",
    kv_memory: KvMemory = "1GiB",  # type: ignore[assignment]
    prefix_cache: PrefixCache = True,
    draft_tokens: DraftTokens = "auto",
    max_requests: MaxRequests = 64,
    max_context: MaxContext = 0,
    threads: Threads = 1,
    transport: Transport = "nixl",
    redis: Annotated[str | None, flag("redis", "URL of a running Redis; else one is started and stopped.")] = None,
    cluster: Cluster = "default",
    home: Home = None,
    log_level: LogLevel = "info",
    otlp_traces_endpoint: TracesEndpoint = "",
    ready_timeout_s: Annotated[float, flag("ready-timeout-s", "Give up when not ready by then.", min=1)] = 300.0,
    grace_s: Grace = 10.0,
    restart_pause_s: Annotated[
        float, flag("restart-pause-s", "Longest pause before who keeps dying is started again.", min=0)
    ] = 30.0,
    migration_limit: MigrationLimit = 3,
    test_failpoints: TestFailpoints = None,
    on: Annotated[
        Literal["local", "ray"], flag("on", "Where the workers run: this machine, or where Ray places them.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        flag(
            "ray-address",
            "Ray cluster that this machine is a node of, such as 10.0.0.7:6379; else a Ray of one node is started.",
        ),
    ] = None,
    worker_cpus: Annotated[
        float | None,
        flag(
            "worker-cpus", "CPUs that Ray sets aside for a worker, fractions allowed; else as many as --threads.", min=0
        ),
    ] = None,
    detach: Annotated[bool, flag("detach", "Return once ready; `penumbra down` stops it.", switch=True)] = False,
    echo: Annotated[
        bool, flag("echo", "Repeat what every process writes; else it is in their logs alone.", switch=True)
    ] = True,
) -> int:
    """Run a whole cluster: Redis, a router, prefill and decode workers."""
    from rich.console import Console

    from deploy.cluster import ClusterConfig, RayConfig, run, start_detached

    if on != "ray" and ray_address is not None:
        raise typer.BadParameter("--ray-address is for a cluster --on ray")
    shared = (
        *("--grace-s", str(grace_s), "--log-level", log_level, "--otlp-traces-endpoint", otlp_traces_endpoint),
        *(("--config", str(config)) if config else ()),
    )
    settings = ClusterConfig(
        cluster=cluster,
        home=home,
        model=model,
        served_model_name=served_model_name,
        prefill=prefill,
        decode=decode,
        routers=routers,
        keys=keys,
        host=host,
        port=port,
        redis=redis,
        worker_flags=(
            *("--device", device, "--dtype", dtype, "--kv-layout", kv_layout, "--kv-memory", str(kv_memory)),
            *("--kernels", kernels, "--backends", backends, "--graphs" if graphs else "--no-graphs"),
            "--prefix-cache" if prefix_cache else "--no-prefix-cache",
            *("--draft-tokens", draft_tokens),
            *("--max-requests", str(max_requests), "--max-context", str(max_context), "--transport", transport),
            *(("--test-failpoints", str(test_failpoints)) if test_failpoints else ()),
            *shared,
        ),
        echo=echo,
        router_flags=(
            *("--migration-limit", str(migration_limit)),
            *("--policy", policy, "--local-prefill-tokens", str(local_prefill_tokens)),
            *("--on-no-prefill", on_no_prefill),
            *("--queue-size", str(queue_size), "--queue-timeout-s", str(queue_timeout_s)),
            *("--prefill-backlog-s", str(prefill_backlog_s)),
            *("--sse-keepalive-s", str(sse_keepalive_s), "--json-keepalive-s", str(json_keepalive_s)),
            "--insecure" if insecure else "--no-insecure",
            *shared,
        ),
        threads=threads,
        ready_timeout_s=ready_timeout_s,
        grace_s=grace_s,
        restart_pause_s=restart_pause_s,
        ray=RayConfig(
            address=ray_address,
            worker_cpus=float(threads) if worker_cpus is None else worker_cpus,
            worker_gpus=1.0 if device == "cuda" else 0.0,
        )
        if on == "ray"
        else None,
    )
    if detach:
        # The same words once more; of two contradicting switches the last one counts.
        return start_detached(settings, (*context.obj, "--no-detach", "--no-echo"), Console())
    return run(settings, Console())


@app.command()
def down(cluster: Cluster = "default", home: Home = None, config: ConfigFile = None) -> int:
    """Stop a cluster that `penumbra up` started, wherever it runs on this machine."""
    from deploy.state import cluster_folder, stop

    killed = stop(cluster_folder(home, cluster))
    if killed is None:
        print(f"the cluster '{cluster}' is not up")
    elif killed:
        print(f"stopped; these did not stop by themselves and were killed: {', '.join(killed)}")
    else:
        print("stopped")
    return 0


@app.command()
def status(
    watch: Annotated[bool, flag("watch", "Go on, once a second, until Ctrl-C.", switch=True)] = False,
    url: RouterUrl = None,
    api_key: ApiKey = None,
    cluster: Cluster = "default",
    home: Home = None,
    config: ConfigFile = None,
) -> int:
    """Who is alive and what each holds. Exit code 3 when the cluster is not up, 1 when a part of it is dead.

    With --watch or --url it shows what the router knows, wherever that runs.
    """
    from rich.console import Console

    from cli.remote import find_url
    from deploy.state import cluster_folder, show_status

    if not watch and url is None:
        return show_status(cluster_folder(home, cluster), cluster, Console())
    from cli.watch import run

    return run(find_url(url, home, cluster), api_key, Console(), rounds=None if watch else 1)


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="What to say; without it, a conversation.")] = None,
    url: RouterUrl = None,
    api_key: ApiKey = None,
    served_model_name: ServedName = None,
    system: Annotated[str | None, flag("system", "System prompt.")] = None,
    max_tokens: Annotated[int | None, flag("max-tokens", "Longest answer in tokens.", min=1)] = None,
    temperature: Annotated[float | None, flag("temperature", "0 always takes the likeliest token.", min=0)] = None,
    thinking: Annotated[bool, flag("thinking", "Let the model reason first.", switch=True)] = False,
    cluster: Cluster = "default",
    home: Home = None,
    config: ConfigFile = None,
) -> int:
    """Talk to a cluster. Answers stream; after each, a line shows where its time went."""
    from rich.console import Console

    from cli.chat import run
    from cli.remote import find_url

    options = {
        "model": served_model_name,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }
    return run(find_url(url, home, cluster), api_key, message, options, system, Console())


@app.command()
def doctor(
    url: RouterUrl = None,
    api_key: ApiKey = None,
    expect: Annotated[
        Literal["auto", "rdma", "any"],
        flag("expect", "What pages must move over; auto: RDMA between hosts where both have it up."),
    ] = "auto",
    probe_bytes: Annotated[
        int, flag("probe-bytes", "Bytes of one large read.", parser=parse_bytes, metavar="BYTES")
    ] = "64MiB",  # type: ignore[assignment]
    worker: Annotated[str | None, flag("worker", "Only the pairs of this worker.")] = None,
    cluster: Cluster = "default",
    home: Home = None,
    config: ConfigFile = None,
) -> int:
    """Read pages over every prefill-decode pair: transport, GB/s, latency, layout, and what 900K tokens would take.

    Exit code 1 when a pair does not move pages, or moves them over TCP where RDMA was expected.
    """
    from rich.console import Console

    from cli.doctor import run
    from cli.remote import find_url

    address = find_url(url, home, cluster)
    return run(address, api_key, expect=expect, num_bytes=probe_bytes, only=worker, console=Console())


@app.command()
def key(config: ConfigFile = None) -> int:
    """Make an API key: the key itself on the first line, and on the second what to put in the file of --keys."""
    from router.tenants import new_key

    print(*new_key(), sep="\n")
    return 0


@app.command()
def scale(
    wanted: Annotated[list[str], typer.Argument(help="Such as prefill=3 decode=2.", show_default=False)],
    on: Annotated[
        Literal["local", "ray", "kubernetes"],
        flag("on", "What runs the cluster: `up` on this machine, or a Helm release, any pool of which scales."),
    ] = "local",
    cluster: Cluster = "default",
    home: Home = None,
    release: Annotated[str, flag("release", "Helm release on Kubernetes.")] = "penumbra",
    namespace: Annotated[str, flag("namespace", "Its namespace.")] = "default",
    kube_context: Annotated[
        str | None, flag("kube-context", "Context of the kubeconfig; else its current one.")
    ] = None,
    timeout_s: Annotated[float, flag("timeout-s", "Give up when not there by then.", min=1)] = 300.0,
    config: ConfigFile = None,
) -> int:
    """Have more or fewer workers in a running cluster. New ones join when ready; those that go finish or hand over."""
    counts: dict[str, int] = {}
    for word in wanted:
        pool, _, count = word.partition("=")
        if not pool or not count.isdecimal() or int(count) < 1:
            raise typer.BadParameter(f"'{word}' is not POOL=N with N of 1 or more, such as decode=2")
        counts[pool] = int(count)
    if on == "kubernetes":
        from deploy import kubernetes

        with kubernetes.connected(kubernetes.find_client(kube_context)) as client:
            kubernetes.Release(client, release=release, namespace=namespace).scale(counts, timeout_s=timeout_s)
    else:
        if unknown := sorted(set(counts) - {"prefill", "decode"}):
            raise typer.BadParameter(f"a cluster of `penumbra up` has no pool {unknown[0]}, only prefill and decode")
        from deploy import state

        state.scale(state.cluster_folder(home, cluster), cluster, counts, timeout_s=timeout_s)
    print(" ".join(f"{pool}={count}" for pool, count in counts.items()))
    return 0


@app.command()
def restart(
    cluster: Cluster = "default",
    home: Home = None,
    timeout_s: Annotated[float, flag("timeout-s", "Give up when not done by then.", min=1)] = 600.0,
    config: ConfigFile = None,
) -> int:
    """Replace every process of a running cluster, one after another. Requests go on meanwhile."""
    from deploy.state import cluster_folder, restart

    names = restart(cluster_folder(home, cluster), cluster, timeout_s=timeout_s)
    print("restarted: " + " ".join(names))
    return 0


@app.command()
def chaos(
    only: Annotated[list[str] | None, typer.Argument(help="Such as F07 F13 kills pairs; else all of them.")] = None,
    resume: Annotated[bool, flag("resume", "Leave out what held at this very commit.", switch=True)] = False,
    streams: Annotated[int, flag("streams", "Answers to kill workers under, at least.", min=1)] = 2_000,
    kills: Annotated[int, flag("kills", "Workers to kill meanwhile, at least.", min=1)] = 200,
    steady_s: Annotated[float, flag("steady-s", "Seconds between the cluster being whole and the next kill.")] = 0.5,
    prefill: Annotated[int, flag("prefill", "Prefill workers.", min=1)] = 2,
    decode: Annotated[int, flag("decode", "Decode workers.", min=1)] = 2,
    clients: Annotated[int, flag("clients", "Answers asked for at once meanwhile.", min=1)] = 16,
    pairs: Annotated[int, flag("pairs", "Pairs of faults to do.", min=1)] = 20,
    seed: Annotated[int, flag("seed", "Draws the pairs.")] = 1,
    idle_s: Annotated[float, flag("idle-s", "Seconds of silence for F53.", min=0)] = 1_800.0,
    into: Annotated[Path | None, flag("into", "Folder for faults.md and its rows; else those of the checkout.")] = None,
    strike: Annotated[
        str | None, flag("strike", "Do this one thing to the running --cluster instead, such as decode-killed.")
    ] = None,
    cluster: Cluster = "default",
    home: Home = None,
    config: ConfigFile = None,
) -> int:
    """Break a cluster of its own in every known way, compare its answers, and write docs/faults.md. From a checkout.

    With --strike, break a running cluster once, for a load test or an operator who wants to see it heal.
    """
    if strike is not None:
        from chaos.strike import do
        from deploy.state import cluster_folder

        print(do(strike, cluster_folder(home, cluster)))
        return 0
    from chaos.run import Plan, run

    return run(
        Plan(
            only=tuple(only or ()),
            resume=resume,
            streams=streams,
            kills=kills,
            steady_s=steady_s,
            prefill=prefill,
            decode=decode,
            clients=clients,
            pairs=pairs,
            seed=seed,
            idle_s=idle_s,
            into=into,
        )
    )


# Single services.

for service in (services.router, services.prefill, services.decode):
    app.command()(service)


# Checkpoints.


@model_app.command()
def tiny(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    seed: Annotated[int, flag("seed", "The same seed writes the same bytes.")] = 0,
    layers: Annotated[str | None, flag("layers", "Compress ratio of each layer, such as 0,4,128,4.")] = None,
    hidden: Annotated[int, flag("hidden", "Hidden size.", min=1)] = 256,
    heads: Annotated[int, flag("heads", "Query heads.", min=1)] = 4,
    index_heads: Annotated[int, flag("index-heads", "Heads of the indexer.", min=1)] = 4,
    experts: Annotated[int, flag("experts", "Routed experts.", min=1)] = 16,
    hash_layers: Annotated[int | None, flag("hash-layers", "First layers that route by token id.", min=0)] = None,
    vocab: Annotated[int | None, flag("vocab", "Vocabulary size; else what the tokenizer needs.", min=1)] = None,
    like: Annotated[
        Literal["flash", "pro"] | None, flag("like", "Take the layer pattern and top-k of this DeepSeek-V4.")
    ] = None,
    config: ConfigFile = None,
) -> int:
    """Write a small random checkpoint in the official DeepSeek-V4 layout."""
    ratios = integers("--layers", layers, "0,4,128,4") if layers else None
    from engine.model.tiny import write_tiny

    written = write_tiny(
        out,
        seed=seed,
        layers=ratios,
        hidden=hidden,
        heads=heads,
        index_heads=index_heads,
        experts=experts,
        hash_layers=hash_layers,
        vocab=vocab,
        like=like,
    )
    print(written)
    return 0


@model_app.command("inspect")
def inspect_model(
    directory: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    config: ConfigFile = None,
) -> int:
    """Geometry, bytes per token, what fits on which GPU, what is missing or corrupt. Exit code 78 for problems."""
    from rich.console import Console

    from engine.model.inspect import inspect, render

    found = inspect(directory)
    Console().print(render(found))
    return ConfigError.exit_code if found.problems else 0


@config_app.command(
    "dump", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def dump_config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="The command, followed by its flags.")] = "up",
) -> int:
    """Print the effective value of every flag of a command and where it came from, as a config file."""
    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    target = commands.get(command)
    if target is None or hasattr(target, "commands"):
        names = ", ".join(name for name, known in commands.items() if not hasattr(known, "commands"))
        raise typer.BadParameter(f"'{command}' is no command with flags of its own; choose from {names}")
    with target.make_context(command, list(context.args), parent=context.find_root(), resilient_parsing=False) as inner:
        print(dump(effective(inner)))
    return 0


def main(arguments: list[str] | None = None) -> None:
    """The console script. Exits 78 with one line when a configuration or a checkpoint can not run."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=words, prog_name="penumbra", standalone_mode=False, obj=words)
    except typer.BadParameter as error:
        code = _bad_value(error)
    except typer.TyperException as error:
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code
    except typer.Abort:
        code = 130
    except ConfigError as error:
        code = _complain(str(error), ConfigError.exit_code)
    except PenumbraError as error:
        code = _complain(str(error), 1)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)


def _bad_value(error: typer.BadParameter) -> int:
    """A wrong word on the command line is a matter of usage (2); from elsewhere it is a bad configuration (78)."""
    context, parameter = error.ctx, error.param
    if context is not None and parameter is not None and parameter.name is not None:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "ENVIRONMENT":
            return _complain(f"{variable(parameter.name)}: {error.message}", ConfigError.exit_code)
        if source is not None and source.name == "DEFAULT_MAP":
            file = context.params.get("config")
            return _complain(f"{file}: {parameter.name}: {error.message}", ConfigError.exit_code)
    error.show()
    return error.exit_code


def _complain(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
