"""Kernels of few tokens that run beside each other on a GPU: those that compute beside those that read weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class Beside:
    """Kernels queued within its `with` wait for those before it, and run beside those behind it, up to `join`.

    What they make may be read by what is queued behind `join`. Between `with` and `join` nobody else may use this: a
    device has one stream for it, so memory that is freed there goes to those who come after the next fork.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._stream = _other_stream(device)

    @staticmethod
    def pays(x: Tensor) -> bool:
        """Whether a step of tokens x [T, .] is short enough that its kernels leave room for others."""
        if not x.is_cuda:
            return False
        from engine.kernels.device import cuda_products, few_tokens

        return len(x) <= few_tokens.TOKENS and cuda_products()

    def __enter__(self) -> None:
        self._stream.wait_stream(self._main)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self._main)

    def join(self) -> None:
        self._main.wait_stream(self._stream)


@lru_cache(maxsize=8)
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
