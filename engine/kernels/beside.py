"""Kernels of few tokens that run beside each other on a GPU: those that compute beside those that read weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

import torch
from torch import Tensor


@contextmanager
def beside(device: torch.device) -> Iterator[AbstractContextManager[object]]:
    """What is queued within the context that this gives runs beside what else is queued in its own block.

    Both begin behind what was queued before, and what is queued after the block waits for both: after an error too, for
    memory of theirs goes to others then, and a graph can not be captured with a stream left open. One such block at a
    time: a device has one stream for it, so memory that is freed there goes to those who come after the next fork.
    """
    main, other = torch.cuda.current_stream(device), _other_stream(device)
    other.wait_stream(main)
    try:
        yield torch.cuda.stream(other)
    finally:
        main.wait_stream(other)


def pays(x: Tensor) -> bool:
    """Whether a step of tokens x [T, .] is short enough that its kernels leave room for others."""
    if not x.is_cuda:
        return False
    from engine.kernels.device import cuda_products, few_tokens

    return len(x) <= few_tokens.TOKENS and cuda_products()


@lru_cache(maxsize=8)
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
