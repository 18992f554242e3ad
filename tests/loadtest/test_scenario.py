"""Scenarios: what comes along can run, and what is misspelt is refused by its name."""

from __future__ import annotations

import pytest

from chaos.strike import STRIKES
from loadtest.scenario import ScenarioError, load, parse, shipped

LEAST = {
    "name": "least",
    "about": "one request",
    "duration_s": 1,
    "slo": {"ttft_ms": 1000, "tpot_ms": 100},
    "traffic": [{"name": "a", "arrivals": {"kind": "once"}, "prompt": [{"tokens": 16}]}],
}


def traffic(**more: object) -> dict[str, object]:
    return {"name": "a", "arrivals": {"kind": "poisson"}, "prompt": [{"tokens": 16}], **more}


def test_the_scenarios_that_come_along_can_run():
    assert set(shipped()) == {"agents-128k", "chat-2k", "kill-one", "mixed-900k", "overload-3x", "smoke"}
    for name in shipped():
        scenario = load(name)
        assert scenario.name == name
        assert all(fault.strike in STRIKES for fault in scenario.faults)
    assert load("smoke").duration_s == 60
    mixed = load("mixed-900k")
    assert (mixed.of("document").prompt[0].tokens, mixed.of("document").session.turns - 1) == (900_000, 20)
    assert mixed.of("document").longest_tokens < 1_048_576


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"durations": 3}, "durations: is no key of a scenario"),
        ({"traffic": [traffic(neddles=3)]}, "traffic.0.neddles: is no key of a scenario"),
        ({"traffic": [traffic(arrivals={"kind": "ramp"})]}, "traffic.0.arrivals: Value error, to_per_s belongs"),
        ({"traffic": [traffic(cancel={"share": 0.1})]}, "give either after_s or after_pieces"),
        ({"traffic": [traffic(until="b")]}, "lasts until 'b', which is no other traffic"),
        ({"traffic": [traffic(), traffic()]}, "two traffics have one name"),
        ({"traffic": [traffic(repeat_share=2)]}, "traffic.0.repeat_share: Input should be less than or equal to 1"),
        ({"slo": {"ttft_ms": 1000}}, "slo.tpot_ms: Field required"),
        ({"beside": {"traffic": "a", "during": "z"}}, "beside names 'z', which is no traffic"),
        ({"duration_s": 0}, "duration_s: Input should be greater than 0"),
    ],
)
def test_what_can_not_run_is_refused_by_the_name_of_its_key(change, told):
    with pytest.raises(ScenarioError) as refused:
        parse(LEAST | change, "mine.toml")
    assert str(refused.value).startswith("mine.toml: ")
    assert told in str(refused.value)


def test_a_scenario_that_is_not_there_names_those_that_are():
    with pytest.raises(ScenarioError, match="'smok' is neither a file nor one of the scenarios agents-128k, chat-2k"):
        load("smok")


def test_scaling_changes_arrivals_and_lengths_and_nothing_else():
    scenario = load("smoke")
    scaled = scenario.scaled(rate=2, length=0.5, duration_s=9)
    chat = scaled.of("chat")
    assert (chat.arrivals.per_s, chat.arrivals.to_per_s) == (1.0, 8.0)
    assert [one.tokens for one in chat.prompt] == [64, 256, 512]
    assert scaled.window(chat) == 9
    assert scaled.scaled(rate=0.5, length=2, duration_s=60) == scenario
