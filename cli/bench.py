"""`penumbra bench`: each benchmark prints its machine, commit and units, and appends its rows to bench/results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.flags import ConfigFile, Device, Kernels, KvLayout, KvMemory, Threads
from cli.settings import flag, integers
from wire.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Benchmarks; each prints its machine, commit and units.")


@app.command("transfer")
def bench_transfer(
    lengths: Annotated[str, flag("lengths", "Prompts whose exposed transfer is measured, in tokens.")] = "1024,65536",
    config: ConfigFile = None,
) -> int:
    """NIXL GB/s of our pages beside a contiguous read and memcpy; then what of a transfer a client waits for."""
    from bench import exposed, transfer

    transfer.run()
    exposed.run(integers("--lengths", lengths, "1024,65536"))
    return 0


@app.command("verification")
def bench_verification(
    lengths: Annotated[str, flag("lengths", "Prompt lengths in tokens.")] = "1024,8192,65536",
    config: ConfigFile = None,
) -> int:
    """What checksums cost of the time to the first token."""
    from bench.verification import run

    run(integers("--lengths", lengths, "1024,8192"))
    return 0


@app.command("engine")
def bench_engine(
    lengths: Annotated[str, flag("lengths", "Prompt lengths in tokens.")] = "1024,4096,16384,65536",
    decode_tokens: Annotated[int, flag("decode-tokens", "Tokens to decode after each prompt.", min=1)] = 32,
    threads: Threads = 2,
    kv_layout: KvLayout = "v4",
    config: ConfigFile = None,
) -> int:
    """Prefill and decode tokens/s beside transformers: same checkpoint, same threads, one run."""
    from bench.engine import run

    run(
        lengths=integers("--lengths", lengths, "1024,4096"),
        decode_tokens=decode_tokens,
        threads=threads,
        layout=kv_layout,
    )
    return 0


@app.command("decode")
def bench_decode(
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    steps: Annotated[int, typer.Option(min=8, help="Steps measured in each case.")] = 40,
    model: Annotated[Path | None, typer.Option(help="A trained checkpoint, asked for real text; else random.")] = None,
    save: Annotated[bool, typer.Option(help="Add rows to bench/results/decode.csv or decode-trained.csv.")] = True,
) -> None:
    """Tokens/s, tokens a step and step time with 0 to 3 drafts, at batch 1, 8 and 32."""
    from bench.decode import run

    run(threads, steps, model, save)


@app.command("sampling")
def bench_sampling(
    repeats: Annotated[int, flag("repeats", "Times each figure is taken.", min=3)] = 40,
    threads: Threads = 2,
    config: ConfigFile = None,
) -> int:
    """What each sampling option costs at batch 32, beside a decode step."""
    from bench.sampling import run

    run(threads, repeats)
    return 0


@app.command("health")
def bench_health(
    tokens: Annotated[int, flag("tokens", "Tokens of each prompt.", min=1)] = 900_000,
    config: ConfigFile = None,
) -> int:
    """What health costs while ten long prompts are being tokenized."""
    from bench.health import run

    run(tokens)
    return 0


@app.command("cancel")
def bench_cancel(
    count: Annotated[int, flag("count", "Cancels in each stage.", min=1)] = 20,
    config: ConfigFile = None,
) -> int:
    """How soon work and pages are given up once a client has left, by the stage it leaves in."""
    from bench.cancel import run

    run(count)
    return 0


@app.command("router")
def bench_router(
    peers: Annotated[
        bool, flag("peers", "Measure sglang-router and vllm-router too; installs them under build/.", switch=True)
    ] = True,
    long: Annotated[bool, flag("long", "Measure prompts of 900,000 tokens too.", switch=True)] = True,
    config: ConfigFile = None,
) -> int:
    """What the router adds to a request, and how many requests and tokens one core carries, beside two others."""
    from bench.router import run

    run(peers=peers, long=long)
    return 0


@app.command("prefix")
def bench_prefix(
    tokens: Annotated[int, flag("tokens", "Tokens of the prompt.", min=256)] = 900_000,
    config: ConfigFile = None,
) -> int:
    """What the router spends on a long prompt before placing it: page digests, and a look into the mirror."""
    from bench.prefix import run

    run(tokens)
    return 0


@app.command("cache")
def bench_cache(
    pages: Annotated[int, flag("pages", "Pages in the tree.", min=10_000)] = 1_000_000,
    sglang: Annotated[
        Path | None, flag("sglang", "A Python that can import sglang, whose cache is then measured too.")
    ] = None,
    config: ConfigFile = None,
) -> int:
    """What the prefix tree takes to find, hold and take over a prompt."""
    from bench.cache import run

    run(pages, sglang=sglang)
    return 0


@app.command("reuse")
def bench_reuse(
    tokens: Annotated[int, flag("tokens", "Tokens of the first prompt.", min=256)] = 131_072,
    follow_up: Annotated[int, flag("follow-up", "New tokens each later turn brings.", min=1)] = 4096,
    turns: Annotated[int, flag("turns", "Later turns.", min=1)] = 3,
    threads: Threads = 2,
    kv_layout: KvLayout = "v4",
    config: ConfigFile = None,
) -> int:
    """What a follow-up on a long resident conversation costs, beside computing its new tokens and beside a cold run."""
    from bench.reuse import run

    run(tokens=tokens, follow_up=follow_up, turns=turns, threads=threads, layout=kv_layout)
    return 0


@app.command("flat")
def bench_flat(
    lengths: Annotated[str, flag("lengths", "Context lengths in tokens.")] = "4096,65536,262144,900000",
    decode_tokens: Annotated[int, flag("decode-tokens", "Tokens to decode at each length.", min=1)] = 24,
    threads: Threads = 2,
    kv_layout: KvLayout = "v4",
    config: ConfigFile = None,
) -> int:
    """Decode tokens/s at growing context on the default geometry, and the index scan beside memcpy."""
    from bench.flat import run

    run(
        lengths=integers("--lengths", lengths, "4096,65536"),
        decode_tokens=decode_tokens,
        threads=threads,
        layout=kv_layout,
    )
    return 0


@app.command("900k")
def bench_900k(
    tokens: Annotated[int, flag("tokens", "Tokens of the prompt.", min=1)] = 900_000,
    budget_minutes: Annotated[float, flag("budget-minutes", "Stop and report after this long.", min=0)] = 90.0,
    threads: Threads = 2,
    kv_layout: KvLayout = "v4",
    kv_memory: KvMemory = "1GiB",  # type: ignore[assignment]
    device: Device = "cpu",
    config: ConfigFile = None,
) -> int:
    """One prompt of 900,000 tokens through a whole cluster, then a follow-up: tokens/s by depth, TTFT, memory."""
    from bench.long import run

    run(
        tokens=tokens,
        budget_minutes=budget_minutes,
        threads=threads,
        layout=kv_layout,
        kv_memory_bytes=kv_memory,
        device=device,
    )
    return 0


@app.command("kernels")
def bench_kernels(
    only: Annotated[
        str,
        flag(
            "only",
            "Groups of kernels, such as topk,indexer,attention,compressor,linear,experts,mixing,routing,folded,prompts,"
            "sampling; else all.",
        ),
    ] = "",
    config: ConfigFile = None,
) -> int:
    """GPU kernels: microseconds beside their floor and, where there is one, a peer in the same run."""
    from bench.kernels import GROUPS, run

    groups = tuple(filter(None, only.split(",")))
    if unknown := [name for name in groups if name not in GROUPS]:
        raise ConfigError(
            f"--only is '{only}', but there are no kernels '{unknown[0]}'; choose from {', '.join(GROUPS)}."
        )
    run(groups)
    return 0


@app.command("step")
def bench_step(
    shape: Annotated[Literal["flash"], flag("shape", "Which model's sizes.")] = "flash",
    layers: Annotated[int, flag("layers", "Layers, the first ones of the model.", min=1, max=43)] = 43,
    alias_experts: Annotated[
        int,
        flag("alias-experts", "Experts a layer holds at most, since all of them do not fit one GPU.", min=6, max=256),
    ] = 224,
    kernels: Kernels = "cuda",
    config: ConfigFile = None,
) -> int:
    """A decode step of full-size DeepSeek-V4-Flash on one GPU, as a CUDA graph, from 4K to 900K tokens of context."""
    from bench.step import run

    run(layers=layers, alias_experts=alias_experts, kernels=kernels)
    return 0


@app.command("picture")
def bench_picture(config: ConfigFile = None) -> int:
    """Draw the decode steps in bench/results/step.csv, by context, beside what their bytes take to read."""
    from bench.picture import draw_steps

    typer.echo(draw_steps())
    return 0


@app.command("training")
def bench_training(
    run_file: Annotated[Path, typer.Argument(help="The run's TOML file.")] = Path("models/nano/nano.toml"),
    steps: Annotated[int, flag("steps", "Steps measured.", min=1)] = 3,
    stage: Annotated[int, flag("stage", "Which of the file's stages, from 0.", min=0)] = 0,
    peak_tflops: Annotated[float, flag("peak-tflops", "The device's peak at the run's dtype, for MFU.", min=0)] = 0.0,
    threads: Threads = 2,
    config: ConfigFile = None,
) -> int:
    """Training tokens/s and MFU of a run file on this machine."""
    from bench.training import run

    run(run_file, steps=steps, stage=stage, threads=threads, peak_tflops=peak_tflops)
    return 0
