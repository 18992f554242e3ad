"""Builds the CPU kernels beside the package metadata in pyproject.toml.

The library is plain C++ loaded through ctypes (`engine/kernels/native.py`); it is optional, because
every kernel has a torch reference that takes over where no compiler is at hand. Compiled for the processor it is
compiled on; an image that runs on others sets PENUMBRA_MARCH (deploy/images).
"""

import os
from pathlib import Path

from setuptools import Extension, setup

march = os.environ.get("PENUMBRA_MARCH", "native")

setup(
    ext_modules=[
        Extension(
            "engine._penumbra_cpu",
            sources=sorted(str(path) for path in Path("engine/csrc").glob("*.cpp")),
            extra_compile_args=["-O3", f"-march={march}", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wall"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
