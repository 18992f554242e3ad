"""Kernels that begin while the one in front of them ends: programmatic dependent launch.

A kernel launched so says `await_previous` before it reads or writes anything that another may write or read.
Each of them waits, even where it would need nothing, so that what is in front of the one in front has ended too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.device import INTERPRETED, early_launches

_WAITS = tl.constexpr(not INTERPRETED)


def early() -> dict[str, bool]:
    """Options of a launch."""
    return {"launch_pdl": True} if early_launches() and not INTERPRETED else {}


@triton.jit
def await_previous():
    """Until the kernels in front have ended; then the next one may take multiprocessors that are free."""
    if _WAITS:
        gdc_wait()
        gdc_launch_dependents()
