"""The picture of decode steps holds what the file of results does."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.picture import draw_steps, floor_s
from wire.errors import ConfigError

HEAD = "date,commit,device,copy_tb_s,layers,batch,tokens,context,step_ms,kernels\n"


def test_each_gpu_has_a_panel_and_each_kind_of_kernels_a_line(tmp_path: Path) -> None:
    steps, out = tmp_path / "step.csv", tmp_path / "step.svg"
    steps.write_text(
        HEAD
        + "d,c,One GPU,4.0,43,1,1,4096,7.0,cuda\n"
        + "d,c,One GPU,4.0,43,1,1,4096,17.0,triton\n"
        + "d,c,Another,3.0,43,1,4,900000,14.0,cuda\n"
        + "d,c,A slice,3.0,6,1,4,900000,2.0,cuda\n"
        + "d,c,A batch,3.0,43,8,1,4096,2.0,cuda\n"
    )
    drawn = draw_steps(steps, out).read_text()
    for there in ("One GPU", "Another", "1 token, CUDA C++", "1 token, Triton alone", "4 tokens, CUDA C++"):
        assert there in drawn
    assert "A slice" not in drawn
    assert "A batch" not in drawn
    assert draw_steps(steps, tmp_path / "again.svg").read_text() == drawn, "the same file every time"


def test_without_a_step_of_the_whole_model_it_says_how_to_make_some(tmp_path: Path) -> None:
    steps = tmp_path / "step.csv"
    steps.write_text(HEAD)
    with pytest.raises(ConfigError, match="penumbra bench step"):
        draw_steps(steps, tmp_path / "step.svg")


def test_a_floor_reads_the_weights_of_all_tokens_and_the_context_once() -> None:
    one, four, far = floor_s(1, 4_096, 4e12), floor_s(4, 4_096, 4e12), floor_s(4, 900_000, 4e12)
    assert 2.5e-3 < one < 3.0e-3, "11.2 GB"
    assert 5.0e-3 < four < 5.6e-3, "21 GB: experts of four tokens"
    assert 1e-4 < far - four < 3e-4, "0.8 GB of index rows and compressed rows"
