"""docs/faults.md: one row a fault, as the last run that included it found it."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

from bench.record import RESULTS, commit, load, machine
from chaos.judge import Row
from chaos.table import FAULTS

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
ROWS = RESULTS / "faults.csv"
"""Where the page and its rows are, until `into` says otherwise."""
COLUMNS = ("fault", "date", "commit", "machine", "load", "how", "ok", "n", "measured")

HEAD = """# Faults

What is promised when something breaks, and what the last `penumbra chaos` found. *live*: done to the processes of a
real cluster on one machine, every answer compared token by token with an undisturbed one, then everything must be free
again within 15 s. *tests*: done without processes, to the same code. N counts answers (live) or tests. "0 of N" is no
proof of never: 3/N bounds the rate at 95%.

Generated; `make chaos` rewrites it.

"""


def into(folder: Path) -> None:
    """Keep rows and page there from now on."""
    global PAGE, ROWS
    PAGE, ROWS = folder / "faults.md", folder / "faults.csv"


def keep(rows: list[Row], how: str) -> None:
    """Replace these rows of the table that is kept."""
    known = {row["fault"]: row for row in _known()}
    stamp = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "load": str(load()),
        "how": how,
    }
    for row in rows:
        known[row.fault] = {
            **stamp,
            "fault": row.fault,
            "ok": "yes" if row.ok else "no",
            "n": str(row.streams),
            "measured": row.measured,
        }
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(known[name] for name in sorted(known))


def write() -> Path:
    """Write the page from what is kept."""
    known = {row["fault"]: row for row in _known()}
    lines = ["| # | fault | promise | how | held | N | measured |", "|---|---|---|---|---|---|---|"]
    for fault in FAULTS:
        row = known.get(fault.id)
        if row is not None:
            cells = (row["how"], row["ok"], row["n"], f"{row['measured']} ({row['commit']})")
        else:
            cells = ("live" if fault.live else "tests", "", "", "not run yet")
        lines.append(f"| {fault.id} | {fault.what} | {fault.promise} | {' | '.join(cells)} |")
    others = [row for name, row in sorted(known.items()) if not name.startswith("F")]
    if others:
        lines += ["", "| run | held | answers | measured | commit |", "|---|---|---|---|---|"]
        lines += [f"| {r['fault']} | {r['ok']} | {r['n']} | {r['measured']} | {r['commit']} |" for r in others]
    loads: dict[str, list[float]] = {}
    for row in known.values():
        loads.setdefault(row["machine"], []).append(float(row["load"]))
    machines = [f"{name} (load {min(seen):g} to {max(seen):g} before a row)" for name, seen in sorted(loads.items())]
    lines += ["", "Machines: " + "; ".join(machines) + "."] if machines else []
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    return PAGE


def held() -> set[str]:
    """What held when it was last done, at this very commit."""
    here = commit()
    return {row["fault"] for row in _known() if row["ok"] == "yes" and row["commit"] == here and "+" not in here}


def rows(names: list[str]) -> list[Row]:
    """What is kept of these; one that is missing was not done."""
    known = {row["fault"]: row for row in _known()}
    return [
        Row(fault=name, ok=row["ok"] == "yes", streams=int(row["n"]), measured=row["measured"])
        if (row := known.get(name))
        else Row(fault=name, ok=False, streams=0, measured="not done")
        for name in names
    ]


def _known() -> list[dict[str, str]]:
    if not ROWS.exists():
        return []
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))
