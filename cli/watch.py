"""`penumbra status --watch`: the picture that the front page draws, for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.remote import Unreachable, client, get

REFRESH_S = 1.0
MOST_WORKERS = 24
MOST_REQUESTS = 10
BAR = 24
STYLES = {"prefill": "yellow", "transfer": "cyan", "first_decode": "blue", "tokens": "blue"}
STATES = {"serving": "green", "draining": "yellow", "down": "red"}

Json = Mapping[str, Any]


def run(url: str, api_key: str | None, console: Console, *, rounds: int | None = None) -> int:
    """Draw until Ctrl-C, or `rounds` times. A router that is away is said and asked again. -> exit code"""
    last: RenderableType = Text("")
    with Live(last, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        for number in _numbers(rounds):
            if number:
                time.sleep(REFRESH_S)
            try:
                with client(url, api_key, timeout_s=5.0) as router:
                    last = render(get(router, "/fleet"), url, console.height)
                live.update(last, refresh=True)
            except Unreachable as error:
                if not number:
                    raise
                live.update(Group(Text(f"{error}\n", style="red"), last), refresh=True)
    return 0


def _numbers(rounds: int | None) -> Iterator[int]:
    number = 0
    while rounds is None or number < rounds:
        yield number
        number += 1


def render(frame: Json, url: str, height: int = 50) -> RenderableType:
    """One frame of /fleet, as tall as the terminal allows."""
    now, router = frame["now"], frame["router"]
    head = Text.assemble(
        (url, "bold"),
        f"  {', '.join(router['models'])}  up {router['uptime_s']:.0f} s",
        ("  DRAINING" if router["draining"] else "", "yellow"),
        (f"  registry away {router['registry_stale_s']:.0f} s" if router["registry_stale_s"] else "", "red"),
    )
    ttft, tpot = (frame["latency"][name] for name in ("ttft", "tpot"))
    figures = [
        f"{now['serving_prefill']} prefill + {now['serving_decode']} decode serve",
        f"{now['running']} in flight",
        f"prompt {now['prompt_tokens_s']:,.0f} tok/s",
        f"answers {now['generation_tokens_s']:,.0f} tok/s",
        f"prefix hits {now['hit_rate']:.0%}",
        f"pages {now['read_bytes_s'] / 1e9:.3f} GB/s",
    ]
    if ttft["num"]:
        figures.append(f"TTFT p50 {ttft['p50_ms']:,.0f} ms, p99 {ttft['p99_ms']:,.0f}")
    if tpot["num"]:
        figures.append(f"TPOT p50 {tpot['p50_ms']:,.1f} ms")
    room = max(4, height - 12 - min(len(frame["requests"]), MOST_REQUESTS))
    parts: list[RenderableType] = [head, Text(" · ".join(figures)), _workers(frame, min(room, MOST_WORKERS))]
    if frame["requests"]:
        parts.append(_requests(frame["requests"], frame["num_requests"], frame["at"]))
    return Group(*parts)


def _workers(frame: Json, most: int) -> Table:
    table = Table("worker", "state", "pages", box=box.SIMPLE, pad_edge=False)
    for heading in ("running", "waiting", "queued", "cached", "quarantined"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reads")
    # Who is not well comes first: a fleet of a thousand does not fit a terminal.
    workers = sorted(frame["workers"], key=lambda one: (one["state"] == "serving", one["role"] == "decode"))
    links: dict[str, list[Json]] = {}
    for link in frame["links"]:
        links.setdefault(link["decode"], []).append(link)
    for worker in workers[:most]:
        pages = worker["pages"]
        reads = sorted(links.get(worker["worker_id"], []), key=lambda link: -link["active_s"])
        table.add_row(
            Text(worker["worker_id"], style="yellow" if worker["role"] == "prefill" else "blue"),
            Text(worker["state"], style=STATES.get(worker["state"], "")),
            _bar(pages, "yellow" if worker["role"] == "prefill" else "blue"),
            f"{worker['running']:,}",
            f"{worker['waiting']:,}",
            f"{worker['queued_tokens']:,}",
            f"{pages['cached']:,}",
            Text(f"{pages['quarantined']:,}", style="red" if pages["quarantined"] else ""),
            ", ".join(f"{link['prefill']} {link['gb_s']:.2f} GB/s" for link in reads[:2]),
        )
    if len(workers) > most:
        table.add_row(Text(f"and {len(workers) - most:,} more", style="dim"))
    return table


def _bar(pages: Mapping[str, int], style: str) -> Text:
    total = sum(pages.values()) or 1
    text = Text()
    for state, colour in (("used", style), ("cached", "bright_black"), ("quarantined", "red")):
        if pages[state]:
            text.append("█" * max(1, round(BAR * pages[state] / total)), style=colour)
    text.truncate(BAR)
    text.append("░" * (BAR - len(text)), style="bright_black")
    return text


def _requests(requests: Sequence[Json], num_requests: int, at: float) -> Table:
    table = Table("request", "where", "", box=box.SIMPLE, pad_edge=False)
    for heading in ("age s", "prompt", "cached", "answer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for request in requests[:MOST_REQUESTS]:
        age = max(at - request["arrived"], 1e-6)
        starts = [begin for _, begin in request["phases"]] + [age]
        line = Text()
        for (name, begin), end in zip(request["phases"], starts[1:], strict=True):
            line.append("━" * max(1, round(BAR * (end - begin) / age)), style=STYLES.get(name, "bright_black"))
        table.add_row(
            request["request_id"][:10],
            f"{request['prefill'] or '-'} > {request['decode'] or '-'}",
            line,
            f"{age:.1f}",
            f"{request['done_tokens']:,}/{request['prompt_tokens']:,}",
            f"{request['cached_tokens']:,}",
            f"{request['generated_tokens']:,}",
        )
    if num_requests > MOST_REQUESTS:
        table.add_row(Text(f"and {num_requests - MOST_REQUESTS:,} more", style="dim"))
    return table
