"""The top-k of rows against a stable sort: its reference, and the source of the CUDA kernel run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from engine.kernels.topk_rows import topk_rows
from tests.kernels.cuda_on_cpu import compiled

TopK = Callable[[torch.Tensor, list[int], int], torch.Tensor]


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> TopK:
    """engine/csrc/topk_rows.cu, compiled for this machine's processor."""
    run = compiled("topk_rows", tmp_path_factory.mktemp("topk")).run_topk_rows

    def topk(scores: torch.Tensor, lengths: list[int], k: int) -> torch.Tensor:
        rows, width = scores.shape
        maxima = scores.unflatten(1, (-1, 64)).amax(dim=-1)
        positions = torch.tensor([length - 1 for length in lengths])
        out = torch.full((rows, k), -7, dtype=torch.int32)
        run(
            *(ctypes.c_void_p(t.data_ptr()) for t in (scores, maxima, positions, out)),
            ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_int(k),
        )  # fmt: skip
        return out

    return topk


def by_sort(scores: torch.Tensor, lengths: list[int], k: int) -> torch.Tensor:
    expected = torch.full((len(scores), k), -1, dtype=torch.int32)
    for row, out, length in zip(scores, expected, lengths, strict=True):
        values = torch.where(row[:length].isnan(), torch.inf, row[:length])
        best = values.sort(descending=True, stable=True).indices[:k].sort().values
        out[: len(best)] = best.int()
    return expected


def rows_of(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(n, generator=generator)
    return {
        "normal": normal,
        "ascending": torch.arange(n).float(),
        "descending": -torch.arange(n).float(),
        "constant": torch.full((n,), 3.25),
        "few values": torch.randint(4, (n,), generator=generator).float() - 2,
        "mostly zero": normal.clamp_min(2.5) - 2.5,
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "infinities": torch.where(normal.abs() > 2, normal / 0, normal),
        "not numbers": torch.where(normal > 3, torch.nan, normal),
        "huge and tiny": normal * torch.exp(20 * torch.randn(n, generator=generator)),
        "smooth": torch.sin(torch.arange(n) / 500) + 0.01 * normal,
    }[kind]


KINDS = (
    "normal", "ascending", "descending", "constant", "few values", "mostly zero", "zeros of both signs", "infinities",
    "not numbers", "huge and tiny", "smooth",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_cuda_kernel_picks_what_a_stable_sort_picks(cuda_on_cpu, kind):
    generator = torch.Generator().manual_seed(5)
    # Short of k, just over it, all on chip, and by the tiles' maxima; the rest of a row is poison.
    lengths = [0, 513, 5_000, 45_001]
    scores = torch.full((len(lengths), 45_056), torch.inf)
    for row, length in zip(scores, lengths, strict=True):
        row[:length] = rows_of(kind, length, generator)
        row[length : -(-length // 64) * 64] = -torch.inf  # as the indexer leaves the rest of a tile
    assert torch.equal(cuda_on_cpu(scores, lengths, 512), by_sort(scores, lengths, 512))


def test_the_cuda_kernel_is_exact_at_the_longest_row(cuda_on_cpu):
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(1, 262_144, generator=generator)
    assert torch.equal(cuda_on_cpu(scores, [262_144], 1024), by_sort(scores, [262_144], 1024))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_picks_what_a_stable_sort_picks(kind):
    generator = torch.Generator().manual_seed(7)
    lengths = [0, 3, 64, 65, 1_000]
    scores = torch.stack([rows_of(kind, 1_000, generator) for _ in lengths])
    assert torch.equal(topk_rows(scores, torch.tensor(lengths), 64), by_sort(scores, lengths, 64))
