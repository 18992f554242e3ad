"""Places at which a process under test can be made to fail; elsewhere they cost one comparison.

They are off unless the command line of that process names a folder (`--test-failpoints DIR`). A file in it, named after
a place, arms it:

    kill            the process ends there, as by the kernel's hand
    freeze          it stands still, as a debugger would leave it
    raise           the call fails there

The first process that gets there takes the file, so that one of several dies. `kill always 255` stays armed, and is for
calls about 255 only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_folder: Path | None = None  # set once, before anything is served

ACTIONS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


class FailpointReached(Exception):
    """What `raise` raises."""


def enable(folder: Path | None) -> None:
    """Look for armed places in `folder` from now on; None: nowhere."""
    global _folder
    _folder = folder


def failpoint(name: str, about: object = None) -> None:
    """Fail here, if that was asked for."""
    if _folder is not None:
        _reached(_folder / name, str(about))


def _reached(path: Path, about: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        action, *rest = path.read_text().split()
        if rest[:1] == ["always"]:
            if about not in rest[1:]:
                return
        else:
            path.rename(f"{path}.taken")  # somebody else may have been quicker
        if action == "raise":
            raise FailpointReached(path.name)
        os.kill(os.getpid(), ACTIONS[action])
