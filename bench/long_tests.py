"""Keep what `make test-long` found: one row a test, replacing the row it had before.

    python -m bench.long_tests REPORT.xml

The long tests run for too long to run with every change, so the tree says when they last passed, where and on what.
"""

from __future__ import annotations

import csv
import datetime
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.record import RESULTS, commit, machine

COLUMNS = ("date", "commit", "machine", "test", "outcome", "seconds", "measured")


def rows(report: Path) -> list[dict[str, str]]:
    """Every test of a JUnit report that was run. `measured` holds what the test recorded, as name=value."""
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine()}
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if "skipped" in kinds:
            continue
        measured = " ".join(f"{p.get('name')}={p.get('value')}" for p in case.iter("property"))
        found.append(
            stamp
            | {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "outcome": "failed" if kinds & {"failure", "error"} else "passed",
                "seconds": f"{float(case.get('time', 0)):.1f}",
                "measured": measured,
            }
        )
    return found


def main(report: Path) -> int:
    path = RESULTS / "test-long.csv"
    kept: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {row["test"]: row for row in csv.DictReader(file)}
    kept |= {row["test"]: row for row in rows(report)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(kept.values())
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
