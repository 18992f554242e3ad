"""The CUDA top-k on the GPU it is for."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.topk_rows import topk_rows

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


def by_sort(scores: torch.Tensor, lengths: list[int], k: int) -> torch.Tensor:
    expected = torch.full((len(scores), k), -1, dtype=torch.int32, device="cuda")
    for row, out, length in zip(scores, expected, lengths, strict=True):
        values = torch.where(row[:length].isnan(), torch.inf, row[:length])
        best = values.sort(descending=True, stable=True).indices[:k].sort().values
        out[: len(best)] = best.int()
    return expected


@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("width", [65_536, 262_144])
def test_it_picks_what_a_stable_sort_picks_ten_times_alike(k, width):
    lengths = [0, 1, k - 1, k, k + 1, 16_383, 16_385, 32_768, 32_769, 40_000, width - 1, width]
    generator = torch.Generator("cuda").manual_seed(k + width)
    normal = torch.randn(len(lengths), width, device="cuda", generator=generator)
    places = torch.arange(width, device="cuda")
    for scores in (
        normal,
        places.float().expand_as(normal).contiguous(),
        -places.float().expand_as(normal).contiguous(),
        torch.full_like(normal, 2.5),
        torch.randint(4, normal.shape, device="cuda", generator=generator).float(),
        normal.clamp_min(2.5),
        torch.where(normal > 0, 0.0, -0.0),
        torch.where(normal.abs() > 2, normal / 0, normal),
        torch.where(normal > 3, torch.nan, normal),
        torch.sin(places / 500) + 0.01 * normal,
    ):
        poisoned = scores.clone()
        for row, length in zip(poisoned, lengths, strict=True):
            row[length:] = torch.inf
        expected = by_sort(scores, lengths, k)
        for _ in range(10):
            assert torch.equal(topk_rows(poisoned, torch.tensor(lengths, device="cuda"), k), expected)
