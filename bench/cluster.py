"""A cluster to measure: started for one benchmark, asked over HTTP as any client would, gone afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.state import ClusterState, cluster_folder, fetch_json, stop

BYTE_TOKENS = (3, 259)
"""Ids of the bundled tokenizer that are plain bytes."""

_NAME = "bench"
_PATIENCE_S = 6 * 3600.0
"""No single wait for a cluster is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One streamed answer. Seconds count from when the request was sent."""

    ttft_s: float
    total_s: float
    tokens: list[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """One prefill and one decode worker with the bundled model."""

    state: ClusterState

    def ask(self, prompt: list[int], max_tokens: int = 2) -> Answer:
        """A greedy answer of exactly so many tokens."""
        body = {
            "model": self.state.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.state.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        tokens: list[int] = []
        cached = 0
        first = last = began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RuntimeError(f"the cluster answered {event['error']}")
                for choice in event["choices"]:
                    if fresh := choice.get("token_ids") or []:
                        last = time.perf_counter()
                        first = first if tokens else last
                        tokens += fresh
                if usage := event.get("usage"):
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(ttft_s=first - began, total_s=last - began, tokens=tokens, cached_tokens=cached)

    def workers(self, role: str) -> list[dict[str, Any]]:
        """Records of the live workers of one role, as the router shows them; none when it does not answer."""
        shown = fetch_json(f"{self.state.url}/workers", timeout_s=10) or {"workers": []}
        return [worker for worker in shown["workers"] if worker["role"] == role]

    def metric(self, role: str, name: str) -> float:
        """The sum of a metric's samples over the workers of one role."""
        total = 0.0
        for worker in self.workers(role):
            with urllib.request.urlopen(f"http://{worker['http_address']}/metrics", timeout=30) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)
        return total

    def exposed_s(self) -> float:
        """Seconds so far from a last offer to the first token sent: what clients waited for transfers."""
        return self.metric("decode", "penumbra_kv_transfer_exposed_seconds_sum")

    def moved_bytes(self) -> int:
        """Page bytes that decode workers have read so far."""
        return int(self.metric("decode", "penumbra_kv_transfer_bytes_total"))

    def most_resident_bytes(self) -> dict[str, int]:
        """The most each process ever had resident, by name."""
        found = {}
        for member in (self.state.supervisor, *self.state.members):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{member.pid}/status").read_text().splitlines()
                (peak,) = [line for line in status if line.startswith("VmHWM:")]
                found[member.name] = int(peak.split()[1]) * 1024
        return found


@contextlib.contextmanager
def cluster(*flags: str) -> Iterator[Cluster]:
    """Start `penumbra up` with these flags; stop it at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        up = [sys.executable, "-m", "cli", "up", "--detach", "--port", "0", "--cluster", _NAME, "--home", str(home)]
        subprocess.run([*up, *flags], check=True, stdout=subprocess.DEVNULL, timeout=400)
        folder = cluster_folder(home, _NAME)
        try:
            state = ClusterState.load(folder)
            assert state is not None, "a detached cluster leaves a state file"
            yield Cluster(state=state)
        finally:
            stop(folder)
