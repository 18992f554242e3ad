"""`penumbra chaos`: the faults, one after another, and the page about them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chaos import report
from chaos.cluster import ChaosFailed, NotHere, running
from chaos.faults import Local
from chaos.hosts import can_be_apart, proxied
from chaos.judge import VOCAB, Bench, References, Row
from chaos.network import Apart, Proxied
from chaos.overload import Overload, overloaded
from chaos.streams import Reference, answer, asks
from chaos.table import FAULTS, Fault
from deploy.redis import EmbeddedRedis
from engine.model.tiny import write_tiny
from wire.errors import ConfigError

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "chaos"
KINDS: dict[str, type] = {"local": Local, "proxied": Proxied, "apart": Apart, "overload": Overload}
"""What the live function of a fault belongs to, by where it is done; `silence` has none, it is asked for at the end."""

RUNS = ("rolling", "kills", "pairs")
"""What is done besides the faults of the table."""

GAP_S = 2.0
"""A stream whose worker was killed is silent for no longer, pages and replay apart, but in one case of a hundred."""

RESTART_S = 1.0
"""Workers killed again and again are started again as quickly each time: it is we who kill them."""

GRACE_S = 30.0
"""Longer than any answer here takes: who is asked to go finishes, or hands over."""

DISK_BYTES = 256 << 20
"""What the logs of the whole campaign fit into; F42 fills what they leave."""

FIRST_TOKEN = 2.0
"""After a long silence the first token may take so many times as long as before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. `streams` and `kills` are the least of both; `idle_s` is F53's silence."""

    only: tuple[str, ...] = ()  # all, if none is named
    resume: bool = False  # leave out what held at this very commit
    streams: int = 2_000
    kills: int = 200
    steady_s: float = 0.5
    prefill: int = 2
    decode: int = 2
    clients: int = 16
    pairs: int = 20
    seed: int = 1
    idle_s: float = 1_800.0
    into: Path | None = None  # folder for the page and its rows; None: those of this checkout


def run(plan: Plan) -> int:
    """-> 1 when a promise broke. Raises ConfigError for a fault there is not."""
    if unknown := sorted(set(plan.only) - {fault.id for fault in FAULTS} - {*RUNS}):
        raise ConfigError(f"{', '.join(unknown)} is no fault; they are F01 to F60, {', '.join(RUNS)}.")
    if plan.into is not None:
        report.into(plan.into)
    names = [name for name in (*(fault.id for fault in FAULTS), *RUNS) if name in plan.only or not plan.only]
    if plan.resume:
        done = report.held()
        names = [name for name in names if name not in done]
    rows: list[Row] = []
    chosen = [fault for fault in FAULTS if fault.id in names]
    if tested := [fault for fault in chosen if fault.tests]:
        found = _tested(tested)
        report.keep(found, "tests")
        rows += found
    live = [fault for fault in chosen if fault.live]
    if live or set(names) & {*RUNS}:
        with tempfile.TemporaryDirectory(prefix="penumbra-chaos-") as folder:
            rows += _live(plan, live, [name for name in RUNS if name in names], Path(folder))
    print(report.write())
    bad = [row for row in rows if not row.ok]
    for row in bad:
        print(f"{row.fault} did not hold: {row.measured}")
    return 1 if bad else 0


def _live(plan: Plan, faults: Sequence[Fault], runs: Sequence[str], home: Path) -> list[Row]:
    rows: list[Row] = []
    model = a_model(home)
    at = {where: [fault for fault in faults if fault.where == where] for where in ("local", "proxied", "apart")}
    with contextlib.ExitStack() as held:
        silence = held.enter_context(_silent(plan, home, model)) if any(f.where == "silence" for f in faults) else None
        references: References | None = None
        if at["local"] or {"kills", "rolling"} & {*runs}:
            (points := home / "points").mkdir()
            flags = ("--restart-pause-s", str(RESTART_S), "--test-failpoints", str(points), "--grace-s", str(GRACE_S))
            with (
                _small_disk(home / "many" / "clusters") as disk,
                running(home / "many", model, plan.prefill, plan.decode, *flags) as cluster,
            ):
                references = undisturbed(cluster.url, model.name)
                local = Local(cluster, references, points, disk)
                rows += done(local, at["local"])
                if "rolling" in runs:
                    rows.append(_kept("rolling", local.rolled, cluster.logs))
                if "kills" in runs:
                    rows.append(_kept("kills", lambda: _campaign(local, plan), cluster.logs))
        if at["proxied"] or "pairs" in runs:
            with (
                EmbeddedRedis(log=home / "redis.log") as redis,
                proxied(home / "hosts", model, redis, prefill=2, decode=2, routers=2) as hosts,
            ):
                references = references or undisturbed(hosts.url, model.name)
                bench = Proxied(hosts, references, redis)
                rows += done(bench, at["proxied"])
                if "pairs" in runs:
                    rows.append(_kept("pairs", lambda: bench.pairs(plan.pairs, plan.seed), hosts.logs))
        if at["apart"]:
            rows += _apart(at["apart"], model, plan.into)
        if pressed := [fault for fault in faults if fault.where == "overload"]:
            rows += _pressed(pressed, home, model)
        if silence is not None:
            rows.append(_kept("F53", silence))
    return rows


def done(bench: Bench, faults: Sequence[Fault]) -> list[Row]:
    """Do the faults one after another and keep a row of each as it comes."""

    def one(fault: Fault) -> Row:
        bench.cluster.wait_until_whole()
        row: Row = getattr(bench, fault.live)()
        return row

    return [_kept(fault.id, partial(one, fault), bench.cluster.logs) for fault in faults]


def _kept(name: str, do: Callable[[], Row], logs: Path | None = None) -> Row:
    """Do it, say how it went and keep that, and the logs of what did not go well."""
    how = "live"
    try:
        row = do()
    except NotHere as error:
        row, how = Row(fault=name, ok=True, streams=0, measured=str(error)), "not"
    except ChaosFailed as error:
        row = Row(fault=name, ok=False, streams=0, measured=str(error))
    print(f"{row.fault} {('held' if row.ok else 'DID NOT HOLD') if how == 'live' else how}: {row.measured}", flush=True)
    report.keep([row], how)
    if not row.ok and logs is not None:
        shutil.copytree(logs, LOGS / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))
        print(f"  its logs are in {LOGS / name}", flush=True)
    return row


def a_model(home: Path) -> Path:
    """Every kind of layer and rows as in production, and narrow elsewhere."""
    return write_tiny(
        home / "chaos-v4",
        seed=3,
        layers=(0, 4, 128, 4),
        hidden=128,
        heads=2,
        index_heads=4,
        experts=8,
        q_lora_rank=64,
        o_lora_rank=32,
        moe_intermediate=64,
        index_topk=512,
    )


def undisturbed(url: str, model: str) -> References:
    """What a cluster that nothing happens to says."""
    shapes = {
        "many": asks(24, prompt_tokens=(5, 250, 300, 520), max_tokens=(60, 90), vocab=VOCAB, seed=1),
        "long": asks(8, prompt_tokens=(1500, 2200), max_tokens=(12,), vocab=VOCAB, seed=2),
        "short": asks(8, prompt_tokens=(5, 300), max_tokens=(400,), vocab=VOCAB, seed=3),
    }
    return References(**{name: Reference(url, model, questions, 8) for name, questions in shapes.items()})


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of a few MiB at `folder`, where that can be had."""
    folder.mkdir(parents=True)
    words = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "penumbra-chaos", str(folder))
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, timeout=10, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(("umount", "--lazy", str(folder)), capture_output=True, timeout=10, check=False)


def _apart(faults: Sequence[Fault], model: Path, into: Path | None) -> list[Row]:
    """In a network namespace of their own, and so in a process of their own."""
    names = [fault.id for fault in faults]
    if reason := can_be_apart():

        def not_here() -> Row:
            raise NotHere(reason)

        return [_kept(name, not_here) for name in names]
    words = ("unshare", "--net", sys.executable, "-P", "-m", "chaos.apart", str(model), str(into or ""), *names)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, env=environment, timeout=1_800, check=False)
    return report.rows(names)


def _pressed(faults: Sequence[Fault], home: Path, model: Path) -> list[Row]:
    """One time of too much load, and what each of the faults is about."""
    seen: Overload | None = None

    def row(fault: Fault) -> Row:
        nonlocal seen
        seen = seen or overloaded(home / "pressed", model)
        held: Row = getattr(seen, fault.live)()
        return held

    return [_kept(fault.id, partial(row, fault)) for fault in faults]


@contextlib.contextmanager
def _silent(plan: Plan, home: Path, model: Path) -> Iterator[Callable[[], Row]]:
    """A cluster of one pair that nobody asks for anything, from now until the row is asked for."""
    with running(home / "silent", model, 1, 1) as cluster:
        question = asks(1, prompt_tokens=(300,), max_tokens=(20,), vocab=VOCAB, seed=4)[0]
        warm = [answer(cluster.url, model.name, question) for _ in range(3)][-1]
        since = time.monotonic()

        def first_after() -> Row:
            time.sleep(max(0.0, since + plan.idle_s - time.monotonic()))
            silent_s = time.monotonic() - since
            heard = answer(cluster.url, model.name, question)
            words = f"{silent_s / 60:.0f} min of silence; first token after {1000 * heard.first_s:.0f} ms, before it "
            words += f"{1000 * warm.first_s:.0f} ms; {heard.error or 'no error'}"
            ok = heard.done and heard.ids == warm.ids and heard.first_s <= max(FIRST_TOKEN * warm.first_s, 1.0)
            return Row(fault="F53", ok=ok, streams=1, measured=words)

        yield first_after


def _campaign(bench: Local, plan: Plan) -> Row:
    verdict, kills, moved = bench.campaign(plan.streams, plan.kills, plan.clients, plan.steady_s)
    words = [
        f"{kills} kills of any one worker",
        f"{verdict.lost} lost, {verdict.doubled} doubled, {verdict.altered} altered",
        f"longest gap of a stream p50 {verdict.gap(0.5):.2f} s, p99 {verdict.gap(0.99):.2f} s",
    ]
    accounted_s = 0.0
    for part in ("pages", "replay"):
        count = moved.get(f'penumbra_request_move_seconds_count{{part="{part}"}}', 0.0)
        mean_s = moved.get(f'penumbra_request_move_seconds_sum{{part="{part}"}}', 0.0) / max(count, 1)
        accounted_s += mean_s
        words.append(f"{part} {1000 * mean_s:.0f} ms on average over {count:.0f} moves")
    if verdict.why:
        words.append(f"first: {verdict.why[0]}")
    bench.cluster.wait_until_whole()
    bench.cluster.wait_until_idle(15.0)
    words.append("0 pages held")
    enough = verdict.streams >= plan.streams and kills >= plan.kills
    quick = verdict.gap(0.99) - accounted_s <= GAP_S
    return Row(
        fault="kills", ok=enough and quick and not verdict.bad, streams=verdict.streams, measured="; ".join(words)
    )


def _tested(faults: Sequence[Fault]) -> list[Row]:
    """Run the tests of all these faults once; N is how many tests a fault has."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        which = "not gpu" if any(fault.long for fault in faults) else "not long and not gpu"
        tests = dict.fromkeys(test for fault in faults for test in fault.tests)
        words = [sys.executable, "-m", "pytest", "-q", "-m", which, f"--junitxml={xml}", *tests]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
        if not xml.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise ChaosFailed(f"The tests did not run: {' '.join(last)}")
        cases = list(ElementTree.parse(xml).iter("testcase"))
    rows = []
    for fault in faults:
        own = [case for case in cases if any(_is_of(case, test) for test in fault.tests)]
        failed = [case for case in own if {child.tag for child in case} & {"failure", "error"}]
        measured = [f"{p.get('name')}={p.get('value')}" for case in own for p in case.iter("property")]
        names = ", ".join(dict.fromkeys(test.partition("::")[0] for test in fault.tests))
        wrong = [f"{case.get('name')} failed" for case in failed]
        rows.append(
            Row(
                fault=fault.id,
                ok=bool(own) and not failed,
                streams=len(own),
                measured="; ".join([names, *measured, *wrong]),
            )
        )
    return rows


def _is_of(case: ElementTree.Element, test: str) -> bool:
    path, _, name = test.partition("::")
    return case.get("file") == path and (not name or str(case.get("name")).partition("[")[0] == name)
