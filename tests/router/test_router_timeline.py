"""The parts of a request's time lie end to end, whatever the workers say and in whichever order they say it."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from router.attempts import Placed, RelayEvent, Said
from router.placement import Placement
from router.timeline import PARTS, Timeline
from wire.types import (
    Admitted,
    FirstTokenTimes,
    PrefillTimes,
    Progress,
    Role,
    TokenEvent,
    Tokens,
    WorkerInfo,
)


def pair() -> Placement:
    prefill, decode = (
        WorkerInfo(worker_id=role, role=role, address="127.0.0.1:1", epoch=1, model="m", signature="v4")
        for role in (Role.PREFILL, Role.DECODE)
    )
    return Placement(prefill=prefill, decode=decode)


def decode(event: Admitted | Tokens, attempt: int = 1) -> Said:
    return Said(attempt, Role.DECODE, event)


def prefill(done: int, *, total: int = 1000, cached: int = 0, attempt: int = 1) -> Said:
    return Said(attempt, Role.PREFILL, Progress(done=done, total=total, cached=cached))


ADMITTED = Admitted(resident_prefix=0, secret=b"s" * 16)
TIMES = FirstTokenTimes(
    admit_us=900, pages_us=9_000_000, transfer_us=500_000, emit_us=200_000, prefill=PrefillTimes(queue_us=7)
)


def first_token(times: FirstTokenTimes | None = TIMES, attempt: int = 1) -> Said:
    return decode(Tokens(attempt=attempt, tokens=(TokenEvent(index=0, token_id=5),), times=times), attempt)


def arrived() -> Timeline:
    line = Timeline(100.0)
    for part, end in (("receive", 101.0), ("tokenize", 103.0), ("queue", 106.0)):
        line.ended(part, end)
    return line


def parts(line: Timeline) -> dict[str, float]:
    return {part: round(end - begin, 6) for part, begin, end in line.parts()}


def test_the_router_measures_the_parts_and_the_decode_worker_divides_the_last_ones():
    line = arrived()
    line.saw(110.0, Placed(1, pair()))
    line.saw(115.0, decode(ADMITTED))
    line.saw(124.8, first_token())
    line.delivered(125.0)
    assert parts(line) == {
        "receive": 1.0,
        "tokenize": 2.0,
        "queue": 3.0,
        "route": 4.0,
        "retry": 0.0,
        "admit": 5.0,
        "prefill": 9.1,  # the decode worker said 9; the messages took the rest
        "transfer": 0.5,
        "first_decode": 0.4,  # 0.2 s in the worker and 0.2 s in the router
    }
    line.delivered(130.0)
    body = line.to_json()
    assert (body["ttft_ms"], body["tokens_ms"]) == (25_000.0, 5_000.0)
    assert sum(body[f"{part}_ms"] for part in PARTS) == 25_000.0
    assert body["prefill_worker"] == {"queue_ms": 0.007, "compute_ms": 0.0}


def test_what_failed_attempts_took_is_a_part_of_its_own():
    line = arrived()
    line.saw(107.0, Placed(1, pair()))
    line.saw(108.0, decode(ADMITTED))
    line.saw(109.0, prefill(500))
    line.saw(120.0, Placed(2, pair()))
    line.saw(121.0, first_token(attempt=1))  # late, of the attempt that was given up
    assert line.progress(121.0) is None
    line.saw(122.0, decode(ADMITTED, attempt=2))
    line.saw(124.0, first_token(None, attempt=2))
    line.delivered(124.0)
    assert parts(line) == dict.fromkeys(PARTS, 0.0) | {
        "receive": 1.0,
        "tokenize": 2.0,
        "queue": 3.0,
        "route": 1.0,
        "retry": 13.0,
        "admit": 2.0,
        "prefill": 2.0,
    }


def test_an_attempt_that_goes_on_after_the_first_token_leaves_the_parts_as_they_were():
    line = arrived()
    line.saw(107.0, Placed(1, pair()))
    line.saw(108.0, decode(ADMITTED))
    line.saw(118.0, first_token())
    line.delivered(118.0)
    before = parts(line)
    line.saw(130.0, Placed(2, pair()))
    line.saw(131.0, decode(ADMITTED, attempt=2))
    assert parts(line) == before


def test_a_fork_shares_what_was_and_goes_its_own_way():
    line = arrived()
    other = line.fork()
    line.saw(110.0, Placed(1, pair()))
    other.saw(111.0, Placed(1, pair()))
    for each in (line, other):
        each.saw(112.0, first_token(None))
        each.delivered(112.0)
    assert (parts(line)["route"], parts(other)["route"]) == (4.0, 5.0)
    assert parts(line)["tokenize"] == parts(other)["tokenize"] == 2.0


def test_progress_says_how_far_a_prompt_is_and_how_long_the_rest_will_take():
    line = arrived()
    line.saw(107.0, Placed(1, pair()))
    assert line.progress(107.5) is None
    line.saw(108.0, prefill(200, cached=200))
    assert line.progress(109.0).to_json() == {
        "total": 1000,
        "cache": 200,
        "processed": 200,
        "time_ms": 1000.0,
        "eta_ms": None,
    }
    line.saw(110.0, prefill(400, cached=200))
    # 200 tokens in 2 s, 600 are left.
    assert line.progress(110.0).to_json() == {
        "total": 1000,
        "cache": 200,
        "processed": 400,
        "time_ms": 2000.0,
        "eta_ms": 6000.0,
    }
    # The prefill worker's last word may come after the first token, which says as much.
    line.saw(116.0, decode(ADMITTED))
    line.saw(117.0, first_token())
    assert line.progress(117.0).to_json() | {"processed": 1000, "eta_ms": 0.0} == line.progress(117.0).to_json()


events = st.one_of(
    st.integers(1, 3).map(lambda attempt: Placed(attempt, pair())),
    st.integers(1, 3).map(lambda attempt: decode(ADMITTED, attempt)),
    st.integers(1, 3).map(lambda attempt: prefill(10, attempt=attempt)),
    st.builds(
        first_token,
        st.none()
        | st.builds(
            FirstTokenTimes,
            pages_us=st.integers(0, 2**63),
            transfer_us=st.integers(0, 2**63),
            emit_us=st.integers(0, 2**63),
        ),
        st.integers(1, 3),
    ),
)


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0, 1e3), events), max_size=12),
    ended=st.lists(st.tuples(st.sampled_from(PARTS[:3]), st.floats(0, 1e3)), max_size=4),
)
def test_whatever_happens_the_parts_sum_to_the_time_to_first_token(
    steps: list[tuple[float, RelayEvent]], ended: list[tuple[str, float]]
):
    now, line = 50.0, Timeline(50.0)
    for part, later in ended:
        line.ended(part, now := now + later)
    for later, event in steps:
        line.saw(now := now + later, event)
    assert list(line.parts()) == []
    line.delivered(now := now + 1.0)
    found = list(line.parts())
    assert [part for part, _, _ in found] == list(PARTS)
    assert found[0][1] == 50.0
    assert found[-1][2] == now == line.first_token
    assert all(begin <= end for _, begin, end in found)
    assert all(end == begin for (_, _, end), (_, begin, _) in itertools.pairwise(found))
    body = line.to_json()
    assert abs(sum(body[f"{part}_ms"] for part in PARTS) - body["ttft_ms"]) < 0.01
