"""The board draws one picture a tick; changes lead from each to the next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from router.attempts import RelayRequest
from router.board import MOST_REQUESTS, Board, Look, distribution
from router.fleet import FleetSnapshot, WorkerView
from router.live import LiveRequests
from router.timeline import Timeline
from wire.errors import WorkerLost
from wire.types import Link, Role, SamplingParams, WorkerInfo


def worker(name: str, **more: Any) -> WorkerInfo:
    role = Role(name.split("-")[0])
    return WorkerInfo(worker_id=name, role=role, address="10.0.0.1:5", epoch=1, model="m", signature="s", **more)


def look(at: float, *workers: WorkerInfo, serving: bool = True) -> Look:
    views = [WorkerView(info=info, serving=serving) for info in workers]
    fleet = FleetSnapshot(
        prefill=tuple(view for view in views if view.info.role is Role.PREFILL),
        decode=tuple(view for view in views if view.info.role is Role.DECODE),
    )
    return Look(now_s=at, unix_s=1_000_000 + at, fleet=fleet, mirrored={"prefill-0": 7}, router={"router_id": "r"})


def request(name: str, prompt_tokens: int = 8) -> RelayRequest:
    sampling = SamplingParams(max_tokens=4, seed=1)
    return RelayRequest(request_id=name, prompt=tuple(range(prompt_tokens)), sampling=sampling, vocab_size=100)


def test_a_change_holds_what_changed_and_the_frame_holds_everything() -> None:
    board = Board(LiveRequests())
    prefill, decode = worker("prefill-0", free_pages=9), worker("decode-0", used_pages=2, cached_pages=1)
    board.tick(look(0, prefill, decode))
    assert [card["worker_id"] for card in board.frame["workers"]] == ["prefill-0", "decode-0"]
    assert board.frame["workers"][0]["pages"] == {"free": 9, "used": 0, "cached": 0, "quarantined": 0}
    assert board.frame["workers"][0]["mirrored_pages"] == 7
    board.tick(look(1, prefill, replace(decode, running=3)))
    assert [(card["worker_id"], card["running"]) for card in board.change["workers"]] == [("decode-0", 3)]
    assert len(board.frame["workers"]) == 2
    assert board.change["seq"] == board.frame["seq"] == 1
    board.tick(look(2, prefill))
    assert (board.change["workers"], board.change["gone"]) == ([], ["decode-0"])


def test_a_worker_that_drains_or_is_silent_says_so() -> None:
    board = Board(LiveRequests())
    board.tick(look(0, worker("prefill-0", draining=True), worker("decode-0")))
    assert [card["state"] for card in board.frame["workers"]] == ["draining", "serving"]
    board.tick(look(1, worker("prefill-0"), worker("decode-0"), serving=False))
    assert {card["state"] for card in board.frame["workers"]} == {"down"}
    assert board.frame["now"]["serving"] == 0


def test_a_pair_is_active_when_its_bytes_are_seen_to_move() -> None:
    def reads(num_bytes: int) -> WorkerInfo:
        link = Link(source="prefill-0", bytes_per_s=2_500_000_000, p50_us=1500, reads=3, read_bytes=num_bytes)
        return worker("decode-0", links=(link,), read_bytes=num_bytes)

    board = Board(LiveRequests())
    board.tick(look(0, reads(100)))
    (link,) = board.frame["links"]
    assert (link["prefill"], link["decode"], link["gb_s"], link["p50_ms"]) == ("prefill-0", "decode-0", 2.5, 1.5)
    board.tick(look(1, reads(100)))
    assert board.change["links"] == []
    board.tick(look(2, reads(900)))
    (link,) = board.change["links"]
    assert link["active_s"] == 1_000_002
    assert board.frame["now"]["read_bytes_s"] == pytest.approx(400)  # 800 bytes in 2 s


def test_requests_are_told_while_they_fly_and_once_when_they_end() -> None:
    requests = LiveRequests()
    board = Board(requests)
    line = Timeline(10.0)
    with requests.follow(request("r1"), line) as live:
        for part, end in (("receive", 10.0), ("tokenize", 10.25), ("queue", 10.5)):
            line.ended(part, end)
        board.tick(look(11))
        assert board.frame["requests"][0]["phases"] == [["tokenize", 0.0], ["queue", 0.25], ["route", 0.5]]
        line.ended("route", 10.75)
        line.ended("retry", 10.75)
        board.tick(look(11))
        assert board.frame["requests"][0]["phases"][-1] == ["admit", 0.75]
        live.generated_tokens = 3
        line.delivered(11.5)
        line.delivered(12.5)
        board.tick(look(13))
        (told,) = board.frame["requests"]
        assert (told["request_id"], told["generated_tokens"], told["prompt_tokens"]) == ("r1", 3, 8)
        assert told["phases"][-2:] == [["prefill", 0.75], ["tokens", 1.5]]
        assert told["arrived"] == 1_000_010
    board.tick(look(3))
    assert board.change["requests"] == []
    (ended,) = board.change["finished"]
    assert ended["request_id"] == "r1"
    assert "failed" not in ended
    assert board.frame["latency"]["ttft"]["p50_ms"] == 1500
    assert board.frame["latency"]["tpot"]["p50_ms"] == 500
    board.tick(look(4))
    assert board.change["finished"] == []
    assert len(board.frame["finished"]) == 1


def test_a_request_that_failed_says_why_and_one_left_by_its_client_was_cancelled() -> None:
    requests = LiveRequests()
    with pytest.raises(WorkerLost), requests.follow(request("r1"), Timeline(0.0)):
        raise WorkerLost("gone")
    with pytest.raises(KeyboardInterrupt), requests.follow(request("r2"), Timeline(0.0)):
        raise KeyboardInterrupt
    assert [told.failed for told in requests.ended] == [WorkerLost.code, "cancelled"]
    assert not requests.flying


def test_with_more_requests_than_a_frame_tells_the_oldest_and_newest_are_there() -> None:
    requests = LiveRequests()
    board = Board(requests)
    holds = [requests.follow(request(f"r{i}"), Timeline(float(i))) for i in range(MOST_REQUESTS + 50)]
    for hold in holds:
        hold.__enter__()
    board.tick(look(1000))
    names = [told["request_id"] for told in board.frame["requests"]]
    assert len(names) == MOST_REQUESTS
    assert (names[0], names[-1]) == ("r0", f"r{MOST_REQUESTS + 49}")
    assert board.frame["num_requests"] == MOST_REQUESTS + 50


@pytest.mark.parametrize("values", [[0.2], [0.0], [1e-3, 1e-3], [0.05, 600.0, 7.0], [10.0, 100.0]])
def test_every_latency_is_counted_between_edges_that_hold_it(values: list[float]) -> None:
    drawn = distribution(values)
    assert sum(drawn["counts"]) == len(values)
    assert len(drawn["edges_ms"]) == len(drawn["counts"]) + 1
    assert drawn["edges_ms"] == sorted(drawn["edges_ms"])
    assert drawn["edges_ms"][0] <= max(min(values) * 1e3, 1e-3) * 1.000001
    assert max(values) * 1e3 <= drawn["edges_ms"][-1] * 1.000001


def test_percentiles_are_values_that_occurred() -> None:
    drawn = distribution([float(i) for i in range(1, 101)])
    assert [drawn[name] for name in ("p50_ms", "p95_ms", "p99_ms")] == [50_000, 95_000, 99_000]
    assert distribution([]) == {"num": 0}
    assert math.isclose(distribution([0.123])["p99_ms"], 123)
