"""How soon a request's work and pages are given up once its client has left: in the queue, in prefill, in the transfer
of its pages and in its stream.

A whole cluster; a client that closes its connection at the moment its stage is there; and what the workers tell of
themselves, asked over and over until nothing of the request is left. So the figures are upper bounds, by one asking.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cluster import BYTE_TOKENS, Cluster, cluster
from bench.record import append_rows, commit, load, machine

STAGES = ("queue", "prefill", "transfer", "stream")
PROMPT_TOKENS = 4_096
OTHER_TOKENS = 32_768
"""The prompt that keeps prefill busy while another waits for it."""

PATIENCE_S = 120.0
ASK_EVERY_S = 0.005


def run(count: int = 20) -> None:
    """Print the table and append it to bench/results/cancel.csv."""
    console = Console()
    rows: list[dict[str, object]] = []
    with cluster("--max-context", "65536") as ours:
        workers = Workers(ours)
        ours.ask(_prompt(300))  # connects the pair
        for stage in STAGES:
            with console.status(f"cancelling in {stage}"), _busy(ours, workers, stage == "queue") as still_busy:
                times: list[tuple[float, float]] = []
                while len(times) < count:
                    still_busy()
                    times.append(_cancel(ours, workers, stage))
            for what, found in zip(("work", "pages"), zip(*times, strict=True), strict=True):
                ordered = sorted(found)
                rows.append(
                    {
                        "stage": stage,
                        "given_up": what,
                        "cancels": count,
                        "p50_s": round(statistics.median(ordered), 3),
                        "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
                        "most_s": round(ordered[-1], 3),
                        "load": load(),
                    }
                )
    table = Table(title=f"after the client has left; {machine()}; commit {commit()}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    append_rows("cancel", rows)


class Workers:
    """The figures of both workers, as they are now."""

    def __init__(self, ours: Cluster) -> None:
        self._doors = {role: ours.workers(role)[0]["http_address"] for role in ("prefill", "decode")}

    def figures(self, role: str) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self._doors[role]}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def requests(self, role: str) -> float:
        figures = self.figures(role)
        return figures["penumbra_num_requests_running"] + figures["penumbra_num_requests_waiting"]

    def used_pages(self, role: str) -> float:
        figures = self.figures(role)
        return sum(
            value for name, value in figures.items() if name.startswith("penumbra_pages{") and 'state="used"' in name
        )


def _cancel(ours: Cluster, workers: Workers, stage: str) -> tuple[float, float]:
    """Seconds until nothing is computed for the request, and until its pages are back."""
    requests = {role: workers.requests(role) for role in ("prefill", "decode")}
    pages = {role: workers.used_pages(role) for role in ("prefill", "decode")}
    moved = workers.figures("decode")["penumbra_kv_transfer_bytes_total"]
    with _asking(ours, _prompt(PROMPT_TOKENS), 4_096) as client:
        match stage:
            case "queue":
                _until(lambda: workers.requests("prefill") > requests["prefill"])
            case "prefill":
                client.until(lambda event: (event.get("prompt_progress") or {}).get("processed", 0) > 0)
            case "transfer":
                _until(lambda: workers.figures("decode")["penumbra_kv_transfer_bytes_total"] > moved)
            case _:
                client.until(lambda event: bool(event["choices"]), times=8)
        client.leave()
        left = time.perf_counter()
    # Of two requests the one that computes needs ever more pages in prefill, and the one that waits has none there.
    roles = ("decode",) if stage == "queue" else ("prefill", "decode")
    _until(lambda: all(workers.requests(role) <= requests[role] for role in requests))
    stopped = time.perf_counter()
    _until(lambda: all(workers.used_pages(role) <= pages[role] for role in roles))
    return stopped - left, time.perf_counter() - left


class _Client:
    """A streamed request whose client may leave."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        at = urllib.parse.urlsplit(url)
        self._socket = socket.create_connection((at.hostname, at.port), timeout=PATIENCE_S)
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
        self._socket.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        self._lines = self._socket.makefile("rb")

    def until(self, wanted: Callable[[dict[str, Any]], bool], *, times: int = 1) -> None:
        """Read until so many events are as wanted."""
        for line in self._lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the cluster answered {event['error']}")
                times -= wanted(event)
                if times <= 0:
                    return
        raise RuntimeError("the answer was over before it could be cancelled")

    def leave(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def _asking(ours: Cluster, prompt: list[int], max_tokens: int) -> Iterator[_Client]:
    body = {"model": ours.state.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    client = _Client(ours.state.url, body | {"stream": True, "return_progress": True})
    try:
        yield client
    finally:
        client.leave()


@contextlib.contextmanager
def _busy(ours: Cluster, workers: Workers, wanted: bool) -> Iterator[Callable[[], None]]:
    """Gives what makes sure that prefill computes a long prompt, all the time, if that is wanted."""
    held: list[contextlib.ExitStack] = []

    def still() -> None:
        if not wanted or (held and workers.figures("prefill")["penumbra_queued_tokens"] > 2 * PROMPT_TOKENS):
            return
        if held:
            held.pop().close()
            _until(lambda: workers.requests("prefill") == workers.requests("decode") == 0)
        stack = contextlib.ExitStack()
        client = stack.enter_context(_asking(ours, _prompt(OTHER_TOKENS), 1))
        client.until(lambda event: (event.get("prompt_progress") or {}).get("processed", 0) > 0)
        held.append(stack)

    try:
        yield still
    finally:
        for stack in held:
            stack.close()
        _until(lambda: workers.requests("prefill") == workers.requests("decode") == 0)


def _prompt(num_tokens: int) -> list[int]:
    """None like another, so that nothing of it is cached."""
    return [random.randrange(*BYTE_TOKENS) for _ in range(num_tokens)]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the workers did not come to rest within {PATIENCE_S:g} s")
        time.sleep(ASK_EVERY_S)
