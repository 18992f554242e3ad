"""CUDA sources of engine/csrc, compiled for this machine's processor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """tests/kernels/<name>_on_cpu.cpp, which runs the blocks of engine/csrc/<name>.cu one after another."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels with")
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    built = folder / f"{name}.so"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-I", here, "-I", root / "engine" / "csrc",
         here / f"{name}_on_cpu.cpp", "-o", built],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(built))
