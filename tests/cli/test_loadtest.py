"""`penumbra loadtest` on its own: what it refuses, and two records beside each other."""

from __future__ import annotations

import importlib.util

import pytest

from tests.loadtest.records import a_run


@pytest.mark.parametrize("words", [("run", "smoke"), ("compare", "a", "b")])
def test_without_its_extra_it_names_the_extra(penumbra_here, monkeypatch, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "locust" else find(name, *rest)
    )
    result = penumbra_here("loadtest", *words)
    assert result.returncode == 78
    assert "Load tests need the `load` extra, of which locust is not installed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_misspelt_key_is_refused_before_anything_starts(penumbra_here, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nabuot = "a"\n')
    result = penumbra_here("loadtest", "run", str(tmp_path / "mine.toml"))
    assert result.returncode == 78
    assert result.stderr.startswith(f"error: {tmp_path}/mine.toml: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_two_runs_are_compared_in_a_table_and_a_report(penumbra_here, tmp_path):
    for name, slower in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        a_run(slower=slower).save(tmp_path / name / "record.json")
    out = tmp_path / "compare.html"
    result = penumbra_here(
        "loadtest", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), COLUMNS="200"
    )
    assert result.returncode == 0, result.stderr
    assert "TTFT p50, ms" in result.stdout
    assert "2.00x" in result.stdout
    assert "<svg" in out.read_text()
    result = penumbra_here("loadtest", "compare", str(tmp_path / "a"), str(tmp_path / "c"))
    assert result.returncode == 78
    assert "Cannot read" in result.stderr


def test_a_strike_needs_a_cluster_and_a_name(penumbra_here):
    unknown = penumbra_here("chaos", "--strike", "decode-tickled")
    assert unknown.returncode == 78
    assert "choose from prefill-killed, prefill-stopped, prefill-frozen, decode-killed" in unknown.stderr
    absent = penumbra_here("chaos", "--strike", "decode-killed")
    assert absent.returncode == 78
    assert "No cluster runs in" in absent.stderr
