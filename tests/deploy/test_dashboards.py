"""Dashboards and alert rules parse, and alerts fire when they should. A cluster's test says that all metrics exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "deploy" / "helm" / "penumbra" / "dashboards"
RULES = DASHBOARDS / "penumbra.rules.yaml"


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel and every alert."""
    for file in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{file.name}: {panel['title']}", target["expr"]
    for rule in rules():
        yield f"{RULES.name}: {rule['alert']}", rule["expr"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:penumbra|process)_[a-z0-9_]+", expression))


def promtool(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("promtool")
    found = str(beside) if beside.exists() else shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool on PATH; Debian's package `prometheus` has it")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", str(RULES))


def test_promtool_accepts_every_expression_of_the_dashboards(tmp_path: Path) -> None:
    def plain(expression: str) -> str:
        return expression.replace("$__rate_interval", "5m").replace("$namespace", ".*")

    recorded = [{"record": f"panel:{i}", "expr": plain(expression)} for i, (_, expression) in enumerate(expressions())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    promtool("check", "rules", str(file))


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts.test.yaml")))


def test_every_alert_says_what_is_wrong_and_where_to_look() -> None:
    for rule in rules():
        assert rule["for"], rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


@pytest.mark.parametrize("file", sorted(DASHBOARDS.glob("*.json")), ids=lambda file: file.name)
def test_a_dashboard_can_be_imported_as_it_is(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    assert dashboard["uid"] == file.stem
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert metric_names(target["expr"]), panel["title"]
