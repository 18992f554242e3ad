"""docs/operate.md: it knows every alert, and what it names exists."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import typer
import yaml

from cli.main import app
from deploy.plan import MODELS, SHEETS, SIZES, Weights
from engine.model.inspect import USABLE, kv_costs

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operate.md").read_text()
RULES = ROOT / "deploy" / "helm" / "penumbra" / "dashboards" / "penumbra.rules.yaml"
NOT_OURS = {"--head", "--include-dashboard", "--from-file", "--namespace", "--replicas", "--previous", "--help"}
"""Flags of ray, kubectl and typer."""


def test_every_alert_has_a_section_that_says_what_to_do_and_no_section_is_of_an_alert_that_is_gone() -> None:
    alerts = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    sections = dict(re.findall(r"^### (Penumbra\w+)\n\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL))
    assert list(sections) == alerts
    assert all(len(section.split()) > 30 for section in sections.values())


def test_every_flag_it_names_is_one_of_the_program() -> None:
    commands = [typer.main.get_command(app)]
    known = set(NOT_OURS)
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        known |= {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert len(named) > 15
    assert named <= known


def test_every_metric_it_names_is_one_of_ours() -> None:
    known = (ROOT / "wire" / "telemetry.py").read_text() + (ROOT / "router" / "process.py").read_text()
    known += "".join(path.read_text() for path in RULES.parent.iterdir())
    named = set(re.findall(r"penumbra_\w+", TEXT))
    assert len(named) >= 5
    assert {name for name in named if name not in known} == set()


@pytest.mark.parametrize("column", [0, 1], ids=list(MODELS))
def test_the_table_of_what_fits_is_what_the_arithmetic_says(column: int) -> None:
    rows = {
        cells[0]: cells[1:]
        for line in TEXT.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 3
    }
    config = list(MODELS.values())[column]
    weights, cost = Weights.of(config).all, kv_costs(config)["v4"]
    assert rows["weights, without the draft layer"][column] == f"{weights / 1e9:.1f} GB"
    assert rows["pages of a token, all layers"][column] == f"{cost.token_bytes:,.0f} bytes"
    request = cost.sequence_bytes(900_000)
    assert rows["pages of 900,000 tokens"][column] == f"{request / 1e9:.1f} GB"
    needed = rows["GPUs that hold it and one such request"][column]
    for number, name in re.findall(r"(\d+) (\w+)", needed):
        free = {gpus: SHEETS[name].memory_bytes * USABLE - weights / gpus for gpus in SIZES}
        assert int(number) == min((gpus for gpus, left in free.items() if left >= request), default=math.inf)
