"""A pass forward and backward as one CUDA graph.

A small model's step is thousands of short kernels, and launching them takes three times as long as running them.
Captured once for a shape, they are launched by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[int, Tensor]]]
"""(ids, weights, told) -> (sums, picks by layer), adding to the gradients on the way."""

_WARM_UPS = 2


class Captured:
    """`compute`, captured for inputs of the given shapes. Gradients must stay where they are: zeroed, never dropped.

    `compute` may not wait for the device, nor send it anything from the host's memory.
    """

    def __init__(
        self, compute: Compute, inputs: tuple[Tensor, Tensor, Tensor], parameters: Iterable[Tensor], pool: Any
    ) -> None:
        """Run `compute` a few times, capture it, and leave the gradients as they were: earlier parts of the same step
        may have added to them. `pool` is shared by graphs that never run at the same time.
        """
        before = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # libraries make their handles, gradients find their places
                compute(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may ask the driver things meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._sums, self._picks = compute(*self._inputs)
        self.pool = self._graph.pool()
        for parameter, gradient in before:
            if parameter.grad is not None:
                parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._sums.clone(), {layer: picks.clone() for layer, picks in self._picks.items()}
