"""What a worker tells of its own speed: the line through what it has measured."""

from __future__ import annotations

import pytest

from engine.pace import Pace


def test_a_worker_that_has_measured_nothing_tells_nothing():
    assert Pace().line() == (0, 0)


def test_one_depth_gives_one_rate():
    pace = Pace()
    pace.record([(0, 512)], 0.512)
    assert pace.line() == (1_000_000, 0)


def test_depth_costs_what_was_measured_there():
    pace = Pace()
    pace.record([(0, 1_000)], 1.0)  # 1 ms a token, at 2,048 tokens in the middle of its class
    pace.record([(16_384, 1_000)], 3.0)  # 3 ms a token, at 24,576
    token_ns, depth_ns = pace.line()
    for depth, expected_ms in ((2_048, 1.0), (24_576, 3.0), (13_312, 2.0)):
        assert (token_ns + depth / 1024 * depth_ns) / 1e6 == pytest.approx(expected_ms, rel=0.01)


def test_a_prompt_that_only_ran_deep_is_not_taken_for_free_at_its_start():
    pace = Pace()
    pace.record([(0, 1_000)], 0.001)
    pace.record([(1 << 20, 1_000)], 10.0)
    token_ns, depth_ns = pace.line()
    assert token_ns >= 1
    assert depth_ns > 0
