"""Run a command that the kernel kills the moment its supervisor dies.

    python -I -S tether.py SUPERVISOR_PID COMMAND [ARGUMENT ...]

A supervisor that is killed with SIGKILL can not clean up, so the promise is left with the kernel: PR_SET_PDEATHSIG
survives execve, which makes this one script enough for every child, Python or not. It is a script of the standard
library alone because it runs in front of every process of a cluster; it costs about 20 ms.

The signal follows the *thread* that started the command: start children from a thread that lives as long as they
should. Elsewhere than on Linux there is no such call, and the command runs untethered.
"""

from __future__ import annotations

import os
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SIGKILL = 9


def main() -> None:
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"cannot tether {command[0]}: prctl: {os.strerror(ctypes.get_errno())}")
        # The supervisor may have died between the fork and the call above; no signal would ever come.
        if os.getppid() != supervisor:
            sys.exit(f"not starting {command[0]}: process {supervisor} that asked for it is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
