"""Kernels that run beside each other wait for what they read: singly and in a graph, whichever takes longer."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from cuda.core import Device, Program, ProgramOptions

from engine.kernels.beside import beside
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
extern "C" __global__ void late(int* to, const int* from, int more, long long cycles) {
    await_previous();
    if (threadIdx.x) return;
    int value = fresh(from) + more;
    for (long long end = clock64() + cycles; clock64() < end;) {}
    *to = value;
}
extern "C" __global__ void compare(const int* one, const int* other, int* apart) {
    await_previous();
    if (threadIdx.x == 0 && fresh(one) != fresh(other)) atomicAdd(apart, 1);
}
"""


@pytest.fixture(scope="module")
def kernels() -> tuple[Any, Any]:
    torch.zeros(1, device="cuda")
    Device(0).set_current()
    program = Program(SOURCE, "c++", ProgramOptions(std="c++17", arch="sm_90a")).compile("cubin")
    return program.get_kernel("late"), program.get_kernel("compare")


@pytest.mark.parametrize("cycles", itertools.product((1_000, 200_000), repeat=3))
def test_what_comes_behind_reads_what_both_made_and_both_read_what_came_before(kernels, cycles) -> None:
    late, compare = kernels
    zero = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(4)]
    before, one, other, apart = zero

    def copy(to: torch.Tensor, of: torch.Tensor, more: int, cycles: int) -> None:
        run(late, 1, 32, 0, to, of, ctypes.c_int32(more), ctypes.c_int64(cycles), waits=True)

    def layers() -> None:
        for _ in range(8):
            copy(before, before, 1, cycles[0])
            with beside(before.device) as strand:
                with strand:
                    copy(one, before, 0, cycles[1])
                    copy(one, before, 0, cycles[1])
                copy(other, before, 0, cycles[2])
            run(compare, 1, 32, 0, one, other, apart, waits=True)

    layers()
    assert [int(t) for t in (before, one, other, apart)] == [8, 8, 8, 0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(20):
        graph.replay()
    assert [int(t) for t in (before, one, other, apart)] == [168, 168, 168, 0]
