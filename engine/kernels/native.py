"""The door to the C++ twins of the CPU kernels (`engine/csrc`), loaded with ctypes on first use.

Every kernel module has a torch reference that says what is right. Where the library was built, the same
public function runs its C++ twin instead. ctypes releases the GIL for the length of a call.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wire.errors import ConfigError

POINTER = ctypes.c_void_p
INT = ctypes.c_int64
FLOAT = ctypes.c_float

_reference_only = False
_chosen: Path | None = None


def use_reference(on: bool) -> None:
    """Whether this process keeps to the torch references though the library is there; tests compare both."""
    global _reference_only
    _reference_only = on


def load_from(path: Path | None) -> None:
    """Take the library at `path` instead of the one built beside the package; None goes back to that one."""
    global _chosen
    _chosen = path
    _function.cache_clear()


def library() -> ctypes.CDLL | None:
    """The C++ library, or None where it was never built or `use_reference(True)` was said."""
    return None if _reference_only else _load(_chosen)


def function(name: str, *arguments: Any) -> Callable[..., None] | None:
    """The exported C function `name`, declared as `void name(arguments...)`; None as for `library`.

    arguments  POINTER, INT (int64_t) and FLOAT, one per parameter
    Raises ConfigError when the library lacks the function: it was built from older sources, and running the
    reference in its place would be slow without a word.
    """
    return None if library() is None else _function(name, arguments)


def threads() -> int:
    """How many OpenMP threads a kernel may use: what torch was told."""
    return torch.get_num_threads()


def check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` is contiguous CPU memory of this dtype and shape; None is any length."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is on {tensor.device}, but this kernel runs on the CPU alone. Move the tensor to the CPU."
        )
    wanted = tuple(got if want is None else want for want, got in zip(shape, tensor.shape, strict=False))
    if tensor.dtype != dtype or tensor.dim() != len(shape) or tensor.shape != wanted:
        want_shape = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; the kernel reads {dtype} [{want_shape}]. "
            "Pass that, or the kernel would read other memory."
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; the kernel walks memory in order. Call .contiguous().")


@lru_cache(maxsize=4)
def _load(path: Path | None) -> ctypes.CDLL | None:
    if path is None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")  # this interpreter's; others may have built theirs
        path = Path(__file__).resolve().parent.parent / f"_penumbra_cpu{suffix}"
        if not path.exists():
            return None
    return ctypes.CDLL(str(path))


@lru_cache(maxsize=256)
def _function(name: str, arguments: tuple[Any, ...]) -> Callable[..., None]:
    loaded = _load(_chosen)
    assert loaded is not None
    try:
        symbol = loaded[name]  # indexing gives each declaration a function object of its own
    except AttributeError:
        raise ConfigError(
            f"{loaded._name} has no function {name}: it was built from older sources. "
            "Build it again with `python setup.py build_ext --inplace`."
        ) from None
    symbol.argtypes = list(arguments)
    symbol.restype = None
    return symbol
