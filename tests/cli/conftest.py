from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def penumbra(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program in a process of its own; keyword arguments are environment variables."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PENUMBRA_")}
        return subprocess.run(
            [sys.executable, "-m", "cli", *arguments],
            cwd=ROOT,
            env={**inherited, "PENUMBRA_HOME": str(tmp_path / "home"), "COLUMNS": "100", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended, in the words of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def penumbra_here(tmp_path, monkeypatch, capsys) -> Callable[..., Ended]:
    """Run the program inside this process, for the many cases where starting another one shows nothing more."""
    for name in [name for name in os.environ if name.startswith("PENUMBRA_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str, **env: str) -> Ended:
        with monkeypatch.context() as patch:
            for name, value in {"PENUMBRA_HOME": str(tmp_path / "home"), **env}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run
