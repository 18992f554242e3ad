"""The head that guesses are read with on a GPU: the model's, rounded."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.linear import Matrix
from engine.model import mtp
from engine.model.mtp import head_for_guesses, rounded_to_fp8
from engine.model.weights import dequantise_fp8


@pytest.mark.parametrize(("rows", "columns"), [(512, 256), (300, 200)])
def test_a_head_is_rounded_to_e4m3_part_by_part_as_it_would_be_at_once(rows, columns, monkeypatch):
    weight = (torch.randn(rows, columns) * torch.logspace(-3, 1, rows)[:, None]).bfloat16()
    whole = rounded_to_fp8(weight)
    back = dequantise_fp8(whole.codes.view(torch.float8_e4m3fn), whole.scales)
    block = torch.arange(rows) // (128 if rows % 128 == 0 else rows)  # that share a scale
    largest = torch.stack([weight[block == b].float().abs().max() for b in block.unique()])[block]
    # Four bits of a value, down to 2^-6 at a scale that brings the largest to 224 at least; multiples of 2^-9 below.
    allowed = torch.maximum(weight.float().abs() / 16, largest[:, None] / 224 / 1024)
    assert ((back - weight.float()).abs() <= allowed).all()
    if rows % 128 == 0:
        monkeypatch.setattr(mtp, "HEAD_ROWS", 128)
        parts = rounded_to_fp8(weight)
        assert torch.equal(parts.codes, whole.codes)
        assert torch.equal(parts.scales, whole.scales)


def test_on_a_cpu_guesses_are_read_with_the_head_itself():
    head = Matrix.prepare(torch.randn(64, 32).bfloat16())
    assert head_for_guesses(head) is head
