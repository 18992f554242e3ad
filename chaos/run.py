"""`penumbra chaos`: the faults, one after another, and the page about them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from chaos import report
from chaos.cluster import ChaosFailed, running
from chaos.faults import VOCAB, Bench, Row
from chaos.streams import Reference, asks
from chaos.table import FAULTS, Fault
from engine.model.tiny import write_tiny
from wire.errors import ConfigError

ROOT = Path(__file__).parent.parent


def run(*, only: Sequence[str], streams: int, steady_s: float, prefill: int, decode: int, clients: int) -> int:
    """Do these faults (all, if none is named), then kill workers under `streams` answers. -> 1 when a promise broke."""
    unknown = sorted(set(only) - {fault.id for fault in FAULTS})
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} is no fault; they are F01 to F60.")
    chosen = [fault for fault in FAULTS if fault.id in only or not only]
    rows: list[Row] = []
    if tested := [fault for fault in chosen if fault.tests]:
        found = _tested(tested)
        report.keep(found, "tests")
        rows += found
    live = [fault for fault in chosen if fault.live]
    if live or streams:
        rows += _live(live, streams, steady_s, prefill, decode, clients)
    print(report.write())
    bad = [row for row in rows if not row.ok]
    for row in bad:
        print(f"{row.fault} did not hold: {row.measured}")
    return 1 if bad else 0


def _live(faults: Sequence[Fault], streams: int, steady_s: float, prefill: int, decode: int, clients: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="penumbra-chaos-") as folder:
        home = Path(folder)
        # Every kind of layer and rows as in production, and narrow elsewhere.
        model = write_tiny(
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
        with running(home, model, prefill, decode) as cluster:
            many = Reference(
                cluster.url,
                model.name,
                asks(24, prompt_tokens=(5, 250, 300, 520), max_tokens=(60, 90), vocab=VOCAB, seed=1),
                8,
            )
            long = Reference(
                cluster.url, model.name, asks(8, prompt_tokens=(1500, 2200), max_tokens=(12,), vocab=VOCAB, seed=2), 8
            )
            short = Reference(
                cluster.url, model.name, asks(8, prompt_tokens=(5, 300), max_tokens=(400,), vocab=VOCAB, seed=3), 8
            )
            bench = Bench(cluster, many, short, long)
            for fault in faults:
                try:
                    cluster.wait_until_whole()
                    row: Row = getattr(bench, fault.live)()
                except ChaosFailed as error:
                    row = Row(fault=fault.id, ok=False, streams=0, measured=str(error))
                print(f"{row.fault} {'held' if row.ok else 'DID NOT HOLD'}: {row.measured}", flush=True)
                rows.append(row)
                report.keep([row], "live")
            if streams:
                rows.append(_campaign(bench, streams, clients, steady_s))
                report.keep(rows[-1:], "live")
    return rows


def _campaign(bench: Bench, streams: int, clients: int, steady_s: float) -> Row:
    verdict, kills, moved = bench.campaign(streams, clients, steady_s)
    words = [
        f"{kills} kills of any one worker",
        f"{verdict.lost} lost, {verdict.doubled} doubled, {verdict.altered} altered",
        f"longest gap of a stream p50 {verdict.gap(0.5):.2f} s, p99 {verdict.gap(0.99):.2f} s",
    ]
    for part in ("pages", "replay"):
        count = moved.get(f'penumbra_request_move_seconds_count{{part="{part}"}}', 0.0)
        total = moved.get(f'penumbra_request_move_seconds_sum{{part="{part}"}}', 0.0)
        words.append(f"{part} {1000 * total / max(count, 1):.0f} ms on average over {count:.0f} moves")
    if verdict.why:
        words.append(f"first: {verdict.why[0]}")
    ok = not verdict.bad
    try:
        bench.cluster.wait_until_whole()
        bench.cluster.wait_until_idle(15.0)
        words.append("0 pages held")
    except ChaosFailed as error:
        ok = False
        words.append(str(error))
    row = Row(fault="kills", ok=ok, streams=verdict.streams, measured="; ".join(words))
    print(f"{row.fault} {'held' if ok else 'DID NOT HOLD'}: {row.measured}", flush=True)
    return row


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
