"""What a cluster runs, as commands: the same words whichever machine comes to run them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from deploy.supervisor import ChildSpec

PACKAGES = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
"""Children import the packages this process imports, installed or not."""

WORKER_NICE = 10
"""Workers yield to the router on their machine: it needs little, and whoever is refused should hear so at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A worker before it has a machine."""

    name: str
    role: str  # the command of `penumbra` that runs it
    arguments: tuple[str, ...]
    threads: int = 1

    def on(self, address: str) -> ChildSpec:
        """What to start on this machine, which others reach at `address`."""
        command = penumbra_command(self.role, "--host", address, *self.arguments)
        return ChildSpec(name=self.name, command=command, env=threads_environment(self.threads), nice=WORKER_NICE)


def penumbra_command(*arguments: str) -> tuple[str, ...]:
    """`penumbra` under this very interpreter. -P: a folder named cli where the user stands is not ours."""
    return (sys.executable, "-P", "-m", "cli", *arguments)


def threads_environment(count: int) -> dict[str, str]:
    """Every library's own idea of a thread pool, set before it is loaded, as N workers share this machine."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**dict.fromkeys(names, str(count)), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": PACKAGES}
