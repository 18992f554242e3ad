"""Placement: who may hold a request, who waits least, and what a client is told when nobody can take it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from router.fleet import FleetSnapshot, WorkerView
from router.placement import PlacementRules, Reason, capacity, choose, pair_counts, pair_states, why_not
from wire.errors import InvalidRequest, LayoutMismatch, NoWorkers
from wire.types import Role, WorkerInfo


def view(worker_id: str, role: Role, *, serving: bool = True, assigned: tuple[int, int] = (0, 0), **info) -> WorkerView:
    defaults = {"model": "m", "signature": "v4", "free_tokens": 10_240, "total_tokens": 10_240, "max_context": 0}
    return WorkerView(
        info=WorkerInfo(worker_id=worker_id, role=role, address="a:1", epoch=1, **(defaults | info)),
        serving=serving,
        assigned_requests=assigned[0],
        assigned_tokens=assigned[1],
    )


def prefill(worker_id: str, **info) -> WorkerView:
    return view(worker_id, Role.PREFILL, **info)


def decode(worker_id: str, **info) -> WorkerView:
    return view(worker_id, Role.DECODE, **info)


def fleet(*views: WorkerView) -> FleetSnapshot:
    return FleetSnapshot(
        prefill=tuple(v for v in views if v.info.role is Role.PREFILL),
        decode=tuple(v for v in views if v.info.role is Role.DECODE),
    )


def chosen(snapshot: FleetSnapshot, prompt: int = 100, answer: int = 10, exclude=()) -> tuple[str, str] | None:
    placement = choose(snapshot, prompt, answer, exclude)
    return placement and (placement.prefill.worker_id, placement.decode.worker_id)


def test_an_idle_fleet_is_used_from_the_lowest_id():
    assert chosen(fleet(prefill("p1"), prefill("p0"), decode("d1"), decode("d0"))) == ("p0", "d0")


def test_the_prefill_worker_with_fewer_queued_tokens_wins():
    assert chosen(fleet(prefill("p0", queued_tokens=500), prefill("p1", queued_tokens=10), decode("d0"))) == (
        "p1",
        "d0",
    )


def test_the_decode_worker_with_fewer_sequences_wins():
    snapshot = fleet(prefill("p0"), decode("d0", running=3, waiting=1), decode("d1", running=3))
    assert chosen(snapshot) == ("p0", "d1")


def test_requests_of_our_own_count_before_the_worker_reports_them():
    snapshot = fleet(prefill("p0", assigned=(1, 800)), prefill("p1"), decode("d0", assigned=(2, 900)), decode("d1"))
    assert chosen(snapshot) == ("p1", "d1")


def test_tokens_that_must_leave_a_full_pool_count_as_wait():
    snapshot = fleet(prefill("p0"), decode("d0", free_tokens=0), decode("d1", free_tokens=5_000, running=9))
    assert chosen(snapshot) == ("p0", "d1")
    # Full is not the same as too small: with nobody else, the full worker it is.
    assert chosen(fleet(prefill("p0"), decode("d0", free_tokens=0))) == ("p0", "d0")


def test_workers_that_drain_or_do_not_serve_get_nothing():
    assert chosen(fleet(prefill("p0", draining=True), prefill("p1"), decode("d0", serving=False), decode("d1"))) == (
        "p1",
        "d1",
    )


def test_excluded_workers_are_passed_over_until_none_is_left():
    snapshot = fleet(prefill("p0"), decode("d0"), decode("d1"))
    assert chosen(snapshot, exclude={"d0"}) == ("p0", "d1")
    assert chosen(snapshot, exclude={"d0", "d1"}) is None


def test_a_pair_needs_one_model_one_layout_and_one_protocol():
    for field, other in (("signature", "exact"), ("model", "n"), ("protocol", 2)):
        snapshot = fleet(prefill("p0", **{field: other}), decode("d0"), prefill("p1"))
        assert chosen(snapshot) == ("p1", "d0"), field
        alone = fleet(prefill("p0", **{field: other}), decode("d0"))
        assert chosen(alone) is None, field
        assert isinstance(why_not(alone, 100, 10), LayoutMismatch)


def test_a_pool_that_can_never_hold_the_request_is_passed_over():
    snapshot = fleet(prefill("p0"), decode("d0", total_tokens=256, free_tokens=256), decode("d1", running=50))
    assert chosen(snapshot, prompt=200, answer=56) == ("p0", "d0")
    assert chosen(snapshot, prompt=200, answer=57) == ("p0", "d1")


def test_a_pool_holds_whole_pages_only_and_a_context_limit_caps_it():
    assert capacity(fleet(prefill("p0"), decode("d0", total_tokens=1_000))) == 768
    assert capacity(fleet(prefill("p0"), decode("d0", total_tokens=1_000, max_context=500))) == 500
    assert capacity(fleet(prefill("p0"))) is None


def test_a_prefill_pool_must_hold_the_prompt_but_not_the_answer():
    small = fleet(prefill("p0", total_tokens=512), decode("d0"))
    assert chosen(small, prompt=512, answer=100) == ("p0", "d0")
    assert chosen(small, prompt=513, answer=1) is None
    error = str(why_not(small, 513, 1))
    assert "prompts of at most 512 tokens" in error
    assert "at most 10240 tokens in all" in error


def test_the_client_is_told_which_side_is_missing():
    error = why_not(fleet(decode("d0")), 1, 1)
    assert isinstance(error, NoWorkers)
    assert "No prefill worker" in str(error)
    error = why_not(fleet(prefill("p0"), decode("d0", serving=False)), 1, 1)
    assert "No decode worker can take this request: 1 known, none of them serving" in str(error)


def test_a_request_too_large_for_every_pair_is_refused_with_both_numbers():
    error = why_not(fleet(prefill("p0"), decode("d0")), 10_000, 500)
    assert isinstance(error, InvalidRequest)
    assert error.detail_code == "context_length_exceeded"
    assert "10500" in str(error)
    assert "10240" in str(error)


def test_the_same_fleet_gives_the_same_answer_in_any_order():
    views = [prefill("p0", queued_tokens=5), prefill("p1", queued_tokens=5), decode("d0"), decode("d1")]
    expected = chosen(fleet(*views))
    assert chosen(fleet(*reversed(views))) == expected == ("p0", "d0")
    assert replace(views[0], serving=False).usable is False


# What workers already hold


PREFIX_ROWS: dict[str, tuple[FleetSnapshot, dict[str, int], tuple[str, str]]] = {
    "nobody holds anything": (fleet(prefill("p0"), prefill("p1"), decode("d0")), {}, ("p0", "d0")),
    "one prefill worker holds most of it": (
        fleet(prefill("p0"), prefill("p1"), decode("d0")),
        {"p1": 3_840},
        ("p1", "d0"),
    ),
    "a queue shorter than what is held is worth the wait": (
        fleet(prefill("p0"), prefill("p1", queued_tokens=3_500), decode("d0")),
        {"p1": 3_840},
        ("p1", "d0"),
    ),
    "a longer queue is not": (
        fleet(prefill("p0"), prefill("p1", running=30, queued_tokens=3_900), decode("d0")),
        {"p1": 3_840},
        ("p0", "d0"),
    ),
    "our own requests there count as a queue": (
        fleet(prefill("p0"), prefill("p1", assigned=(30, 3_900)), decode("d0")),
        {"p1": 3_840},
        ("p0", "d0"),
    ),
    "one long prompt is no queue: those with less left go first every other time": (
        fleet(prefill("p0"), prefill("p1", running=1, queued_tokens=900_000), decode("d0")),
        {"p1": 3_840},
        ("p1", "d0"),
    ),
    "but its tokens take as long as they do where it has got to": (
        fleet(
            prefill("p0", running=1, queued_tokens=4_000, prefill_token_ns=100_000, prefill_depth_ns=2_000),
            prefill(
                "p1",
                running=1,
                queued_tokens=500_000,
                queued_depth=400_000,
                prefill_token_ns=100_000,
                prefill_depth_ns=2_000,
            ),
            decode("d0"),
        ),
        {"p1": 100},
        ("p0", "d0"),
    ),
    "the longer of two prefixes": (
        fleet(prefill("p0"), prefill("p1"), decode("d0")),
        {"p0": 512, "p1": 768},
        ("p1", "d0"),
    ),
    "a decode worker that holds it need not fetch it": (
        fleet(prefill("p0"), decode("d0"), decode("d1")),
        {"d1": 3_840},
        ("p0", "d1"),
    ),
    "but not at any number of neighbours": (
        fleet(prefill("p0"), decode("d0"), decode("d1", running=2)),
        {"d1": 3_840},
        ("p0", "d0"),
    ),
    "each side on its own": (
        fleet(prefill("p0"), prefill("p1"), decode("d0"), decode("d1")),
        {"p1": 2_048, "d1": 1_024},
        ("p1", "d1"),
    ),
    "pages that are there need no room": (
        fleet(prefill("p0", free_tokens=3_000), prefill("p1", free_tokens=200), decode("d0")),
        {"p1": 3_840},
        ("p1", "d0"),
    ),
    "a holder that does not serve is no holder": (
        fleet(prefill("p0"), prefill("p1", serving=False), decode("d0")),
        {"p1": 3_840},
        ("p0", "d0"),
    ),
}


@pytest.mark.parametrize("name", PREFIX_ROWS)
def test_what_workers_hold_counts_against_what_keeps_them_busy(name: str):
    snapshot, resident, expected = PREFIX_ROWS[name]
    placement = choose(snapshot, 4_000, 10, resident=resident)
    assert placement is not None
    assert (placement.prefill.worker_id, placement.decode.worker_id) == expected
    assert placement.prefill_resident == resident.get(expected[0], 0)
    assert placement.decode_resident == resident.get(expected[1], 0)


def test_a_prompt_that_is_held_whole_still_has_one_token_to_compute():
    placement = choose(fleet(prefill("p0"), decode("d0")), 512, 10, resident={"p0": 512, "d0": 512})
    assert placement is not None
    assert (placement.prefill_resident, placement.decode_resident) == (511, 511)


def test_a_prompt_larger_than_every_pool_is_refused_with_both_numbers():
    error = why_not(fleet(prefill("p0", total_tokens=1_024), prefill("p1", total_tokens=2_048), decode("d0")), 3_000, 5)
    assert isinstance(error, InvalidRequest)
    assert error.detail_code == "context_length_exceeded"
    assert "3000 tokens" in str(error)
    assert "prompts of at most 2048 tokens" in str(error)


# Measured rates

KIB = 1_000  # bytes a token, for round numbers


def fast(worker_id: str, **info) -> WorkerView:
    """A prefill worker that computes 10,000 tokens a second."""
    return prefill(worker_id, **({"prefill_token_ns": 100_000, "kv_token_bytes": KIB} | info))


def near(worker_id: str, **info) -> WorkerView:
    """A decode worker that reads a megabyte a second, which is 1,000 tokens."""
    return decode(worker_id, **({"transfer_bytes_per_s": 1_000_000, "kv_token_bytes": KIB} | info))


TTFT_ROWS: dict[str, tuple[FleetSnapshot, dict[str, int], tuple[str, str], float]] = {
    "tokens x rate + bytes / rate": (fleet(fast("p0"), near("d0")), {}, ("p0", "d0"), 0.4 + 4.0),
    "half of it held by prefill": (fleet(fast("p0"), near("d0")), {"p0": 2_000}, ("p0", "d0"), 0.2 + 4.0),
    "half of it held by both": (fleet(fast("p0"), near("d0")), {"p0": 2_000, "d0": 2_000}, ("p0", "d0"), 0.2 + 2.0),
    "and the queue": (fleet(fast("p0", running=9, queued_tokens=3_000), near("d0")), {}, ("p0", "d0"), 0.7 + 4.0),
    "what is exposed of a transfer anyway": (
        fleet(fast("p0"), near("d0", exposed_us=250_000)),
        {},
        ("p0", "d0"),
        0.4 + 4.25,
    ),
    "the faster of two": (fleet(fast("p0", prefill_token_ns=150_000), fast("p1"), near("d0")), {}, ("p1", "d0"), 4.4),
    "the slower one where it holds enough": (
        fleet(fast("p0", prefill_token_ns=150_000), fast("p1"), near("d0")),
        {"p0": 2_000},
        ("p0", "d0"),
        0.3 + 4.0,
    ),
    "depth costs: 4,000 tokens have 2,000 in front of them on average": (
        fleet(fast("p0", prefill_depth_ns=51_200), near("d0")),
        {},
        ("p0", "d0"),
        0.8 + 4.0,
    ),
    "the nearer of two": (
        fleet(fast("p0"), near("d0"), near("d1", transfer_bytes_per_s=2_000_000)),
        {},
        ("p0", "d1"),
        0.4 + 2.0,
    ),
    "who has measured nothing is taken to be like the others": (
        fleet(fast("p0", running=9, queued_tokens=500), prefill("p1"), near("d0")),
        {},
        ("p1", "d0"),
        0.4 + 4.0,
    ),
}


@pytest.mark.parametrize("name", TTFT_ROWS)
def test_the_pair_with_the_least_expected_time_to_the_first_token_wins(name: str):
    snapshot, resident, expected, seconds = TTFT_ROWS[name]
    placement = choose(snapshot, 4_000, 10, resident=resident)
    assert placement is not None
    assert placement.prefill is not None
    assert (placement.prefill.worker_id, placement.decode.worker_id) == expected
    assert placement.expected_s == pytest.approx(seconds, rel=0.01)


def turns(policy: str, snapshot: FleetSnapshot, n: int, **more) -> list[tuple[str, str]]:
    placements = [
        choose(snapshot, 1_000, 10, rules=PlacementRules(policy=policy), turn=turn, **more) for turn in range(n)
    ]
    return [(p.prefill.worker_id, p.decode.worker_id) for p in placements]


def test_round_robin_gives_every_pair_its_turn_whatever_it_holds():
    snapshot = fleet(prefill("p0", queued_tokens=9_999), prefill("p1"), decode("d0"), decode("d1", running=9))
    once = turns("round_robin", snapshot, 4, resident={"p1": 768})
    assert sorted(once) == [("p0", "d0"), ("p0", "d1"), ("p1", "d0"), ("p1", "d1")]
    assert [prefill for prefill, _ in once] == ["p0", "p1", "p0", "p1"]
    assert turns("round_robin", snapshot, 8) == once + once


def test_the_power_of_two_choices_spreads_and_shuns_the_busy():
    snapshot = fleet(*(prefill(f"p{i}", queued_tokens=50_000 * (i == 0), running=99) for i in range(4)), decode("d0"))
    counts = {f"p{i}": 0 for i in range(4)}
    for chosen_prefill, _ in turns("power_of_two", snapshot, 400):
        counts[chosen_prefill] += 1
    assert counts["p0"] == 0  # of two different ones, the busiest never wins
    assert all(counts[f"p{i}"] > 60 for i in (1, 2, 3)), counts


def test_least_tokens_looks_at_tokens_alone():
    snapshot = fleet(
        prefill("p0", queued_tokens=20), prefill("p1", queued_tokens=10), decode("d0", free_tokens=90), decode("d1")
    )
    assert turns("least_tokens", snapshot, 1, resident={"p0": 768}) == [("p1", "d1")]


# One worker instead of two

SHORT = PlacementRules(local_prefill_tokens=512)


def alone(worker_id: str, **info) -> WorkerView:
    """A decode worker that computes a token in a millisecond."""
    return near(worker_id, **({"local_prefill": True, "prefill_token_ns": 1_000_000, "exposed_us": 50_000} | info))


LOCAL_ROWS: dict[str, tuple[FleetSnapshot, int, dict[str, int], PlacementRules, str, Reason]] = {
    "short": (fleet(fast("p0"), alone("d0")), 40, {}, SHORT, "local", Reason.SHORT),
    "off by default": (fleet(fast("p0"), alone("d0")), 40, {}, PlacementRules(), "disaggregated", Reason.POLICY),
    "not so short": (fleet(fast("p0"), alone("d0")), 513, {}, SHORT, "disaggregated", Reason.LONG),
    "long but mostly held": (fleet(fast("p0"), alone("d0")), 4_000, {"d0": 3_840}, SHORT, "local", Reason.CACHED),
    "not with neighbours to keep waiting": (
        fleet(fast("p0"), alone("d0", running=3)),
        40,
        {},
        SHORT,
        "disaggregated",
        Reason.FASTER,
    ),
    "not behind other prompts of its own": (
        fleet(fast("p0"), alone("d0", computing_tokens=400)),
        40,
        {},
        SHORT,
        "disaggregated",
        Reason.FASTER,
    ),
    "while prefill is far behind": (
        fleet(fast("p0", running=40, queued_tokens=9_000), alone("d0", running=3)),
        40,
        {},
        SHORT,
        "local",
        Reason.SHORT,
    ),
    "who has measured nothing is not trusted with it": (
        fleet(fast("p0"), alone("d0", prefill_token_ns=0)),
        40,
        {},
        SHORT,
        "disaggregated",
        Reason.UNMEASURED,
    ),
    "a worker that can not": (
        fleet(fast("p0"), alone("d0", local_prefill=False)),
        40,
        {},
        SHORT,
        "disaggregated",
        Reason.POLICY,
    ),
    "without any prefill worker, however long": (
        fleet(fast("p0", serving=False), alone("d0")),
        4_000,
        {},
        PlacementRules(on_no_prefill="local"),
        "local",
        Reason.NO_PREFILL,
    ),
}


@pytest.mark.parametrize("name", LOCAL_ROWS)
def test_a_decode_worker_computes_the_prompt_itself_where_that_is_measured_cheaper(name: str):
    snapshot, prompt, resident, rules, decision, reason = LOCAL_ROWS[name]
    placement = choose(snapshot, prompt, 10, resident=resident, rules=rules)
    assert placement is not None
    assert (placement.decision, placement.reason) == (decision, reason)
    assert (placement.prefill is None) == (decision == "local")


def test_without_prefill_workers_requests_are_refused_unless_told_otherwise():
    snapshot = fleet(prefill("p0", serving=False), alone("d0"))
    assert choose(snapshot, 40, 10) is None
    assert choose(snapshot, 40, 10, rules=SHORT) is None
    # A prefill worker that is merely avoided is still one: it will be asked again.
    busy = fleet(prefill("p0"), alone("d0"))
    assert choose(busy, 40, 10, {"p0"}, rules=PlacementRules(on_no_prefill="local")) is None


def test_pairs_are_counted_as_they_would_be_listed():
    rng = random.Random(5)
    for _ in range(100):
        views = [
            rng.choice((prefill, decode))(
                f"w{i}", signature=rng.choice("ab"), draining=rng.random() < 0.2, serving=rng.random() < 0.8
            )
            for i in range(rng.randrange(12))
        ]
        snapshot = fleet(*views)
        listed = Counter(
            {"usable": "usable", "incompatible": "incompatible"}.get(state, "unusable")
            for states in pair_states(snapshot).values()
            for state in states.values()
        )
        assert Counter(pair_counts(snapshot)) == listed
