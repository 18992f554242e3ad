"""How the kernels are fast on a GPU: one file for each op of the package above, which says what the op means.

A door of `engine/kernels/<op>.py` that is handed CUDA tensors calls `engine/kernels/device/<op>.py`, and nothing else:
what the device path does not take raises, it never falls back to a slower one in silence. Only then is Triton imported.

Kernels are compiled when first called with arguments of a kind. Counts of tokens, pages and splits are kept out of
that, and `Runner.load` runs steps of every kind before anybody waits for one.

No kernel here waits for the host, and none decides its grid by values that only the device knows, so a whole step can
be captured as a CUDA graph. None uses atomics on floats: the same inputs give the same bits, run after run.

Precision: a product takes fp32 operands where its matrix is fp32 (`--dtype float32`), else bf16 ones, or where CUDA C++
multiplies by e4m3 and e2m1 two e4m3 terms of each (`experts_few`, `experts_some`, `linears_fp8`, `linears_some`) or
fp16 ones (`few_tokens`); it sums in fp32. What lies between products is fp32.

With `--kernels cuda`, the modules named `*_few.py`, `linears_fp8.py` and `few_tokens.py` take what they can of a step
of few tokens, `linears_some.py` of up to 512, `compress_long.py` and `experts_some.py` of more, and `attend_long.py`,
`index_scores.py` and `sample_rows.py` of any number.
"""

from __future__ import annotations

import importlib.util
import os

from wire.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run under Triton's interpreter, on CPU tensors. It truncates where hardware rounds, so kernels that round
to bf16 do so by integer arithmetic there, and hand products fp32 operands that hold bf16 values."""

_cuda_products = False
_early_launches = True


def use_cuda_products(on: bool) -> None:
    """Whether CUDA C++ computes what it takes, rather than Triton: steps of few tokens, products of some more, and all
    FP4 experts that lie in panels. For the whole process, before its first step.
    """
    global _cuda_products
    _cuda_products = on


def cuda_products() -> bool:
    return _cuda_products and not INTERPRETED


def use_early_launches(on: bool) -> None:
    """Whether kernels that allow it may begin while the one in front ends: off to look for races."""
    global _early_launches
    _early_launches = on


def early_launches() -> bool:
    return _early_launches


COMPUTE_CAPABILITY = (9, 0)
"""FP8 products and the sizes of tiles are Hopper's."""


def require(device: str) -> None:
    """Raise ConfigError, saying what to do, unless kernels can run on `device` ("cuda" or "cuda:N")."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r} needs a CUDA GPU and a CUDA build of torch; torch {torch.__version__} sees none here. "
            'Install the GPU packages with `make install EXTRAS="gpu"`, or use --device cpu.'
        )
    found = torch.cuda.get_device_capability(device)
    if found < COMPUTE_CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; the GPU kernels need "
            f"{COMPUTE_CAPABILITY[0]}.{COMPUTE_CAPABILITY[1]} (Hopper) or newer. Use --device cpu."
        )
    for package in ("triton", "cuda.core"):
        if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"device={device!r} needs the package {package}, which is not installed. It comes with the `gpu` "
                'extra: make install EXTRAS="gpu".'
            )
