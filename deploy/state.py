"""A cluster seen from outside: what its state file says, who of it is alive, and how to stop or scale it.

`deploy/cluster.py` writes the state file into the cluster's folder and obeys the file that `scale` puts beside it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from wire.errors import ConfigError

POLL_S = 0.2
LOAD_COLUMNS = {
    "running": "running",
    "waiting": "waiting",
    "queued_tokens": "queued",
    "free_tokens": "free",
    "total_tokens": "of tokens",
}
"""What `status` shows of a worker's record, and the heading it puts over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of a cluster. `started` tells it from a later one that was given the same pid."""

    name: str
    pid: int  # 0: Ray has found no place for it yet
    started: float  # seconds since the epoch, as the kernel tells it
    log: str
    node: str = ""  # address of the machine it runs on, where that is another one

    def process(self) -> psutil.Process | None:
        """The process, or None when it is gone, whoever holds its pid now, and when it is another machine's."""
        if self.node:
            return None
        try:
            process = psutil.Process(self.pid)
            # The kernel counts in ticks of 10 ms; a recycled pid is never that close.
            if abs(process.create_time() - self.started) < 0.05 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            pass
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """The state file: what one supervisor runs."""

    cluster: str
    url: str
    model: str
    ready: bool
    supervisor: Member
    members: tuple[Member, ...] = field(default=())
    urls: tuple[str, ...] = ()  # of every router, where there are several
    admin_url: str = ""  # where the fleet is shown, if not at `url`
    prefill: int = 1  # workers wanted
    decode: int = 1

    def save(self, folder: Path) -> None:
        draft = folder / "state.json.new"
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.replace(folder / "state.json")

    @classmethod
    def load(cls, folder: Path) -> ClusterState | None:
        """None when no cluster was left running here. Raises ConfigError when the file is not ours."""
        path = folder / "state.json"
        try:
            data = json.loads(path.read_text())
            data["supervisor"] = Member(**data["supervisor"])
            data["members"] = tuple(Member(**member) for member in data["members"])
            data["urls"] = tuple(data.get("urls", ()))
            return cls(**data)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is not a state file of this version ({error}). Stop what it names by hand, then delete it."
            ) from error


def cluster_folder(home: Path | None, cluster: str) -> Path:
    """Where a cluster keeps its logs and its state file."""
    if not cluster.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"'{cluster}' can not name a cluster: use letters, digits, '-' and '_'.")
    base = home / "clusters" if home else Path.home() / ".local" / "state" / "penumbra"
    return base / cluster


def stop(folder: Path, *, timeout_s: float = 60.0) -> list[str] | None:
    """Stop the cluster of `folder`. -> names of processes that had to be killed, None when nothing was running."""
    state = ClusterState.load(folder)
    if state is None:
        return None
    killed = []
    found = [(member, process) for member in (state.supervisor, *state.members) if (process := member.process())]
    if supervisor := state.supervisor.process():
        supervisor.terminate()  # it stops the others in order
        with contextlib.suppress(psutil.TimeoutExpired):
            supervisor.wait(timeout_s)
    for member, process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.process():
                process.kill()
                killed.append(member.name)
    psutil.wait_procs([process for _, process in found], timeout=5.0)
    (folder / "state.json").unlink(missing_ok=True)
    return killed if found else None


def scale(folder: Path, cluster: str, wanted: Mapping[str, int], *, timeout_s: float) -> None:
    """Have so many workers of each role named, and wait until the router serves with exactly these.

    Raises ConfigError when the cluster is not up or does not get there in time.
    """
    state = ClusterState.load(folder)
    if state is None or state.supervisor.process() is None:
        raise ConfigError(f"The cluster '{cluster}' is not up. Start it with `penumbra up --cluster {cluster}`.")
    counts = {"prefill": state.prefill, "decode": state.decode} | dict(wanted)
    draft = folder / "scale.json.new"
    draft.write_text(json.dumps(counts))
    draft.replace(folder / "scale.json")
    names = {f"{role}-{index}" for role, count in counts.items() for index in range(count)}
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = ClusterState.load(folder)
        if state is None:
            raise ConfigError(f"The cluster '{cluster}' went down meanwhile; its logs are in {folder / 'logs'}.")
        running = {m.name for m in state.members if m.name.startswith(("prefill-", "decode-"))}
        serving = {name for name, load in loads(state.admin_url or state.url).items() if load.get("state") == "serving"}
        if running == names == serving:
            return
        time.sleep(POLL_S)
    raise ConfigError(f"The cluster has not got to {counts} in {timeout_s:g} s; its logs are in {folder / 'logs'}.")


def restart(folder: Path, cluster: str, *, timeout_s: float) -> list[str]:
    """Have every process of the cluster replaced, one after another, and wait until that is done; -> their names.

    Raises ConfigError when the cluster is not up or does not get there in time.
    """
    state = ClusterState.load(folder)
    if state is None or state.supervisor.process() is None:
        raise ConfigError(f"The cluster '{cluster}' is not up. Start it with `penumbra up --cluster {cluster}`.")
    before = {member.name: member.pid for member in state.members}
    (folder / "restart.json").write_text("{}")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = ClusterState.load(folder)
        if state is None:
            raise ConfigError(f"The cluster '{cluster}' went down meanwhile; its logs are in {folder / 'logs'}.")
        now = {member.name: member.pid for member in state.members}
        if now.keys() == before.keys() and all(now[name] != before[name] for name in before):
            return sorted(now)
        time.sleep(POLL_S)
    raise ConfigError(f"Not every process was replaced in {timeout_s:g} s; the logs are in {folder / 'logs'}.")


def fetch_json(url: str, timeout_s: float = 1.0) -> Any:
    """The JSON behind a local URL, or None when it does not answer 200 in time."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return json.loads(answer.read() or b"null")
    except (OSError, ValueError):
        return None


def ready_line(state: ClusterState) -> str:
    body = json.dumps({"model": state.model, "messages": [{"role": "user", "content": "Tell me a story."}]})
    return f"ready: curl {state.url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}"


def show_status(folder: Path, cluster: str, console: Console) -> int:
    """Print who is alive and what each holds. -> 0, or 1 when a part is dead, or 3 when the cluster is not up."""
    from rich import box
    from rich.table import Table

    state = ClusterState.load(folder)
    if state is None or state.supervisor.process() is None:
        console.print(f"the cluster '{cluster}' is not up")
        return 3
    held = loads(state.admin_url or state.url)
    table = Table("process", "state", box=box.SIMPLE, pad_edge=False)
    for heading in ("pid", "MB", "up s", *LOAD_COLUMNS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    dead = 0
    resident_bytes = 0
    for member in (state.supervisor, *state.members):
        process = member.process()
        dead += process is None
        cells = ["dead", str(member.pid), "", ""]
        if member.node or not member.pid:
            dead -= 1
            cells = [f"on {member.node}" if member.node else "waits for a place", str(member.pid or ""), "", ""]
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info().rss
                resident_bytes += memory
                cells = ["alive", str(member.pid), f"{memory / 1e6:.0f}", f"{time.time() - member.started:.0f}"]
        load = held.get(member.name, {})
        table.add_row(member.name, *cells, *(_number(load.get(name)) for name in LOAD_COLUMNS))
    console.print(table)
    ready = "ready" if fetch_json(f"{state.url}/readiness") is not None else "NOT READY"
    console.print(f"{state.url} {ready}, {resident_bytes / 1e6:.0f} MB resident in all", highlight=False)
    return 1 if dead else 0


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def loads(url: str) -> dict[str, dict[str, Any]]:
    """Worker id -> what the router knows of its load; empty while the router does not answer."""
    found = fetch_json(f"{url}/workers")
    workers = found.get("workers") if isinstance(found, dict) else found
    if not isinstance(workers, list):
        return {}
    return {str(worker.get("worker_id")): worker for worker in workers if isinstance(worker, dict)}
