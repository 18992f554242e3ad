"""Arrivals and words: functions of the seed, right in number, in order and in length."""

from __future__ import annotations

import itertools
import math
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.prose import Prose
from loadtest.scenario import Arrivals, Scenario, load, parse
from loadtest.workload import Writer, job, named, times
from tests.loadtest.test_scenario import LEAST, traffic

PROSE = Prose()


def scenario(**more: object) -> Scenario:
    return parse(LEAST | {"traffic": [traffic(**more)]}, "test")


RATES = st.floats(0.05, 50)


@settings(deadline=None)
@given(
    arrivals=st.one_of(
        st.builds(Arrivals, kind=st.just("poisson"), per_s=RATES),
        st.builds(Arrivals, kind=st.just("constant"), per_s=RATES),
        st.builds(Arrivals, kind=st.just("ramp"), per_s=RATES, to_per_s=RATES),
        st.builds(Arrivals, kind=st.just("once"), count=st.integers(1, 9)),
    ),
    window_s=st.floats(0.5, 40),
    seed=st.text(max_size=4),
)
def test_arrivals_are_in_order_inside_their_window_and_the_same_for_the_same_seed(arrivals, window_s, seed):
    due = list(times(arrivals, window_s, seed))
    assert due == sorted(due)
    assert all(0 <= at < window_s for at in due)
    assert due == list(times(arrivals, window_s, seed))


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        (Arrivals(kind="poisson", per_s=20), 20_000),
        (Arrivals(kind="constant", per_s=20), 20_000),
        (Arrivals(kind="ramp", per_s=10, to_per_s=30), 20_000),
        (Arrivals(kind="ramp", per_s=30, to_per_s=10), 20_000),
        (Arrivals(kind="ramp", per_s=20, to_per_s=20), 20_000),
    ],
)
def test_as_many_arrive_as_the_rate_says(arrivals, expected):
    # Five standard deviations of a Poisson count, and the seed is fixed.
    assert abs(len(list(times(arrivals, 1000.0, "count"))) - expected) <= 5 * math.sqrt(expected)


def test_gaps_of_poisson_arrivals_are_exponential_and_those_of_constant_ones_even():
    due = list(times(Arrivals(kind="poisson", per_s=4), 5000.0, "gaps"))
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert list(times(Arrivals(kind="constant", per_s=4), 1.0, "")) == [0, 0.25, 0.5, 0.75]


def test_a_ramp_brings_a_quarter_of_its_requests_in_the_first_half_when_it_begins_at_nothing():
    due = list(times(Arrivals(kind="ramp", per_s=1e-9, to_per_s=40), 1000.0, "ramp"))
    assert sum(at < 500 for at in due) / len(due) == pytest.approx(0.25, abs=0.02)


def test_a_request_is_the_same_whatever_came_before_it():
    smoke = load("smoke")
    chat = smoke.of("chat")
    forth = [job(smoke, chat, n, 0.0) for n in range(50)]
    back = [job(smoke, chat, n, 0.0) for n in reversed(range(50))]
    assert forth == back[::-1]
    other = smoke.model_copy(update={"seed": 2})
    assert [one.prompt_tokens for one in forth] != [job(other, chat, n, 0.0).prompt_tokens for n in range(50)]


def test_a_mix_has_its_shares_and_so_have_those_who_leave_dawdle_and_repeat():
    mixed = scenario(
        prompt=[{"tokens": 100, "share": 3}, {"tokens": 200, "share": 1}],
        cancel={"share": 0.1, "after_pieces": 2},
        slow={"share": 0.2, "bytes_per_s": 10},
        repeat_share=0.3,
        tenants=["a", "b"],
    )
    jobs = [job(mixed, mixed.traffic[0], n, 0.0) for n in range(4000)]

    def share(of: list[bool]) -> float:
        return sum(of) / len(of)

    assert share([one.prompt_tokens == 100 for one in jobs]) == pytest.approx(0.75, abs=0.04)
    assert share([one.cancel_after_pieces == 2 for one in jobs]) == pytest.approx(0.1, abs=0.03)
    assert share([one.slow_bytes_per_s == 10 for one in jobs]) == pytest.approx(0.2, abs=0.03)
    assert share([one.text_of != one.number for one in jobs]) == pytest.approx(0.3, abs=0.03)
    assert share([one.tenant == "a" for one in jobs]) == pytest.approx(0.5, abs=0.04)


def test_who_repeats_says_the_words_of_one_before_it_and_nobody_else_does():
    repeats = scenario(repeat_share=0.5)
    writer = Writer(repeats, PROSE, 4.0)
    jobs = [job(repeats, repeats.traffic[0], n, 0.0) for n in range(60)]
    words = [writer.first(one).text for one in jobs]
    for one in jobs:
        assert one.text_of <= one.number
        assert jobs[one.text_of].text_of == one.text_of
        assert words[one.number] == words[one.text_of]
    assert len(set(words)) == len({one.text_of for one in jobs}) < 60


@pytest.mark.parametrize(("tokens", "chars_per_token"), [(64, 4.0), (2048, 4.2), (100_000, 1.0)])
def test_prompts_have_the_length_asked_for(tokens, chars_per_token):
    plain = scenario(prompt=[{"tokens": tokens}])
    asked = Writer(plain, PROSE, chars_per_token).first(job(plain, plain.traffic[0], 0, 0.0))
    assert len(asked.text) == round(tokens * chars_per_token)


def test_each_needle_is_hidden_once_in_its_part_of_the_prompt_and_one_is_asked_for():
    hiding = scenario(prompt=[{"tokens": 20_000}], needles=10, session={"turns": 3})
    writer = Writer(hiding, PROSE, 1.0)
    one = job(hiding, hiding.traffic[0], 7, 0.0)
    first, later = writer.first(one), writer.later(one, 1)
    assert len(first.text) == 20_000
    hidden = re.findall(r" The secret word of (\w+ of \w+) is (\w+)\.", first.text)
    assert len(dict(hidden)) == len({word for _, word in hidden}) == 10
    assert [name for name, _ in hidden[:3]] == ["Anna of Paris", "Clara of London", "David of Rome"]
    for asked in (first, later):
        name = asked.text.rpartition("the secret word of ")[2].removesuffix("?")
        assert dict(hidden)[name] == asked.expect
    assert first.expect != later.expect
    places = [first.text.index(f"The secret word of {name}") for name, _ in hidden]
    assert all(abs(at - 20_000 * (k + 0.5) / 10) < 2500 for k, at in enumerate(places))


def test_four_hundred_needles_have_four_hundred_names():
    hiding = scenario(prompt=[{"tokens": 60_000}], needles=400)
    text = Writer(hiding, PROSE, 1.0).first(job(hiding, hiding.traffic[0], 0, 0.0)).text
    assert len(set(re.findall(r"The secret word of (\w+ of \w+) is", text))) == 400


def test_an_answer_is_taken_by_the_first_word_it_names():
    assert named("The secret word of Anna of Paris is Fox. And then a lantern") == "fox"
    assert named("It is in the foxes' maps.") == ""


def test_sessions_begin_with_what_all_of_them_share_and_go_on_with_their_own():
    agents = scenario(prompt=[{"tokens": 3000}], session={"turns": 2, "shared_prefix_tokens": 1000, "turn_tokens": 200})
    writer = Writer(agents, PROSE, 1.0)
    one, other = (writer.first(job(agents, agents.traffic[0], n, 0.0)).text for n in (0, 1))
    assert one[:1000] == other[:1000]
    assert one[1000:1100] != other[1000:1100]
    assert len(writer.later(job(agents, agents.traffic[0], 0, 0.0), 1).text) == 200


def test_a_longer_text_begins_with_the_shorter_one_of_its_seed():
    assert PROSE.text("x", 5000).startswith(PROSE.text("x", 700))
    assert PROSE.text("x", 500) != PROSE.text("y", 500)
