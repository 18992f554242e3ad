"""Tokens drawn from rows of logits: the source of the CUDA kernels run on the CPU, against the twin in numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.device import sample_rows as device
from engine.kernels.sample import CANDIDATES, DRAWN, NOT_FINITE, UNSURE, How, Row, draw, sample, sample_rows, takes
from engine.kernels.topk_rows import topk_rows
from tests.kernels.cuda_on_cpu import compiled
from wire.types import SamplingParams


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("sample_rows", tmp_path_factory.mktemp("sample"))


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "parts", "candidates", "drawn")),
        *((name, ctypes.c_void_p) for name in ("segment", "positions")),
        ("row_stride", ctypes.c_longlong), ("count", ctypes.c_int), ("vocabulary", ctypes.c_int),
    )  # fmt: skip


def row(position: int, seed: int = 0, **options: object) -> Row:
    return Row(params=SamplingParams(max_tokens=1, seed=seed, **options), position=position)  # type: ignore[arg-type]


def drawn(
    library: ctypes.CDLL, logits: Tensor, rows: list[Row] | How, segment: Tensor | None = None,
    positions: Tensor | None = None,
) -> NDArray[np.int32]:  # fmt: skip
    """[S, 2]: tokens and what became of the rows."""
    count, vocabulary = logits.shape
    how = (rows if isinstance(rows, How) else How.of_rows(rows)).bits
    parts = np.full((count * 32, device.PART_BYTES), 0xFF, np.uint8)
    made = np.full((count, 2), -9, np.int32)
    candidates = topk_rows(logits, torch.full((count,), vocabulary), CANDIDATES).int().contiguous()
    call = Call(
        logits.data_ptr(), how.ctypes.data, parts.ctypes.data, candidates.data_ptr(), made.ctypes.data,
        None if segment is None else segment.data_ptr(), None if positions is None else positions.data_ptr(),
        logits.stride(0), count, vocabulary,
    )  # fmt: skip
    library.run_parts(ctypes.byref(call))
    library.run_rows(ctypes.byref(call))
    return made


MIXES: list[dict[str, object]] = [
    {"temperature": 0}, {"seed": 5}, {"seed": -3, "temperature": 0.3}, {"seed": 2**63 - 1, "choice": 3},
    {"seed": 1, "top_p": 0.9}, {"seed": 2, "top_p": 0.2, "temperature": 1.7}, {"seed": 3, "top_k": 1},
    {"seed": 4, "top_k": 40}, {"seed": 5, "top_k": 40, "top_p": 0.5}, {"seed": 6, "min_p": 0.1},
    {"seed": 7, "top_k": 511, "top_p": 0.99, "min_p": 0.001}, {"seed": 8, "top_p": 0.7, "min_p": 0.02},
    {"seed": 9, "temperature": 0, "top_k": 5, "top_p": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("vocabulary", [576, 7_680])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_tokens_are_those_of_the_twin(library, vocabulary: int, spread: float) -> None:
    """Every mix of options at several positions; rows lie apart."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = [row(position, **mix) for position in (0, 7, 900_000) for mix in MIXES]
    logits = (torch.randn(len(rows), vocabulary + 64, generator=generator) * spread)[:, :vocabulary]
    got = drawn(library, logits, rows)
    expected = sample(logits.numpy(), rows)
    certain = got[:, 1] == DRAWN
    assert got[certain, 0].tolist() == [s.token_id for s, known in zip(expected, certain, strict=True) if known]
    # Flat rows are those of which filters keep more than the candidates.
    assert certain.sum() >= (len(rows) if spread > 1 else len(rows) - 12)
    assert set(got[~certain, 1].tolist()) <= {UNSURE}


def test_equals_go_to_the_lower_token(library) -> None:
    logits = torch.zeros(3, 1_024)
    logits[:, [700, 31, 32, 900]] = 4.0
    rows = [row(0, temperature=0), row(1, seed=1, top_k=2), row(2, seed=1, top_k=3, min_p=0.5)]
    got = drawn(library, logits, rows)
    assert got[0].tolist() == [31, DRAWN]
    assert got[1, 0] in (31, 32)
    assert got[2, 0] in (31, 32, 700)
    assert got[:, 0].tolist() == [s.token_id for s in sample(logits.numpy(), rows)]


@pytest.mark.parametrize("worth", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 511, 1_023])
def test_a_row_that_is_not_finite_is_told_and_its_neighbour_drawn(library, worth: float, place: int) -> None:
    logits = torch.randn(4, 1_024, generator=torch.Generator().manual_seed(1))
    logits[[0, 2], place] = worth
    got = drawn(library, logits, [row(0, seed=1), row(0, seed=1), row(0, seed=1, top_p=0.5), row(0, seed=1, top_p=0.5)])
    assert got[:, 1].tolist() == [NOT_FINITE, DRAWN, NOT_FINITE, DRAWN]


def test_a_row_whose_filters_pass_every_candidate_is_left_to_others(library) -> None:
    logits = torch.randn(3, 2_048, generator=torch.Generator().manual_seed(1)) * 0.01
    got = drawn(library, logits, [row(0, seed=1, top_p=0.9), row(0, seed=1, top_k=512), row(0, seed=1, top_k=511)])
    assert got[:, 1].tolist() == [UNSURE, UNSURE, DRAWN]


def test_a_rows_token_depends_on_no_other_row(library) -> None:
    logits = torch.randn(5, 1_024, generator=torch.Generator().manual_seed(2)) * 3
    rows = [row(n, **mix) for n, mix in enumerate(MIXES[3:8])]
    together = drawn(library, logits, rows)
    for n in range(5):
        assert drawn(library, logits[n : n + 1], rows[n : n + 1]).tolist() == together[n : n + 1].tolist()


def test_noise_is_that_of_the_twin_at_every_place(library) -> None:
    """One distribution, drawn from at many positions and with many seeds."""
    logits = torch.full((40, 576), -30.0)
    logits[:, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rows = [row(977 * n, seed=n // 8) for n in range(40)]
    tokens = drawn(library, logits, rows)[:, 0].tolist()
    assert tokens == [s.token_id for s in sample(logits.numpy(), rows)]
    assert len(set(tokens)) == 4


def test_rows_are_drawn_by_their_segment_and_position(library) -> None:
    """As parts of a step do, which know positions only where they run: in the source and in the twin."""
    logits = torch.randn(9, 1_024, generator=torch.Generator().manual_seed(3)) * 3
    logits[4, 7] = torch.nan
    params = [row(0, **MIXES[n]).params for n in (0, 1, 4, 7)]
    segment, positions = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3]).int(), torch.arange(9) * 100_000
    rows = [Row(params=params[s], position=p + 1) for s, p in zip(segment.tolist(), positions.tolist(), strict=True)]
    expected = [[s.token_id, DRAWN if s.ok else NOT_FINITE] for s in sample(logits.numpy(), rows)]
    assert drawn(library, logits, How.of(params), segment, positions).tolist() == expected
    how = torch.from_numpy(How.of(params).bits.view(np.int64))
    assert draw(logits, how, True, segment, positions).tolist() == expected
    assert takes(logits.device, 1_024)


def test_on_a_cpu_rows_are_drawn_by_the_twin() -> None:
    logits = torch.randn(3, 700)
    rows = [row(0, seed=1), row(1, temperature=0), row(2, seed=1, top_p=0.5, logprobs=True, top_logprobs=2)]
    assert sample_rows(logits, rows) == sample(logits.numpy(), rows)


def test_a_part_is_as_large_as_the_binding_says(library) -> None:
    assert library.part_bytes() == device.PART_BYTES
