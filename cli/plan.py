"""`penumbra plan`: what a load takes, as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from cli.flags import ConfigFile
from cli.settings import flag
from wire.errors import ConfigError

if TYPE_CHECKING:
    from deploy.plan import Plan

Value = TypeVar("Value")


def plan(
    gpus: Annotated[str, flag("gpus", "What there is, such as 8xH200.", metavar="NxKIND")] = "8xH200",
    model: Annotated[Literal["flash", "pro"], flag("model", "Which DeepSeek-V4.")] = "flash",
    context: Annotated[str, flag("context", "Tokens of a prompt, such as 900k.", metavar="TOKENS")] = "128k",
    answer: Annotated[str, flag("answer", "Tokens of an answer.", metavar="TOKENS")] = "1k",
    rps: Annotated[float, flag("rps", "Requests a second.")] = 1.0,
    ttft: Annotated[str, flag("ttft", "Longest time to the first token, such as 30s.", metavar="TIME")] = "30s",
    tpot: Annotated[str, flag("tpot", "Longest time per later token, such as 20ms.", metavar="TIME")] = "50ms",
    cached: Annotated[float, flag("cached", "Part of a prompt that the prefix cache has, from 0 to below 1.")] = 0.0,
    as_json: Annotated[bool, flag("json", "JSON instead of a table.", switch=True)] = False,
    config: ConfigFile = None,
) -> int:
    """What a load takes: pools, memory, and figures to expect, each measured or from a datasheet.

    Exit code 1 when the given GPUs do not carry it; it then says what would.
    """
    from deploy.plan import Load, Steps, measured_steps, parse_gpus, parse_seconds, parse_tokens
    from deploy.plan import plan as make

    count, gpu = _said("--gpus", parse_gpus, gpus)
    load = Load(
        context=_said("--context", parse_tokens, context),
        answer=_said("--answer", parse_tokens, answer),
        per_s=rps,
        ttft_s=_said("--ttft", parse_seconds, ttft),
        tpot_s=_said("--tpot", parse_seconds, tpot),
        cached=cached,
    )
    found = make(model, gpu, count, load, Steps(measured_steps()))
    if as_json:
        print(json.dumps(_finite(asdict(found)), indent=1))
    else:
        _show(found)
    return 0 if found.fits else 1


def _said(name: str, parse: Callable[[str], Value], text: str) -> Value:
    try:
        return parse(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=name) from error


def _finite(value: Any) -> Any:
    """JSON has no infinity: a latency that nothing keeps is null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    load = found.load
    verdict = "fits" if found.fits else "does not fit"
    console.print(
        f"V4-{found.model.capitalize()} on {found.gpus} {found.gpu}, {load.per_s:g} requests/s of {load.context:,} + "
        f"{load.answer:,} tokens, {load.cached:.0%} cached: [bold]{verdict}[/bold]",
        highlight=False,
    )
    for problem in found.problems:
        console.print(f"  {problem}", style="red", highlight=False)
    if found.pools:
        pools = Table("", *(pool.role for pool in found.pools), box=box.SIMPLE, pad_edge=False)
        rows: tuple[tuple[str, Callable[[Any], str]], ...] = (
            ("workers", lambda p: f"{p.workers} on {p.gpus} {found.gpu} each"),
            ("weights, a GPU", lambda p: f"{p.weight_bytes / 1e9:.1f} GB"),
            ("pages of a request, a GPU", lambda p: f"{p.request_bytes / 1e9:.2f} GB"),
            ("requests that find room", lambda p: f"{p.requests:,}"),
            ("requests at once", lambda p: f"{p.running:,}"),
            (
                "a prompt / a step",
                lambda p: f"{p.seconds:.1f} s" if p.role == "prefill" else f"{p.seconds * 1e3:.1f} ms",
            ),
            ("from", lambda p: f"{p.basis}: {p.source}"),
        )
        for name, cell in rows:
            pools.add_row(name, *(cell(pool) for pool in found.pools))
        console.print(pools)
        console.print(
            f"to expect: first token after {found.ttft_s:.1f} s (at most {load.ttft_s:g}), then "
            f"{found.tpot_s * 1e3:.1f} ms a token (at most {load.tpot_s * 1e3:g}); "
            f"{found.token_bytes:,.0f} bytes of pages a token, {found.moved_bytes / 1e9:.2f} GB moved a request",
            highlight=False,
        )
    for advice in found.advice:
        console.print(f"  would do, alone: {advice}", style="yellow", highlight=False)
    for note in found.notes:
        console.print(f"  note: {note}", style="dim", highlight=False)
