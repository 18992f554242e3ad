"""The parts of the time to token 0 lie end to end, whatever came in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.first_token import FirstTokenClock
from wire.types import FirstTokenTimes, PrefillTimes


def test_each_part_is_what_lies_between_two_moments():
    clock = FirstTokenClock(100.0)
    clock.admitted(100.001)
    clock.landed(100.4)  # pages of an earlier offer: hidden behind computing
    clock.last_offer(100.5, PrefillTimes(queue_us=7, compute_us=9))
    clock.landed(100.502)
    assert clock.times(100.503) == FirstTokenTimes(
        admit_us=1_000,
        pages_us=499_000,
        transfer_us=2_000,
        emit_us=1_000,
        prefill=PrefillTimes(queue_us=7, compute_us=9),
    )
    assert round(clock.exposed_s(100.503), 6) == 0.003


def test_a_last_offer_without_pages_leaves_nothing_to_transfer():
    clock = FirstTokenClock(0.0)
    clock.admitted(1.0)
    clock.landed(2.0)
    clock.last_offer(3.0, PrefillTimes())
    assert (clock.times(3.5).transfer_us, clock.times(3.5).emit_us) == (0, 500_000)


moments = st.floats(0, 1e3)


@given(
    steps=st.lists(st.tuples(st.sampled_from(["admitted", "last_offer", "landed"]), moments), max_size=8),
    end=moments,
)
def test_the_parts_have_no_gaps_and_no_overlaps(steps, end):
    clock, now = FirstTokenClock(0.0), 0.0
    offered = False
    for name, later in steps:
        now += later
        if name == "landed":
            clock.landed(now)
        elif not offered:
            # What comes before admission or after the last offer is not for this request.
            clock.admitted(now) if name == "admitted" else clock.last_offer(now, PrefillTimes())
            offered = name == "last_offer"
    times = clock.times(now + end)
    parts = (times.admit_us, times.pages_us, times.transfer_us, times.emit_us)
    assert min(parts) >= 0
    assert abs(sum(parts) - (now + end) * 1e6) <= 4 + 1e-9 * (now + end) * 1e6
