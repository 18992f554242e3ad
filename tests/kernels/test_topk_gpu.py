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


def scores_of_all_kinds(rows: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = torch.randn(rows, width, device="cuda", generator=generator)
    other = torch.randn(rows, width, device="cuda", generator=generator)
    places = torch.arange(width, device="cuda")
    return [
        normal,
        places.float().expand_as(normal),
        -places.float().expand_as(normal),
        torch.full_like(normal, 2.5),
        torch.randint(4, normal.shape, device="cuda", generator=generator).float(),
        normal.clamp_min(2.5),
        normal.relu(),
        torch.where(normal > 0, 0.0, -0.0),
        torch.where(normal.abs() > 2, normal / 0, normal),
        torch.where(normal > 2.5, normal, -torch.inf),
        torch.where(normal > 3, torch.nan, normal),
        normal * (20 * other).exp(),
        torch.where(normal > 1.5, 1e30, 1e-30) * (1 + 1e-3 * other),
        torch.sin(places / 500) + 0.01 * normal,
        -(places - width // 3).abs() + 0.01 * normal,
    ]


@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("width", [65_536, 262_144])
def test_it_picks_what_a_stable_sort_picks_ten_times_alike(k, width):
    lengths = [0, 1, k - 1, k, k + 1, 16_383, 16_385, 32_768, 32_769, 40_000, width - 1, width]
    for scores in scores_of_all_kinds(len(lengths), width, k + width):
        poisoned = scores.clone()
        for row, length in zip(poisoned, lengths, strict=True):
            row[length:] = torch.inf
        expected = by_sort(scores, lengths, k)
        for _ in range(10):
            assert torch.equal(topk_rows(poisoned, torch.tensor(lengths, device="cuda"), k), expected)


@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1024, 2048])
def test_it_is_exact_around_every_border(k, threads):
    from engine.kernels.device.topk_rows import choose

    borders = [k, 4 * threads, 8 * k, 64 * k, 128 * k, 65_536, 262_144]
    lengths = sorted({b + d for b in borders for d in (-1, 0, 1)})
    width = -(-lengths[-1] // 64) * 64
    positions = torch.tensor(lengths, device="cuda") - 1
    for scores in scores_of_all_kinds(len(lengths), width, k):
        poisoned, known = scores.clone(), torch.where(scores.isnan(), torch.inf, scores)
        for row, tops, length in zip(poisoned, known, lengths, strict=True):
            row[length:] = torch.nan
            tops[length:] = -torch.inf
        maxima = known.unflatten(1, (-1, 64)).amax(dim=-1)
        expected = by_sort(scores, lengths, k)
        assert torch.equal(choose(poisoned, maxima, positions, 1, k, threads), expected)
        assert torch.equal(choose(poisoned, None, positions, 1, k, threads), expected)


def test_rows_of_any_width_and_alignment_are_taken():
    scores = torch.randn(7, 1_003, device="cuda")
    lengths = torch.tensor([0, 5, 64, 600, 1_001, 1_002, 1_003], device="cuda")
    assert torch.equal(topk_rows(scores, lengths, 512), by_sort(scores, lengths.tolist(), 512))
    assert torch.equal(topk_rows(scores[1:], lengths[1:], 512), by_sort(scores[1:], lengths[1:].tolist(), 512))
