"""The gate: who is let in, who waits, in which order, and what those hear who are sent away."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.fleet import FleetSnapshot
from router.gate import (
    Admit,
    Arrived,
    Ask,
    Computed,
    Desk,
    GateAction,
    GateCore,
    GateEvent,
    GateLimits,
    Left,
    Looked,
    Placed,
    Refuse,
    Room,
    room_of,
)
from tests.router.test_router_placement import decode, fleet, prefill
from wire.errors import Overloaded, QueueTimeout, RateLimited, WouldWait

LIMITS = GateLimits(lane_edges=(1_000, 100_000), max_waiting=4, timeout_s=60, backlog_s=10, aged_s=10)


def room(free: int = 100_000, total: int = 100_000, *, desks: int = 1, prefill: int = 1, rate: float = 0.0) -> Room:
    return Room(
        desks=tuple(Desk(free_tokens=free, total_tokens=total, idle=free == total) for _ in range(desks)),
        num_prefill=prefill,
        prefill_tokens_per_s=rate,
    )


FULL = room(free=0)


class Driver:
    def __init__(self, limits: GateLimits = LIMITS, first: Room = FULL) -> None:
        self.core, self.now = GateCore(limits), 100.0
        self.step(Looked(first))

    def step(self, event: GateEvent) -> list[GateAction]:
        return self.core.step(self.now, event)

    def arrive(self, name: str, tokens: int = 100, **more) -> list[GateAction]:
        ask = {"prompt_tokens": tokens, "compute_tokens": tokens, "kv_tokens": tokens} | more
        return self.step(Arrived(Ask(request_id=name, **ask)))

    def look(self, at: Room) -> list[str]:
        """Ids of those that are let in, in their order."""
        actions = self.step(Looked(at))
        assert all(isinstance(action, Admit) for action in actions), actions
        return [action.request_id for action in actions]

    def finish(self, *names: str) -> None:
        for name in names:
            self.step(Placed(name))
            self.step(Computed(name))
            self.step(Left(name))


def refusal(actions: list[GateAction]) -> Refuse:
    (action,) = actions
    assert isinstance(action, Refuse)
    return action


def test_who_finds_room_goes_in_at_once():
    drive = Driver(first=room())
    assert drive.arrive("a") == [Admit("a")]
    assert drive.core.num_waiting == 0
    assert drive.core.next_deadline() is None


def test_without_a_pair_of_workers_nobody_waits_for_one():
    assert Driver(first=Room()).arrive("a") == [Admit("a")]  # placement says what is wrong
    assert Driver(first=room()).arrive("huge", 100_001) == [Admit("huge")]


def test_who_finds_none_waits_and_goes_in_when_there_is_some():
    drive = Driver()
    assert drive.arrive("a") == []
    assert drive.arrive("b") == []
    assert drive.core.num_waiting == 2
    assert drive.look(room(free=99)) == []
    assert drive.look(room(free=199)) == ["a"]  # the second is counted before the fleet can count it
    drive.step(Placed("a"))
    assert drive.look(room(free=100)) == ["b"]


def test_a_client_that_leaves_the_line_leaves_nothing_behind():
    drive = Driver()
    drive.arrive("a")
    drive.arrive("b")
    assert drive.step(Left("a")) == []
    assert drive.look(room(free=100)) == ["b"]
    drive.finish("b")
    drive.step(Left("b"))
    assert drive.core.num_waiting == 0
    assert drive.core.waiting_kv_tokens() == 0


def test_priorities_come_before_arrival():
    drive = Driver()
    for name, priority in (("late", 5), ("normal", 0), ("urgent", -5)):
        drive.arrive(name, priority=priority)
    assert drive.look(room()) == ["urgent", "normal", "late"]


def test_a_tenant_that_asks_for_much_does_not_crowd_out_one_that_asks_for_little():
    drive = Driver(GateLimits(lane_edges=(1_000,), max_waiting=100))
    for i in range(10):
        drive.arrive(f"a{i}", tenant="a")
    for i in range(3):
        drive.arrive(f"b{i}", tenant="b")
    order = drive.look(room())
    assert sorted(order[:6]) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert order[6:] == [f"a{i}" for i in range(3, 10)]


def test_a_tenant_of_twice_the_weight_gets_twice_as_much():
    drive = Driver(GateLimits(lane_edges=(1_000,), max_waiting=100))
    for i in range(20):
        drive.arrive(f"a{i}", tenant="a", weight=2.0)
        drive.arrive(f"b{i}", tenant="b")
    order = "".join(name[0] for name in drive.look(room())[:18])
    assert order.count("a") == 12


# Lanes


def test_a_prompt_of_900_000_tokens_that_finds_no_room_keeps_none_of_2_000_waiting():
    drive = Driver(GateLimits(), first=room(free=500_000, total=1_000_000))
    assert drive.arrive("long", 900_000) == []
    for i in range(20):
        assert drive.arrive(f"short{i}", 2_000) == [Admit(f"short{i}")]
        drive.finish(f"short{i}")
    assert drive.look(room(free=950_001, total=1_000_000)) == ["long"]


def test_each_lane_may_have_its_own_prompts_computed():
    drive = Driver(GateLimits(backlog_s=1), first=room(total=4_000_000, free=4_000_000, rate=10_000))
    assert drive.arrive("long-0", 900_000) == [Admit("long-0")]
    assert drive.arrive("long-1", 900_000) == []  # one for each prefill worker, and this one is far behind with it
    assert drive.arrive("short-0", 6_000) == [Admit("short-0")]
    assert drive.arrive("short-1", 4_000) == [Admit("short-1")]  # 10,000 tokens are a second's work
    assert drive.arrive("short-2", 4_000) == []
    assert drive.step(Computed("short-0")) == [Admit("short-2")]
    assert drive.step(Computed("long-0")) == [Admit("long-1")]


def test_what_is_cached_is_no_work_for_prefill():
    drive = Driver(GateLimits(backlog_s=1), first=room(rate=1_000))
    assert drive.arrive("a", 900) == [Admit("a")]
    assert drive.arrive("b", 900, compute_tokens=50) == [Admit("b")]
    assert drive.arrive("c", 900) == []


def test_who_has_waited_long_is_not_put_off_for_ever_by_shorter_ones():
    drive = Driver(GateLimits(aged_s=10), first=room(free=500_000, total=1_000_000))
    drive.arrive("long", 900_000)
    drive.arrive("short-0", 8_000)
    drive.step(Placed("short-0"))
    drive.step(Computed("short-0"))
    drive.now += 10
    # An eighth of a million tokens is left to the short lane; it gets no further than that.
    admitted = 1
    while drive.arrive(f"short-{admitted}", 8_000) != []:
        drive.step(Placed(f"short-{admitted}"))
        drive.step(Computed(f"short-{admitted}"))
        admitted += 1
    assert admitted == 125_000 // 8_000
    assert drive.look(room(free=960_000, total=1_000_000))[0] == "long"


def test_the_shortest_lane_finds_room_that_longer_ones_may_not_take():
    drive = Driver(first=room(free=5_000))
    assert drive.arrive("longer", 2_000) == []
    assert drive.arrive("short", 900) == [Admit("short")]


# Refusals


def test_a_full_line_sends_the_next_away_with_the_time_it_takes():
    drive = Driver(first=room(free=0, rate=100))
    for i in range(4):
        assert drive.arrive(f"a{i}", 900) == []
    error = refusal(drive.arrive("e", 900)).error
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == pytest.approx(4 * 900 / 100)


def test_without_measured_rates_the_pace_at_which_requests_leave_says_how_long():
    drive = Driver(first=room())
    for i in range(40):
        drive.arrive(f"in{i}", 10)
    for i in range(39):
        drive.now += 2.0
        drive.finish(f"in{i}")
    drive.step(Looked(FULL))
    for i in range(4):
        drive.arrive(f"a{i}")
    error = refusal(drive.arrive("e")).error
    assert error.retry_after_s == pytest.approx(8, rel=0.1)  # four who wait, and one leaves every 2 s


def test_a_line_is_full_of_tokens_too():
    drive = Driver(GateLimits(max_waiting=100, max_waiting_tokens=1_000_000), first=room(free=0, total=2_000_000))
    assert drive.arrive("a", 900_000) == []
    assert drive.arrive("b", 100_000) == []
    assert isinstance(refusal(drive.arrive("c", 1)).error, Overloaded)


def test_who_is_more_urgent_takes_the_place_of_the_last_in_a_full_line():
    drive = Driver()
    for i in range(4):
        drive.arrive(f"a{i}", priority=1)
    sent_away = refusal(drive.arrive("urgent", priority=0))
    assert sent_away.request_id == "a3"
    assert isinstance(sent_away.error, Overloaded)
    assert drive.look(room()) == ["urgent", "a0", "a1", "a2"]


def test_one_tenant_gets_no_more_than_its_share_of_the_line():
    drive = Driver()
    drive.arrive("b0", tenant="b")
    for i in range(2):
        assert drive.arrive(f"a{i}", tenant="a") == []
    assert isinstance(refusal(drive.arrive("a2", tenant="a")).error, RateLimited)
    assert drive.arrive("b1", tenant="b") == []


def test_who_does_not_want_to_wait_hears_so_at_once():
    drive = Driver()
    assert isinstance(refusal(drive.arrive("a", may_wait=False)).error, WouldWait)
    assert Driver(first=room()).arrive("a", may_wait=False) == [Admit("a")]


def test_who_waits_too_long_is_sent_away_uncomputed():
    drive = Driver()
    drive.arrive("a")
    assert drive.core.next_deadline() == 160.0
    drive.now = 160.0
    error = refusal(drive.step(Looked(FULL))).error
    assert isinstance(error, QueueTimeout)
    assert error.http_status == 408
    assert error.retry_after_s is not None
    assert drive.core.num_waiting == 0


def test_any_order_of_events_ends_with_nobody_left_and_everybody_answered():
    """Whatever happens, each request hears once, and no more is let in than there is room for."""
    for seed in range(200):
        rng = random.Random(seed)
        drive = Driver(GateLimits(lane_edges=(100,), max_waiting=8, timeout_s=5, aged_s=1), first=room(300, 300))
        heard: dict[str, GateAction] = {}
        inside: dict[str, int] = {}

        sizes: dict[str, int] = {}

        def hear(actions: list[GateAction], heard=heard, inside=inside, sizes=sizes) -> None:
            for action in actions:
                assert action.request_id not in heard
                heard[action.request_id] = action
                if isinstance(action, Admit):
                    inside[action.request_id] = sizes[action.request_id]

        gone: set[str] = set()
        for i in range(120):
            drive.now += rng.random()
            match rng.randrange(4):
                case 0 | 1:
                    sizes[f"r{i}"] = rng.choice((10, 50, 150))
                    hear(drive.arrive(f"r{i}", sizes[f"r{i}"], priority=rng.randrange(2), tenant=rng.choice("ab")))
                case 2 if inside:
                    name = rng.choice(sorted(inside))
                    drive.step(Placed(name))
                    hear(drive.step(Computed(name)))
                    hear(drive.step(Left(name)))
                    del inside[name]
                case _ if sizes:
                    name = rng.choice(sorted(sizes))
                    if name not in heard:
                        gone.add(name)
                        hear(drive.step(Left(name)))
            for name in inside:
                hear(drive.step(Placed(name)))
            free = 300 - sum(inside.values())
            assert free >= 0
            hear(drive.step(Looked(room(free, 300))))
        drive.now += 100
        hear(drive.step(Looked(room(300 - sum(inside.values()), 300))))
        assert drive.core.num_waiting == 0
        assert set(sizes) == set(heard) | gone


# The room there is


def test_only_workers_with_a_partner_are_room():
    snapshot = fleet(
        prefill("p0", prefill_token_ns=1_000_000),
        prefill("p1", prefill_token_ns=500_000),
        prefill("p2", signature="exact", prefill_token_ns=1),
        decode("d0", free_tokens=5_000),
        decode("d1", draining=True),
        decode("d2", running=1),
    )
    assert room_of(snapshot) == Room(
        desks=(
            Desk(free_tokens=5_000, total_tokens=10_240, idle=True),
            Desk(free_tokens=10_240, total_tokens=10_240, idle=False),
        ),
        num_prefill=2,
        prefill_tokens_per_s=pytest.approx(3_000),
    )
    assert room_of(FleetSnapshot()) == Room()


def test_who_finds_pages_but_no_place_waits_for_one():
    def places(free: int) -> Room:
        return Room(desks=(Desk(free_tokens=9_000, total_tokens=9_999, idle=False, free_places=free),), num_prefill=1)

    drive = Driver(first=places(2))
    assert drive.arrive("a") == [Admit("a")]
    assert drive.arrive("b") == [Admit("b")]  # "a" is not placed yet, and will take one of the two
    assert drive.arrive("c") == []
    for name in "ab":
        drive.step(Placed(name))
    assert drive.look(places(0)) == []
    assert drive.look(places(1)) == ["c"]


def test_who_would_wait_too_long_at_the_pace_others_leave_is_told_at_once():
    drive = Driver(replace(LIMITS, max_waiting=1_000, timeout_s=20.0), first=room())
    for i in range(40):
        drive.arrive(f"in-{i}")
    drive.look(FULL)
    assert [drive.arrive(f"waits-{i}") for i in range(9)] == [[]] * 9  # nobody knows how long it will be
    for i in range(19):  # one a second
        drive.now += 1.0
        drive.finish(f"in-{i}")
    assert drive.arrive("last") == []  # in ten seconds or so
    late = refusal(drive.arrive("late"))
    assert isinstance(late.error, Overloaded)
    assert "no room for about 10.4 s" in str(late.error)
    assert late.error.retry_after_s is not None
    assert late.error.retry_after_s > 5
    assert drive.arrive("urgent", priority=-1) == []  # nobody is before it
    assert drive.arrive("elsewhere", tokens=5_000) == []  # nor in its lane


def test_the_longer_nobody_leaves_the_fewer_may_wait():
    drive = Driver(replace(LIMITS, max_waiting=1_000, timeout_s=4.0), first=room())
    drive.arrive("in")
    drive.look(FULL)
    assert [drive.arrive(f"at-once-{i}") for i in range(50)] == [[]] * 50
    for i in range(47):
        drive.step(Left(f"at-once-{i}"))
    drive.now += 0.5
    assert drive.arrive("one-more") == []  # three are before it, and half a second has passed
    assert isinstance(refusal(drive.arrive("too-many")).error, Overloaded)
    for name in ("at-once-47", "at-once-48", "at-once-49", "one-more"):
        drive.step(Left(name))
    assert drive.arrive("first-again") == []  # the line is a new one


def test_a_short_body_hears_that_the_line_is_too_long_before_it_is_read():
    drive = Driver(GateLimits(lane_edges=(1_000, 100_000), max_waiting=4, timeout_s=10))

    def told(body_bytes: int, coming: int = 0):
        return drive.core.sheds(drive.now, body_bytes, "default", 1.0, 0, coming)

    assert told(100) is None, "nobody waits"
    drive.arrive("a")
    assert told(100) is None, "the line has just begun"
    drive.now += 2
    assert told(100) is None
    assert isinstance(told(100, coming=2), Overloaded), "two more are before it, though not in line yet"
    drive.now += 4  # in which nobody was let in: the next would wait for longer than half the limit
    early = told(100)
    late = refusal(drive.arrive("b")).error
    assert isinstance(early, Overloaded)
    assert (str(early), early.retry_after_s) == (str(late), late.retry_after_s)
    assert told(500) is None, "as many tokens could be of the next lane"
    drive.look(room())
    assert told(100) is None


def test_a_tenant_with_its_share_of_the_line_hears_that_before_its_body_is_read():
    drive = Driver()
    for name, tenant in (("a", "one"), ("b", "one"), ("c", "two")):
        drive.arrive(name, tenant=tenant)
    assert isinstance(drive.core.sheds(drive.now, 10, "one", 1.0, 0, 0), RateLimited)
    assert drive.core.sheds(drive.now, 10, "two", 1.0, 0, 0) is None
