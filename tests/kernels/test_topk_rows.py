"""The top-k of rows against a stable sort: its reference, and the source of the CUDA kernel run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.topk_rows import topk_rows
from tests.kernels.cuda_on_cpu import compiled

TopK = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> TopK:
    """engine/csrc/topk_rows.cu, compiled for this machine's processor."""
    run = compiled("topk_rows", tmp_path_factory.mktemp("topk")).run_topk_rows
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 6

    def topk(
        scores: torch.Tensor, lengths: list[int], k: int, threads: int = 512, maxima: bool = True, turns: int = 0
    ) -> torch.Tensor:
        """Behind a row's end lies what its caller may leave there: anything, but maxima are right."""
        rows, width = scores.shape
        filled, wide = scores.clone(), torch.full((rows, -(-width // 64) * 64), -torch.inf)
        for row, known, length in zip(filled, wide, lengths, strict=True):
            known[:length] = torch.where(row[:length].isnan(), torch.inf, row[:length])
            row[length:] = torch.tensor([torch.inf, torch.nan]).repeat(width)[: width - length]
        tops = wide.unflatten(1, (-1, 64)).amax(dim=-1).contiguous()
        positions = torch.tensor([length - 1 for length in lengths])
        out = torch.full((rows, k), -7, dtype=torch.int32)
        run(
            filled.data_ptr(), tops.data_ptr() if maxima else None, positions.data_ptr(), out.data_ptr(),
            rows, width, tops.shape[1], k, threads, turns,
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
        "half zero": normal.relu(),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "infinities": torch.where(normal.abs() > 2, normal / 0, normal),
        "mostly -infinity": torch.where(normal > 2.5, normal, -torch.inf),
        "not numbers": torch.where(normal > 3, torch.nan, normal),
        "huge and tiny": normal * torch.exp(20 * torch.randn(n, generator=generator)),
        "two clusters": torch.where(normal > 1.5, 1e30, 1e-30) * (1 + 1e-3 * torch.randn(n, generator=generator)),
        "below zero": -normal.abs() - 1,
        "smooth": torch.sin(torch.arange(n) / 500) + 0.01 * normal,
        "one peak": -(torch.arange(n) - n // 3).abs() + 0.01 * normal,
    }[kind]


KINDS = (
    "normal", "ascending", "descending", "constant", "few values", "mostly zero", "half zero", "zeros of both signs",
    "infinities", "mostly -infinity", "not numbers", "huge and tiny", "two clusters", "below zero", "smooth",
    "one peak",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_cuda_kernel_picks_what_a_stable_sort_picks(cuda_on_cpu, kind):
    generator = torch.Generator().manual_seed(5)
    # Short of k, just over it, all there is, read whole, and by the tiles' maxima.
    lengths = [0, 512, 513, 2_045, 5_000, 20_001, 65_535, 70_001]
    scores = torch.zeros(len(lengths), 70_016)
    for row, length in zip(scores, lengths, strict=True):
        row[:length] = rows_of(kind, length, generator)
    assert torch.equal(cuda_on_cpu(scores, lengths, 512), by_sort(scores, lengths, 512))


@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1024, 2048])
def test_the_cuda_kernel_is_exact_around_every_border(cuda_on_cpu, k, threads):
    generator = torch.Generator().manual_seed(k)
    borders = [k, 4 * threads, 8 * k, 64 * k, 128 * k, 65_536]
    lengths = sorted({b + d for b in borders for d in (-1, 0, 1) if b + d <= (70_000 if threads == 512 else 33_000)})
    width = -(-lengths[-1] // 64) * 64
    scores = torch.zeros(len(lengths), width)
    for i, (row, length) in enumerate(zip(scores, lengths, strict=True)):
        row[:length] = rows_of(("normal", "half zero", "smooth")[i % 3], length, generator)
    assert torch.equal(cuda_on_cpu(scores, lengths, k, threads), by_sort(scores, lengths, k))


@pytest.mark.parametrize(
    ("kind", "threads"),
    [("normal", 256), ("normal", 512), ("normal", 1024), ("constant", 512), ("smooth", 512), ("half zero", 512)],
)
def test_the_cuda_kernel_is_exact_in_the_longest_rows(cuda_on_cpu, kind, threads):
    generator = torch.Generator().manual_seed(6)
    lengths = [225_281, 262_144, 262_208]  # one more tile than a bound is found from
    scores = torch.zeros(len(lengths), 262_208)
    for row, length in zip(scores, lengths, strict=True):
        row[:length] = rows_of(kind, length, generator)
    for k in (512, 1024):
        assert torch.equal(cuda_on_cpu(scores, lengths, k, threads), by_sort(scores, lengths, k))


def test_a_nan_in_half_of_a_threads_scores_does_not_raise_the_bound_of_all(cuda_on_cpu):
    scores = torch.randn(1, 32_768, generator=torch.Generator().manual_seed(9))
    scores[0, 4 * torch.arange(3 * 512, 4 * 512)] = torch.nan
    got = cuda_on_cpu(scores, [32_768], 1024, maxima=False)
    assert torch.equal(got, by_sort(scores, [32_768], 1024))


def test_the_binding_knows_how_much_memory_a_block_shares(tmp_path):
    device = pytest.importorskip("engine.kernels.device.topk_rows")
    assert compiled("topk_rows", tmp_path).bytes_of_shared() == device.SHARED_BYTES


def test_a_row_needs_no_maxima(cuda_on_cpu):
    scores = torch.randn(3, 100_032, generator=torch.Generator().manual_seed(8))
    lengths = [3_000, 60_000, 100_032]
    assert torch.equal(cuda_on_cpu(scores, lengths, 512, maxima=False), by_sort(scores, lengths, 512))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_order_in_which_threads_take_their_turns_changes_nothing(cuda_on_cpu, turns):
    """A barrier that were missing would show."""
    generator = torch.Generator().manual_seed(9)
    lengths = [600, 2_045, 4_096, 20_001, 70_001]
    for kind in ("normal", "half zero", "few values", "smooth"):
        scores = torch.zeros(len(lengths), 70_016)
        for row, length in zip(scores, lengths, strict=True):
            row[:length] = rows_of(kind, length, generator)
        assert torch.equal(cuda_on_cpu(scores, lengths, 512, turns=turns), by_sort(scores, lengths, 512))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_picks_what_a_stable_sort_picks_of_any_row(cuda_on_cpu, data):
    n = data.draw(st.integers(1, 20_000) | st.sampled_from([65_536, 65_537, 80_000]))
    k = data.draw(st.integers(1, 2_048))
    kind = data.draw(st.sampled_from(KINDS))
    row = rows_of(kind, n, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):  # all in one place
        at = data.draw(st.integers(0, n - 1))
        row[at : at + k] += data.draw(st.sampled_from([0.5, 1e6, torch.inf]))
    scores = torch.zeros(1, -(-n // 64) * 64)
    scores[0, :n] = row
    threads = data.draw(st.sampled_from([256, 512, 1024]))
    assert torch.equal(cuda_on_cpu(scores, [n], k, threads), by_sort(scores, [n], k))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_picks_what_a_stable_sort_picks(kind):
    generator = torch.Generator().manual_seed(7)
    lengths = [0, 3, 64, 65, 1_000]
    scores = torch.stack([rows_of(kind, 1_000, generator) for _ in lengths])
    assert torch.equal(topk_rows(scores, torch.tensor(lengths), 64), by_sort(scores, lengths, 64))
