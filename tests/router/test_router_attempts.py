"""The relay's decisions: every order in which two workers may answer, and every way they may break."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from router.attempts import (
    PLACE_AGAIN_S,
    Acquit,
    Begun,
    Broke,
    Complete,
    Deliver,
    Drop,
    DropDecode,
    Fail,
    Leaving,
    Moved,
    NotPlaced,
    Place,
    Placed,
    RelayAction,
    RelayCore,
    RelayEvent,
    RelayLimits,
    RelayRequest,
    Retry,
    Said,
    StartDecode,
    StartPrefill,
    Ticked,
)
from router.placement import Placement
from router.quarantine import Quarantine, fingerprint
from wire.errors import DeadlineExceeded, Draining, InvalidRequest, NoWorkers, RequestQuarantined, WorkerLost
from wire.types import (
    Admitted,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    Progress,
    Replaying,
    Role,
    RunFinished,
    SamplingParams,
    TokenEvent,
    Tokens,
    WorkerInfo,
)

SECRET = b"s" * 16
PROMPT = (5, 6, 7)
MAX_TOKENS = 4
LIMITS = RelayLimits(
    max_attempts=3,
    migration_limit=2,
    migration_patience_s=5,
    admission_s=30,
    prefill_queue_s=120,
    prefill_silence_s=20,
    token_silence_s=5,
    token_silence_factor=10,
)


def worker(worker_id: str, role: Role) -> WorkerInfo:
    return WorkerInfo(worker_id=worker_id, role=role, address="127.0.0.1:1", epoch=1, model="m", signature="v4")


PAIR = Placement(prefill=worker("p0", Role.PREFILL), decode=worker("d0", Role.DECODE))
OTHER = Placement(prefill=worker("p1", Role.PREFILL), decode=worker("d1", Role.DECODE))


class Driver:
    """A core, and a clock that only moves when told to."""

    def __init__(self, limits: RelayLimits = LIMITS) -> None:
        request = RelayRequest(
            request_id="r", prompt=PROMPT, sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=1), vocab_size=100
        )
        self.core = RelayCore(request, limits)
        self.now = 100.0

    def step(self, event: RelayEvent) -> list[RelayAction]:
        return self.core.step(self.now, event)

    def decode(self, event: object, attempt: int = 1) -> list[RelayAction]:
        return self.step(Said(attempt, Role.DECODE, event))  # type: ignore[arg-type]

    def prefill(self, event: object, attempt: int = 1) -> list[RelayAction]:
        return self.step(Said(attempt, Role.PREFILL, event))  # type: ignore[arg-type]

    def placed(self, attempt: int = 1, pair: Placement = PAIR) -> list[RelayAction]:
        return self.step(Placed(attempt, pair))

    def admitted(self, attempt: int = 1, pair: Placement = PAIR) -> list[RelayAction]:
        if attempt == 1:
            self.step(Begun())
        self.placed(attempt, pair)
        return self.decode(Admitted(resident_prefix=0, secret=SECRET), attempt)

    def wait(self, seconds: float) -> list[RelayAction]:
        self.now += seconds
        return self.step(Ticked())


def tokens(*ids: int, first: int = 0, attempt: int = 1) -> Tokens:
    events = tuple(TokenEvent(index=first + i, token_id=token) for i, token in enumerate(ids))
    return Tokens(attempt=attempt, tokens=events)


def finished(count: int, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(reason=reason, prompt_tokens=len(PROMPT), cached_tokens=0, completion_tokens=count)


def ids(actions: list[RelayAction]) -> list[int]:
    return [token.token_id for action in actions if isinstance(action, Deliver) for token in action.tokens]


def failure(actions: list[RelayAction]) -> Exception:
    (fail,) = [action for action in actions if isinstance(action, Fail)]
    return fail.error


def test_a_request_goes_from_placement_to_its_last_token():
    driver = Driver()
    assert driver.step(Begun()) == [Place(1, 0.0, frozenset())]
    assert driver.placed() == [StartDecode(1, PAIR)]
    assert driver.decode(Admitted(resident_prefix=2, secret=SECRET)) == [StartPrefill(1, PAIR, 2, SECRET)]
    assert driver.decode(Fetching(pages=3)) == []
    assert driver.prefill(Progress(done=1, total=3, cached=0)) == []
    assert driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0)) == []
    assert driver.decode(tokens(11)) == [Deliver(tokens(11).tokens)]
    assert driver.decode(tokens(12, 13, first=1)) == [Deliver(tokens(12, 13, first=1).tokens)]
    assert driver.decode(finished(3)) == [Drop(1), Complete(finished(3))]
    assert driver.core.done
    assert driver.core.next_deadline() is None


def test_tokens_may_arrive_before_the_prefill_worker_says_it_finished():
    driver = Driver()
    driver.admitted()
    assert ids(driver.decode(tokens(11))) == [11]
    assert driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0)) == []
    assert driver.step(Broke(1, Role.PREFILL, None)) == []
    assert driver.decode(finished(1))[-1] == Complete(finished(1))


def test_a_prefill_worker_that_dies_after_the_first_token_changes_nothing():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11))
    assert driver.step(Broke(1, Role.PREFILL, WorkerLost("gone"))) == []
    assert driver.prefill(Failed(code="worker_lost", message="gone", retryable=True)) == []
    assert ids(driver.decode(tokens(12, first=1))) == [12]


def test_a_token_is_delivered_once_however_often_it_arrives():
    driver = Driver()
    driver.admitted()
    delivered = ids(driver.decode(tokens(11, 12)))
    delivered += ids(driver.decode(tokens(11, 12)))
    delivered += ids(driver.decode(tokens(12, 13, first=1)))
    assert delivered == [11, 12, 13]


def test_tokens_of_an_older_attempt_are_dropped_whichever_way_they_come():
    driver = Driver()
    driver.admitted()
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    driver.admitted(attempt=2, pair=OTHER)
    assert driver.decode(tokens(11), attempt=1) == []
    assert driver.decode(tokens(11, attempt=1), attempt=2) == []
    assert driver.step(Broke(1, Role.PREFILL, WorkerLost("late"))) == []
    assert ids(driver.decode(tokens(21, attempt=2), attempt=2)) == [21]


def test_a_placement_that_comes_late_for_a_given_up_attempt_starts_nothing():
    driver = Driver()
    driver.admitted()
    driver.step(Broke(1, Role.PREFILL, WorkerLost("gone")))
    assert driver.placed(attempt=1) == []
    assert driver.placed(attempt=2, pair=OTHER) == [StartDecode(2, OTHER)]


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(tokens(11, first=1), id="gap"),
        pytest.param(tokens(100), id="id outside the vocabulary"),
        pytest.param(tokens(1, 2, 3, 4, 5), id="more than max_tokens"),
        pytest.param(Tokens(attempt=1, tokens=(TokenEvent(index=0, token_id=1, logprob=math.nan),)), id="nan"),
        pytest.param(
            Tokens(attempt=1, tokens=(TokenEvent(index=0, token_id=1, top=((100, -1.0),)),)), id="alternative"
        ),
        pytest.param(finished(0), id="finished without a token"),
        pytest.param(Admitted(resident_prefix=0, secret=SECRET), id="admitted twice"),
        pytest.param(Progress(done=1, total=1, cached=0), id="a prefill event"),
    ],
)
def test_a_decode_worker_that_talks_nonsense_is_avoided_and_the_request_starts_over(lie: object):
    driver = Driver()
    driver.admitted()
    drop, retry, place = driver.decode(lie)
    assert drop == Drop(1)
    assert isinstance(retry, Retry)
    assert isinstance(retry.error, WorkerLost)
    assert isinstance(place, Place)
    assert (place.attempt, place.avoid) == (2, frozenset({"d0"}))
    assert 0 <= place.pause_s <= 0.1


def test_a_resident_prefix_longer_than_the_prompt_is_not_believed():
    driver = Driver()
    driver.step(Begun())
    driver.placed()
    actions = driver.decode(Admitted(resident_prefix=4, secret=SECRET))
    assert [type(action) for action in actions] == [Drop, Retry, Place]


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(finished(3), id="too many"),
        pytest.param(finished(1), id="too few"),
        pytest.param(finished(2, FinishReason.LENGTH), id="length before max_tokens"),
    ],
)
def test_a_finish_that_does_not_match_what_was_sent_is_an_error_and_not_a_short_answer(last: Finished):
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11, 12))
    drop, retry, place = driver.decode(last)
    assert drop == Drop(1)
    assert isinstance(retry, Retry)
    assert isinstance(retry.error, WorkerLost)
    assert isinstance(place, Place)
    assert driver.placed(2, OTHER) == [StartDecode(2, OTHER, (11, 12))]


def test_length_is_accepted_exactly_at_max_tokens():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(1, 2, 3, 4))
    assert driver.decode(finished(4, FinishReason.LENGTH))[-1] == Complete(finished(4, FinishReason.LENGTH))


@pytest.mark.parametrize(("role", "avoided"), [(Role.PREFILL, "p0"), (Role.DECODE, "d0")])
def test_a_retryable_failure_before_the_first_token_avoids_the_worker_that_reported_it(role: Role, avoided: str):
    driver = Driver()
    driver.admitted()
    actions = driver.step(Said(1, role, Failed(code="overloaded", message="no room", retryable=True)))
    assert actions[0] == Drop(1)
    assert actions[-1].avoid == frozenset({avoided})


def test_workers_that_failed_are_remembered_over_all_attempts():
    driver = Driver()
    driver.admitted()
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    driver.admitted(attempt=2, pair=OTHER)
    place = driver.step(Broke(2, Role.PREFILL, WorkerLost("gone")))[-1]
    assert place.avoid == frozenset({"d0", "p1"})


def test_the_third_failed_attempt_is_the_last():
    driver = Driver()
    for attempt in (1, 2, 3):
        driver.admitted(attempt=attempt)
        actions = driver.step(Broke(attempt, Role.DECODE, WorkerLost(f"death {attempt}")))
    assert [type(action) for action in actions] == [Drop, Fail]
    assert str(failure(actions)) == "death 3"


def test_a_failure_that_is_the_clients_fault_is_not_tried_again():
    driver = Driver()
    driver.admitted()
    error = failure(driver.prefill(Failed(code="invalid_request", message="too long", retryable=False)))
    assert isinstance(error, InvalidRequest)
    assert str(error) == "too long"


def test_a_transfer_that_fails_may_be_the_fault_of_either_end():
    driver = Driver()
    driver.admitted()
    place = driver.decode(Failed(code="transfer_failed", message="checksum", retryable=True))[-1]
    assert isinstance(place, Place)
    assert place.avoid == frozenset({"p0", "d0"})


# Workers that die of a request


def test_a_request_that_two_workers_died_of_is_quarantined():
    driver = Driver()
    driver.admitted()
    driver.prefill(Progress(done=1, total=3, cached=0))
    assert isinstance(driver.step(Broke(1, Role.PREFILL, WorkerLost("died")))[-1], Place)
    driver.admitted(2, OTHER)
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0), 2)
    driver.decode(tokens(11, attempt=2), 2)  # prefill drew it; the first step of decode is deadly
    assert isinstance(failure(driver.step(Broke(2, Role.DECODE, WorkerLost("died")))), RequestQuarantined)


def test_who_waited_or_was_well_under_way_when_workers_died_is_not_to_blame():
    driver = Driver()
    driver.admitted()
    driver.step(Broke(1, Role.PREFILL, WorkerLost("died before it began")))
    driver.admitted(2, OTHER)
    driver.decode(tokens(11, 12, attempt=2), 2)
    driver.step(Broke(2, Role.DECODE, WorkerLost("died in mid-answer")))
    driver.admitted(3)
    driver.decode(tokens(13, first=2, attempt=3), 3)
    driver.step(Broke(3, Role.DECODE, WorkerLost("died in mid-answer")))
    driver.admitted(4, OTHER)
    assert ids(driver.decode(tokens(14, first=3, attempt=4), 4)) == [14]


def test_who_lost_its_only_worker_waits_for_another_and_who_never_had_one_is_told_at_once():
    driver = Driver()
    driver.admitted()
    driver.step(Broke(1, Role.PREFILL, WorkerLost("died")))
    again = driver.step(NotPlaced(2, NoWorkers("none serves")))
    assert again == [replace(again[0], pause_s=PLACE_AGAIN_S)]
    driver.now += LIMITS.migration_patience_s
    assert isinstance(failure(driver.step(NotPlaced(2, NoWorkers("none serves")))), NoWorkers)
    fresh = Driver()
    fresh.step(Begun())
    assert isinstance(failure(fresh.step(NotPlaced(1, NoWorkers("none serves")))), NoWorkers)


def test_a_decode_worker_that_dies_with_the_pages_there_and_no_token_drawn_may_have_died_of_it():
    driver = Driver()
    for attempt, pair in ((1, PAIR), (2, OTHER)):
        driver.admitted(attempt, pair)
        driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0), attempt)
        ended = driver.step(Broke(attempt, Role.DECODE, WorkerLost("died")))
    assert isinstance(failure(ended), RequestQuarantined)


def test_of_two_that_workers_died_of_together_neither_is_to_blame_until_one_is_alone():
    driver = Driver(replace(LIMITS, max_attempts=5))
    driver.admitted()
    driver.prefill(Progress(done=1, total=3, cached=0))
    again = driver.step(Broke(1, Role.PREFILL, WorkerLost("died")))[-1]
    assert isinstance(again, Place)
    assert again.on_trial
    driver.step(Placed(2, OTHER, in_company=True))
    driver.decode(Admitted(resident_prefix=0, secret=SECRET), 2)
    driver.prefill(Progress(done=1, total=3, cached=0), 2)
    assert isinstance(driver.step(Broke(2, Role.PREFILL, WorkerLost("died")))[-1], Place)
    driver.admitted(3)
    driver.prefill(Progress(done=1, total=3, cached=0), 3)
    assert isinstance(failure(driver.step(Broke(3, Role.PREFILL, WorkerLost("died")))), RequestQuarantined)


def test_a_request_on_trial_is_acquitted_by_the_first_token_its_decode_worker_draws():
    driver = Driver()
    driver.admitted()
    driver.prefill(Progress(done=1, total=3, cached=0))
    assert not driver.step(Ticked())
    driver.step(Broke(1, Role.PREFILL, WorkerLost("died")))
    driver.admitted(2, OTHER)
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0), 2)
    first = driver.decode(tokens(11, attempt=2), 2)  # prefill drew it
    second = driver.decode(tokens(12, first=1, attempt=2), 2)
    third = driver.decode(tokens(13, first=2, attempt=2), 2)
    assert [Acquit(2) in actions for actions in (first, second, third)] == [False, True, False]


def test_two_on_trial_are_kept_apart_and_an_acquitted_one_keeps_nobody_away():
    quarantine = Quarantine()
    quarantine.try_on("a", {"p0", "d0"})
    quarantine.try_on("b", {"p1", "d1"})
    assert (quarantine.trying("a"), quarantine.trying("c")) == ({"p1", "d1"}, {"p0", "d0", "p1", "d1"})
    quarantine.acquit("b")
    quarantine.acquit("b")
    assert quarantine.trying("a") == set()


def test_a_quarantined_request_is_refused_for_ten_minutes_and_others_are_not():
    quarantine, deadly = Quarantine(), fingerprint(b"deadly", "")
    quarantine.add(100.0, deadly)
    with pytest.raises(RequestQuarantined, match="refused for 600 s more"):
        quarantine.check(100.0, deadly)
    quarantine.check(100.0, fingerprint(b"harmless", ""))
    quarantine.check(100.0, fingerprint(b"deadly", "grammar"))
    quarantine.check(700.0, deadly)


# Workers that go away


def test_an_answer_leaves_a_worker_that_drains_and_that_counts_as_no_failure():
    driver = Driver(replace(LIMITS, migration_limit=0))
    driver.core = RelayCore(
        replace(driver.core._request, sampling=SamplingParams(max_tokens=100, seed=1)),
        replace(LIMITS, migration_limit=0),
    )
    driver.admitted()
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0))
    driver.decode(tokens(11))
    drop, retry, place = driver.step(Leaving(1))
    assert drop == DropDecode(1)
    assert isinstance(retry, Retry)
    assert isinstance(retry.error, Draining)
    assert isinstance(place, Place)
    assert driver.placed(2, OTHER) == [StartDecode(2, OTHER, (11,))]


def test_an_answer_that_is_nearly_done_ends_where_it_is():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11))
    assert driver.step(Leaving(1)) == []


# Going on elsewhere


def test_an_answer_goes_on_at_its_next_token_when_its_decode_worker_dies():
    driver = Driver()
    driver.admitted()
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=1))
    driver.decode(tokens(11, 12))
    drop, retry, place = driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    # The prefill stream of attempt 1 goes on: it keeps the prompt's pages for whoever comes next.
    assert drop == DropDecode(1)
    assert isinstance(retry, Retry)
    assert isinstance(place, Place)
    assert (place.attempt, place.avoid, place.held) == (2, frozenset({"d0"}), (("p0", len(PROMPT)),))
    moved = Placement(prefill=PAIR.prefill, decode=OTHER.decode)
    assert driver.placed(2, moved) == [StartDecode(2, moved, (11, 12))]
    driver.now += 0.5
    start = driver.decode(Admitted(resident_prefix=0, secret=b"t" * 16), 2)
    assert start == [StartPrefill(2, moved, 0, b"t" * 16)]
    assert driver.prefill(Progress(done=3, total=3, cached=3), 2) == [Drop(1)]
    assert driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=3), 2) == []
    assert driver.decode(Replaying(done=0, total=2), 2) == []
    driver.now += 0.25
    deliver, moved = driver.decode(tokens(13, first=2, attempt=2), 2)
    assert deliver == Deliver(tokens(13, first=2).tokens)
    assert moved == Moved(pages_s=0.5, replay_s=0.25)
    # The client is told what its prompt found in the cache, not what the second attempt did.
    (_, complete) = driver.decode(finished(3), 2)
    assert complete == Complete(replace(finished(3), cached_tokens=1))
    assert driver.core.migrations == 1


def test_tokens_of_the_dead_worker_that_come_late_are_not_delivered_twice():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11, 12))
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    driver.admitted(2, OTHER)
    assert driver.decode(tokens(13, first=2, attempt=1), 1) == []
    assert ids(driver.decode(tokens(13, 14, first=2, attempt=2), 2)) == [13, 14]


def test_a_prefill_worker_that_dies_while_an_answer_moves_is_replaced_and_the_decode_worker_stays_first_choice():
    driver = Driver()
    driver.core = RelayCore(replace(driver.core._request, prompt=tuple(range(600))), LIMITS)
    driver.admitted()
    driver.decode(tokens(11))
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    driver.admitted(2, OTHER)
    driver.prefill(Progress(done=520, total=600, cached=0), 2)
    place = driver.step(Broke(2, Role.PREFILL, WorkerLost("gone")))[-1]
    assert isinstance(place, Place)
    assert (place.avoid, place.held) == (frozenset({"d0", "p1"}), (("d1", 512),))


def test_an_answer_moves_so_often_and_then_fails_with_the_last_reason():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11))
    for attempt in (1, 2):
        assert isinstance(driver.step(Broke(attempt, Role.DECODE, WorkerLost("gone")))[-1], Place)
        driver.admitted(attempt + 1, OTHER)
    actions = driver.step(Broke(3, Role.DECODE, WorkerLost("death 3")))
    assert [type(action) for action in actions] == [Drop, Fail]
    assert str(failure(actions)) == "death 3"


def test_with_a_migration_limit_of_0_the_first_failure_after_a_token_is_the_end():
    driver = Driver(replace(LIMITS, migration_limit=0))
    driver.admitted()
    driver.decode(tokens(11))
    actions = driver.decode(Failed(code="worker_lost", message="gone", retryable=True))
    assert [type(action) for action in actions] == [Drop, Fail]


def test_an_answer_waits_a_while_for_workers_to_go_on_with():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11))
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone")))
    (again,) = driver.step(NotPlaced(2, NoWorkers("none yet")))
    assert isinstance(again, Place)
    assert (again.attempt, again.avoid) == (2, frozenset({"d0"}))
    driver.now += 5
    assert str(failure(driver.step(NotPlaced(2, NoWorkers("none"))))) == "none"


def test_an_answer_that_only_lacked_its_end_is_finished_by_whoever_is_told_its_tokens():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(1, 2, 3, 4))
    driver.step(Broke(1, Role.DECODE, WorkerLost("gone before it said so")))
    assert driver.placed(2, OTHER) == [StartDecode(2, OTHER, (1, 2, 3, 4))]
    assert driver.decode(finished(4, FinishReason.LENGTH), 2)[-1] == Complete(finished(4, FinishReason.LENGTH))


def test_no_pair_of_workers_ends_the_request_with_the_placements_error():
    driver = Driver()
    driver.step(Begun())
    assert failure(driver.step(NotPlaced(1, NoWorkers("none")))).args == ("none",)


def test_a_stream_that_ends_without_a_result_counts_as_a_lost_worker():
    driver = Driver()
    driver.admitted()
    retry = driver.step(Broke(1, Role.DECODE, None))[1]
    assert isinstance(retry, Retry)
    assert str(retry.error) == "The decode worker ended its stream without a result."


def test_a_finished_prefill_stream_may_end_before_the_first_token():
    driver = Driver()
    driver.admitted()
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0))
    assert driver.step(Broke(1, Role.PREFILL, None)) == []
    assert ids(driver.decode(tokens(11))) == [11]


def test_nothing_happens_after_the_end():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(11))
    driver.decode(finished(1))
    for event in (Ticked(), Broke(1, Role.DECODE, None), Said(1, Role.DECODE, tokens(12, first=1)), Begun()):
        assert driver.step(event) == []


# Deadlines


def test_each_phase_has_a_deadline_of_its_own_and_blames_the_worker_it_waited_for():
    driver = Driver()
    driver.step(Begun())
    driver.placed()
    assert driver.core.next_deadline() == driver.now + 30
    assert driver.wait(29.9) == []
    retry, place = driver.wait(0.1)[1:]
    assert isinstance(retry.error, DeadlineExceeded)
    assert place.avoid == frozenset({"d0"})

    driver.admitted(attempt=2, pair=OTHER)
    assert driver.core.next_deadline() == driver.now + 120
    driver.prefill(Progress(done=1, total=3, cached=0), attempt=2)
    assert driver.core.next_deadline() == driver.now + 20
    assert driver.wait(20)[-1].avoid == frozenset({"d0", "p1"})

    driver.admitted(attempt=3)
    driver.prefill(RunFinished(prompt_tokens=3, cached_tokens=0), attempt=3)
    assert "gave no first token" in str(failure(driver.wait(20)))


def test_progress_moves_the_deadline_on():
    driver = Driver()
    driver.admitted()
    for done in (1, 2, 3):
        assert driver.wait(19) == []
        driver.prefill(Progress(done=done, total=3, cached=0))
    assert driver.core.next_deadline() == driver.now + 20


def test_the_token_watchdog_waits_ten_median_gaps_when_tokens_are_slow():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(1))
    assert driver.core.next_deadline() == driver.now + 5
    for index in (1, 2):
        driver.now += 2.0
        driver.decode(tokens(1, first=index))
    assert driver.core.next_deadline() == driver.now + 20
    retry = driver.wait(20)[1]
    assert isinstance(retry, Retry)
    assert isinstance(retry.error, DeadlineExceeded)


def test_tokens_that_travel_together_share_their_gap():
    driver = Driver()
    driver.admitted()
    driver.decode(tokens(1))
    driver.now += 3.0
    driver.decode(tokens(1, 1, 1, first=1))
    assert driver.core.next_deadline() == driver.now + 10


# A decode worker that computes the prompt itself

ALONE = Placement(prefill=None, decode=worker("d0", Role.DECODE))


def test_a_decode_worker_alone_is_asked_for_everything_and_watched():
    drive = Driver()
    drive.step(Begun())
    assert drive.step(Placed(1, ALONE)) == [StartDecode(1, ALONE)]
    assert drive.step(Said(1, Role.DECODE, Admitted(resident_prefix=0, secret=SECRET))) == []
    assert drive.core.next_deadline() == 100 + LIMITS.prefill_silence_s
    drive.now = 110.0
    assert drive.step(Said(1, Role.DECODE, Progress(done=1, total=3, cached=0))) == []
    assert drive.core.next_deadline() == 110 + LIMITS.prefill_silence_s
    tokens = (TokenEvent(index=0, token_id=9),)
    assert drive.step(Said(1, Role.DECODE, Tokens(attempt=1, tokens=tokens))) == [Deliver(tokens)]
    # A progress behind the first token is a worker that lost its place.
    (_, retry, _) = drive.step(Said(1, Role.DECODE, Progress(done=3, total=3, cached=0)))
    assert isinstance(retry, Retry)


def test_a_decode_worker_alone_that_falls_silent_is_avoided():
    drive = Driver()
    drive.step(Begun())
    drive.step(Placed(1, ALONE))
    drive.step(Said(1, Role.DECODE, Admitted(resident_prefix=0, secret=SECRET)))
    drive.now = drive.core.next_deadline()
    dropped, retried, placing = drive.step(Ticked())
    assert dropped == Drop(1)
    assert isinstance(retried.error, DeadlineExceeded)
    assert placing.avoid == {"d0"}
