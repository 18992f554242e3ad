"""Make the virtual environment: the step that `make up` and `make test` share.

    python deploy/install.py [EXTRA ...]

A script of the standard library alone, run by the system's Python. When nothing it depends on has changed since the
last run it does nothing. It never pulls CUDA unless the `gpu` extra is asked for: the CPU build of torch goes in
first, and the pin in pyproject.toml then holds every later resolve to it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "penumbra-install.json"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUIET_BYTES = 10_000_000
"""Off a terminal, downloads smaller than this are not worth a line."""

DOWNLOAD = re.compile(
    r"\s*(?:Downloading|Using cached|Processing) (?P<file>\S+)(?: \((?P<size>[\d.]+) (?P<unit>kB|MB|GB|bytes)\))?"
)
UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def main(extras: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  the system's Python may be any
        return fail(
            f"Penumbra needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}. "
            "Install python3.11 and run: make install PYTHON=python3.11"
        )
    found = read_stamp()
    had = found.get("extras")
    # Extras only grow: `make up` after `make test` must not take the test tools away.
    asked = sorted({*extras, *(had if isinstance(had, list) else [])})
    wanted = {"packages": packages_digest(), "native": native_digest(), "extras": asked}
    if found == wanted and PYTHON.exists() and (library() or not shutil.which("g++")):
        return 0
    if PYTHON.exists() and {**found, "native": None} == {**wanted, "native": None}:
        say("[1/1] the CPU kernels have changed: compiling them")
        forget_library()
        code = run_quietly([str(PYTHON), "setup.py", "--quiet", "build_ext", "--inplace", "--force"])
    else:
        code = install(asked)
    if code == 0:
        if not library():
            why = "see: .venv/bin/python setup.py build_ext" if shutil.which("g++") else "there is no g++"
            say(f"      no CPU kernels were built ({why}): the slower torch versions will serve")
        STAMP.write_text(json.dumps(wanted, indent=1) + "\n")
    return code


def install(extras: list[str]) -> int:
    began = time.monotonic()
    STAMP.unlink(missing_ok=True)
    say(f"[1/3] virtual environment {VENV.relative_to(ROOT)} (Python {platform.python_version()})")
    if not PYTHON.exists():
        try:
            venv.create(VENV, with_pip=True, symlinks=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return fail(f"Cannot create {VENV}: {error}. On Debian and Ubuntu, apt-get install python3-venv.")
    if code := pip("install", "--upgrade", "pip", "setuptools>=77", "wheel"):
        return code
    torch = torch_requirement()
    say(f"[2/3] {torch}" + ("" if "gpu" in extras else ", the CPU build"))
    if code := install_torch(torch, cpu="gpu" not in extras and sys.platform == "linux"):
        return code
    target = ".[" + ",".join(extras) + "]" if extras else "."
    say(f"[3/3] penumbra{target[1:]}, the packages it stands on, and its CPU kernels")
    forget_library()
    # setuptools is here already, and building without isolation spares downloading it once more.
    if code := pip("install", "--no-build-isolation", "--editable", target):
        return code
    say(f"      installed in {time.monotonic() - began:.0f} s")
    return 0


def install_torch(torch: str, *, cpu: bool) -> int:
    if not cpu:
        return pip("install", torch)
    # The usual index first: mirrors often carry the CPU build. PyTorch's own index carries it always.
    if pip("install", f"{torch}+cpu", report=False) == 0:
        return 0
    return pip("install", f"{torch}+cpu", "--extra-index-url", TORCH_CPU_INDEX)


def pip(*arguments: str, report: bool = True) -> int:
    return run_quietly([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], report=report)


def run_quietly(command: list[str], *, report: bool = True) -> int:
    """Run a chatty command, showing only how far it is, and its last lines when it fails."""
    tail: deque[str] = deque(maxlen=25)
    terminal = sys.stdout.isatty()
    count = 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            if found := DOWNLOAD.match(line):
                count += 1
                name = Path(found["file"]).name
                size = float(found["size"] or 0) * UNITS[found["unit"] or "bytes"]
                text = f"      {count:3d}  {name}" + (f"  {size / 1e6:.0f} MB" if size >= 1e6 else "")
                if terminal:
                    print(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
                elif size >= QUIET_BYTES:
                    say(text)
            elif reached := milestone(line):
                print(f"\r\x1b[2K{reached}" if terminal else reached, end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r\x1b[2K", end="", flush=True)
    if process.returncode and report:
        print("\n".join(tail), file=sys.stderr)
        fail(f"This failed, see the lines above: {' '.join(command)}")
    return process.returncode


def milestone(line: str) -> str | None:
    """What to tell a human when pip writes this line, if anything."""
    if line.startswith("Installing collected packages:"):
        return f"      unpacking {line.count(',') + 1} packages"
    if line.lstrip().startswith("Building editable for penumbra") and "started" in line:
        return "      compiling the CPU kernels"
    return None


def torch_requirement() -> str:
    """The pin of pyproject.toml, which stays its only home."""
    found = re.search(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml pins no torch"
    return found[1]


def packages_digest() -> str:
    """Changes when the packages must be installed anew."""
    digest = hashlib.sha256(f"{ROOT} {platform.python_version()}".encode())
    for name in ("pyproject.toml", "setup.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def native_digest() -> str:
    """Changes when the CPU kernels must be compiled anew: they are compiled for this very processor."""
    digest = hashlib.sha256(platform.machine().encode())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        digest.update(flags.encode())
    for source in sorted((ROOT / "engine" / "csrc").glob("*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def library() -> Path | None:
    return next((ROOT / "engine").glob("_penumbra_cpu*.so"), None)


def forget_library() -> None:
    """A failed compilation is no error, so what it should have replaced must not stay."""
    if (path := library()) is not None:
        path.unlink()
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would copy the old one from here


def read_stamp() -> dict[str, object]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
