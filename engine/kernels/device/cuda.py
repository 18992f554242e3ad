"""CUDA C++ kernels of engine/csrc/*.cu: compiled for the GPU that is there when first asked for, by NVRTC."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

from engine.kernels.device import early_launches

SOURCES = Path(__file__).resolve().parent.parent.parent / "csrc"


class _Stream:
    """torch's current stream, as cuda.core takes foreign ones."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    device = Device(torch.cuda.current_device())
    device.set_current()
    arch = "".join(str(part) for part in device.compute_capability)
    options = ProgramOptions(
        std="c++17", arch=f"sm_{arch}a", include_path=str(SOURCES), device_as_default_execution_space=True
    )
    return Program((SOURCES / source).read_text(), "c++", options).compile("cubin")


@lru_cache(maxsize=64)
def kernel(source: str, name: str, shared_bytes: int = 0) -> Any:
    """The kernel `name` of engine/csrc/`source`, which must be extern "C".

    It may have so much dynamic shared memory, or the 48 KiB that any kernel may.
    """
    function = _compiled(source).get_kernel(name)
    if not shared_bytes:
        return function
    device = Device(torch.cuda.current_device())
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(
        attribute, shared_bytes, driver.CUkernel(int(function.handle)), driver.CUdevice(device.device_id)
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} asks for {shared_bytes} bytes of shared memory, which this GPU refuses: {status}")
    return function


@lru_cache(maxsize=16)
def _device_stream(handle: int) -> Any:
    return Device(torch.cuda.current_device()).create_stream(_Stream(handle))


def run(function: Any, grid: int, block: int, shared_bytes: int, *arguments: Any, waits: bool = False) -> None:
    """Queue `function` on torch's current stream. arguments: tensors, 0 for none, ctypes scalars.

    waits: it calls griddepcontrol.wait before it reads what others wrote, so it may begin while the kernel in front
    of it ends.
    """
    config = LaunchConfig(
        grid=grid, block=block, shmem_size=shared_bytes, programmatic_stream_serialization=waits and early_launches()
    )
    stream = _device_stream(torch.cuda.current_stream().cuda_stream)
    launch(stream, config, function, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))
