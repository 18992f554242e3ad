"""Kernels that run beside each other wait for what they read: singly and in a graph, whichever takes longer."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda.core import Device, Program, ProgramOptions

from engine.kernels.beside import beside
from engine.kernels.device import use_cuda_products
from engine.kernels.device.cuda import run

pytestmark = pytest.mark.gpu

SOURCE = r"""
__device__ void await_previous() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ int fresh(const int* at) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
__device__ void copy_late(int* to, const int* from, int more, long long cycles) {
    await_previous();
    if (threadIdx.x) return;
    int value = fresh(from) + more;
    for (long long end = clock64() + cycles; clock64() < end;) {}
    *to = value;
}
extern "C" __global__ void late(int* to, const int* from, int more, long long cycles) {
    copy_late(to, from, more, cycles);
}
extern "C" __global__ void late_but_open(int* to, const int* from, int more, long long cycles) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    copy_late(to, from, more, cycles);
}
extern "C" __global__ void compare(const int* one, const int* other, int* apart) {
    await_previous();
    if (threadIdx.x == 0 && fresh(one) != fresh(other)) atomicAdd(apart, 1);
}
"""


@pytest.fixture(autouse=True)
def in_cuda() -> Iterator[None]:
    use_cuda_products(True)
    yield
    use_cuda_products(False)


@pytest.fixture(scope="module")
def program() -> Any:
    torch.zeros(1, device="cuda")
    Device(0).set_current()
    return Program(SOURCE, "c++", ProgramOptions(std="c++17", arch="sm_90a")).compile("cubin")


@pytest.mark.parametrize("name", ["late", "late_but_open"])
@pytest.mark.parametrize("cycles", itertools.product((1_000, 200_000), repeat=3))
def test_what_comes_behind_reads_what_both_made_and_both_read_what_came_before(program, name, cycles) -> None:
    late, compare = program.get_kernel(name), program.get_kernel("compare")
    before, one, other, behind, apart = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(5))

    def copy(to: torch.Tensor, of: torch.Tensor, more: int, cycles: int) -> None:
        run(late, 1, 32, 0, to, of, ctypes.c_int32(more), ctypes.c_int64(cycles), waits=True)

    def layers() -> None:
        for _ in range(8):
            copy(before, before, 1, cycles[0])
            with beside(before) as strand:
                with strand():
                    copy(one, before, 0, cycles[1])
                    copy(one, before, 0, cycles[1])
                copy(other, before, 0, cycles[2])
                with strand():
                    run(compare, 1, 32, 0, one, other, apart, waits=True)
                copy(behind, other, 0, cycles[1])
            run(compare, 1, 32, 0, one, behind, apart, waits=True)

    layers()
    assert [int(t) for t in (before, one, other, behind, apart)] == [8, 8, 8, 8, 0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(20):
        graph.replay()
    assert [int(t) for t in (before, one, other, behind, apart)] == [168, 168, 168, 168, 0]
