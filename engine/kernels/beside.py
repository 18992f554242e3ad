"""Kernels of a short step that run beside each other on a GPU: those that compute beside those that read weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

TOKENS = 64
"""Of a step whose kernels leave room for others, at most."""


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """What is queued within a context that the given function makes runs beside what else is queued in its own block.

    It begins behind all that was queued before that context, and what is queued after the block waits for it: after an
    error too, for memory of theirs goes to others then, and a graph can not be captured with a stream left open. One
    such block at a time: a device has one stream for it, so memory that is freed there goes to those who come after the
    next fork.

    For a step of tokens x [T, .] that is too long, or on a CPU, all is queued as it comes.
    """
    if not _pays(x):
        yield nullcontext
        return
    main, other = torch.cuda.current_stream(x.device), _other_stream(x.device)

    def forked() -> AbstractContextManager[object]:
        other.wait_stream(main)
        return torch.cuda.stream(other)

    other.wait_stream(main)
    try:
        yield forked
    finally:
        main.wait_stream(other)


def _pays(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    from engine.kernels.device import cuda_products

    return len(x) <= TOKENS and cuda_products()


@lru_cache(maxsize=8)
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
