"""The fleet's decisions: who is known, who serves, and what losing the registry changes (nothing)."""

from __future__ import annotations

from dataclasses import replace

from router.fleet import (
    UNLISTED_GRACE_S,
    Assigned,
    FleetCore,
    HealthChanged,
    Listed,
    RegistrySilent,
    StartWatch,
    StopWatch,
)
from wire.types import Role, WorkerInfo

P0 = WorkerInfo(worker_id="p0", role=Role.PREFILL, address="a:1", epoch=1, model="m", signature="s")
D0 = WorkerInfo(
    worker_id="d0",
    role=Role.DECODE,
    address="a:2",
    epoch=2,
    model="m",
    signature="s",
    total_tokens=512,
    free_tokens=512,
)


def listed(*workers: WorkerInfo) -> Listed:
    return Listed({info.worker_id: info for info in workers})


def usable(core: FleetCore, now: float = 0.0) -> list[str]:
    snapshot = core.snapshot(now)
    return [view.info.worker_id for view in (*snapshot.prefill, *snapshot.decode) if view.usable]


def serving_core() -> FleetCore:
    core = FleetCore()
    core.step(0.0, listed(P0, D0))
    for info in (P0, D0):
        core.step(0.0, HealthChanged(info.ref, True))
    return core


def test_a_listed_worker_is_watched_and_usable_only_once_it_says_it_serves():
    core = FleetCore()
    assert core.step(0.0, listed(P0, D0)) == [StartWatch(P0.ref), StartWatch(D0.ref)]
    assert usable(core) == []
    core.step(0.0, HealthChanged(P0.ref, True))
    assert usable(core) == ["p0"]
    core.step(0.0, HealthChanged(P0.ref, False))
    assert usable(core) == []


def test_a_worker_listed_again_keeps_its_watch_and_takes_its_new_numbers():
    core = serving_core()
    assert core.step(1.0, listed(P0, replace(D0, free_tokens=7, draining=True))) == []
    assert core.snapshot(1.0).decode[0].info.free_tokens == 7
    assert usable(core) == ["p0"]


def test_a_silent_registry_changes_nothing_but_says_how_old_the_list_is():
    core = serving_core()
    for now in (10.0, 20.0, 70.0):
        assert core.step(now, RegistrySilent()) == []
    assert usable(core) == ["p0", "d0"]
    assert core.snapshot(70.0).registry_stale_s == 60.0
    core.step(71.0, listed(P0, D0))
    assert core.snapshot(71.0).registry_stale_s == 0.0


def test_a_registry_that_comes_back_empty_keeps_serving_workers_for_a_while():
    core = serving_core()
    assert core.step(10.0, listed()) == []
    assert core.step(10.0 + UNLISTED_GRACE_S - 0.1, listed()) == []
    assert usable(core) == ["p0", "d0"]
    core.step(14.95, listed(P0))
    actions = core.step(10.0 + UNLISTED_GRACE_S, listed(P0))
    assert actions == [StopWatch(D0.ref)]
    assert usable(core) == ["p0"]


def test_an_unlisted_worker_that_no_longer_serves_is_forgotten_at_once():
    core = serving_core()
    core.step(1.0, HealthChanged(D0.ref, False))
    assert core.step(1.0, listed(P0)) == [StopWatch(D0.ref)]
    assert core.snapshot(1.0).decode == ()


def test_a_restarted_worker_is_a_new_one_and_late_news_of_the_old_life_is_ignored():
    core = serving_core()
    reborn = replace(D0, epoch=3)
    assert core.step(1.0, listed(P0, reborn)) == [StopWatch(D0.ref), StartWatch(reborn.ref)]
    core.step(1.0, HealthChanged(D0.ref, True))
    assert usable(core) == ["p0"]
    core.step(1.0, HealthChanged(reborn.ref, True))
    core.step(1.0, HealthChanged(D0.ref, False))
    assert usable(core) == ["p0", "d0"]


def test_free_places_are_those_neither_we_nor_other_routers_have_taken():
    core = serving_core()
    d0 = replace(D0, max_requests=8)

    def free() -> int | None:
        return core.snapshot(0.0).decode[0].free_places

    assert free() is None  # it does not say how many it takes
    core.step(0.0, listed(P0, d0))
    core.step(0.0, Assigned("d0", 3, 300))
    assert free() == 5
    core.step(0.0, listed(P0, replace(d0, running=4, waiting=1)))  # two of them are another router's
    assert free() == 3
    core.step(0.0, Assigned("d0", -3, -300))  # ours are done, and count no more, whatever the record still says
    assert free() == 6


def test_assigned_work_shows_until_it_is_taken_back():
    core = serving_core()
    core.step(0.0, Assigned("d0", 1, 300))
    core.step(0.0, Assigned("d0", 1, 100))
    view = core.snapshot(0.0).decode[0]
    assert (view.num_requests, view.free_tokens) == (2, 112)
    core.step(0.0, Assigned("d0", -1, -300))
    assert core.snapshot(0.0).decode[0].free_tokens == 412
    core.step(0.0, Assigned("d0", -1, -100))
    assert core.snapshot(0.0).decode[0].num_requests == 0
