"""The claim table: who may read which pages until when, on an owner's clock that the test turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.owner import ClaimLimits, ClaimTable, Freed, TableCounts
from wire.errors import (
    Cancelled,
    ClaimRefused,
    LayoutMismatch,
    Overloaded,
    PenumbraError,
    StaleAttempt,
    WorkerLost,
)
from wire.types import (
    AttemptId,
    ClaimRequest,
    OwnerCard,
    PageClass,
    PageGroup,
    Region,
    RegionClass,
    Tail,
    TokenEvent,
)

CARD = OwnerCard(
    worker_id="prefill-0", epoch=7, transport="loopback", agent="a", metadata=b"", signature="sig", classes=()
)
RUN = AttemptId("r", 1)
SECRET = b"s" * 16
OTHER = b"x" * 16
GROUP = PageGroup(page_class=PageClass.FULL, positions=(0,), items=(3,), generations=(5,), checksums=(9,))
TAIL = Tail(prompt_tokens=256, cached_tokens=0, first=TokenEvent(index=0, token_id=4), total_pages=1)


def claim(run: AttemptId = RUN, secret: bytes = SECRET, from_token: int = 0, signature: str = "sig") -> ClaimRequest:
    return ClaimRequest(
        request_id=run.request_id,
        attempt=run.attempt,
        from_token=from_token,
        secret=secret,
        reader_id="decode-0",
        reader_epoch=1,
        signature=signature,
    )


@pytest.fixture
def table() -> ClaimTable:
    return ClaimTable(CARD)


def test_offers_follow_the_card_in_order_and_without_gaps(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    table.offer(2.0, RUN, (GROUP,), None)
    table.offer(3.0, RUN, (), TAIL)
    offers = table.offers("c", 0)
    assert offers is not None
    assert [(o.seq, o.owner, o.groups, o.tail) for o in offers] == [
        (0, CARD, (), None),
        (1, None, (GROUP,), None),
        (2, None, (), TAIL),
    ]
    assert table.offers("c", 2) == offers[2:]
    assert table.offers("c", 3) == []


def read(table: ClaimTable, now_s: float, run: AttemptId, claim_id: str, *, hold: bool = True) -> None:
    table.expect(now_s, run, SECRET, 0)
    table.open(now_s, claim_id, claim(run))
    table.offer(now_s, run, (GROUP,), TAIL)
    table.finished(now_s, run)
    if hold:
        table.hold(run)


def test_held_pages_stay_after_their_reader_until_they_are_let_go(table: ClaimTable) -> None:
    read(table, 0.0, RUN, "c")
    assert table.release(1.0, "c", SECRET) == (True, [])
    assert table.offers("c", 0) is None
    assert table.expire(1e6) == []
    assert table.counts().held == table.counts().runs == 1
    with pytest.raises(StaleAttempt, match="claimed before"):
        table.open(1e6, "c2", claim())
    assert table.release(1e6, "c", SECRET)[1] == []
    assert table.let_go(1e6, RUN) == [Freed(RUN, None)]
    assert table.let_go(1e6, RUN) == []


def test_a_reader_that_broke_off_leaves_held_pages_to_the_next_attempt(table: ClaimTable) -> None:
    read(table, 0.0, RUN, "c")
    table.broken(1.0, "c")
    assert table.expire(11.0) == []
    assert table.counts().held == 1
    (freed,) = table.expect(12.0, AttemptId("r", 2), OTHER, 0)
    assert freed.run == RUN
    assert isinstance(freed.error, StaleAttempt)


def test_what_is_let_go_while_it_is_read_stays_for_its_reader(table: ClaimTable) -> None:
    read(table, 0.0, RUN, "c")
    assert table.let_go(1.0, RUN) == []
    assert table.release(2.0, "c", SECRET) == (True, [Freed(RUN, None)])


def test_of_more_held_pages_than_the_budget_allows_the_oldest_go() -> None:
    region = Region(name="r", address=0, item_bytes=10, num_items=9)
    card = replace(CARD, classes=(RegionClass(name=PageClass.FULL, regions=(region,)),))
    table = ClaimTable(card, ClaimLimits(held_bytes=20))
    runs = [AttemptId(name, 1) for name in "abc"]
    freed = []
    for i, run in enumerate(runs):
        read(table, float(i), run, run.request_id)
        freed += table.release(float(i), run.request_id, SECRET)[1]
    assert freed == [Freed(runs[0], None)]
    assert table.make_room(9.0) == [Freed(runs[1], None)]
    assert table.make_room(9.0) == [Freed(runs[2], None)]
    assert table.make_room(9.0) == []


def test_a_claim_that_comes_before_its_run_waits_for_it_and_then_opens(table: ClaimTable) -> None:
    table.open(0.0, "c", claim())
    assert table.offers("c", 0) == []
    table.expect(9.9, RUN, SECRET, 0)
    assert [o.seq for o in table.offers("c", 0) or ()] == [0]


def test_a_claim_whose_run_never_comes_is_refused_after_ten_seconds(table: ClaimTable) -> None:
    table.open(0.0, "c", claim())
    assert table.next_deadline() == 10.0
    assert table.expire(9.99) == []
    assert table.expire(10.0) == []
    with pytest.raises(ClaimRefused, match=r"no run r/1 arrived within 10 s"):
        table.offers("c", 0)
    table.broken(10.1, "c")
    assert table.counts().early_claims == 0


def test_a_wrong_secret_gets_nothing_and_does_not_stand_in_the_way_of_the_right_one(
    table: ClaimTable,
) -> None:
    table.open(0.0, "thief", claim(secret=OTHER))
    table.expect(1.0, RUN, SECRET, 0)
    with pytest.raises(ClaimRefused, match="secret"):
        table.offers("thief", 0)
    with pytest.raises(ClaimRefused, match="secret"):
        table.open(1.0, "thief2", claim(secret=OTHER))
    table.open(2.0, "c", claim())
    with pytest.raises(ClaimRefused, match="secret"):
        table.release(3.0, "c", OTHER)
    valid, freed = table.release(4.0, "c", SECRET)
    assert valid
    assert runs(freed) == [RUN]


def test_a_second_claim_of_the_same_run_is_refused(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    with pytest.raises(StaleAttempt, match="claimed before"):
        table.open(2.0, "again", claim())
    table.broken(3.0, "c")
    with pytest.raises(StaleAttempt, match="claimed before"):
        table.open(4.0, "again", claim())


def test_a_claim_from_another_token_than_the_run_offers_is_refused(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 512)
    with pytest.raises(ClaimRefused, match="offers pages from token 512, the claim wants them from 0"):
        table.open(1.0, "c", claim())
    table.open(1.0, "c", claim(from_token=512))


def test_a_reader_with_another_layout_is_refused_before_anything_else(table: ClaimTable) -> None:
    with pytest.raises(LayoutMismatch, match="--kv-layout"):
        table.open(0.0, "c", claim(signature="other"))


def test_release_after_the_tail_is_valid_frees_once_and_answers_the_same_again(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    table.offer(2.0, RUN, (GROUP,), TAIL)
    table.finished(2.0, RUN)
    assert table.release(3.0, "c", SECRET) == (True, [Freed(RUN, None)])
    assert table.offers("c", 2) is None
    table.broken(3.1, "c")
    assert table.release(4.0, "c", SECRET) == (True, [])
    with pytest.raises(ClaimRefused, match="secret"):
        table.release(4.0, "c", OTHER)
    table.expire(64.0)
    assert table.release(64.0, "c", SECRET) == (False, [])
    assert table.counts().tombstones == 0


def test_release_before_the_tail_cancels_the_run(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    valid, freed = table.release(2.0, "c", SECRET)
    assert valid
    assert runs(freed) == [RUN]
    assert isinstance(freed[0].error, Cancelled)


def test_a_broken_stream_has_ten_seconds_of_grace_in_which_a_release_is_still_valid(
    table: ClaimTable,
) -> None:
    for run, claim_id in ((RUN, "c"), (AttemptId("q", 1), "d")):
        table.expect(0.0, run, SECRET, 0)
        table.open(1.0, claim_id, claim(run))
        table.offer(2.0, run, (GROUP,), TAIL)
        table.finished(2.0, run)
        table.broken(3.0, claim_id)
    assert table.next_deadline() == 13.0
    assert table.release(12.0, "c", SECRET) == (True, [Freed(RUN, None)])
    freed = table.expire(13.0)
    assert runs(freed) == [AttemptId("q", 1)]
    assert isinstance(freed[0].error, WorkerLost)
    assert table.release(13.5, "d", SECRET) == (False, [])


def test_a_living_stream_keeps_its_pages_while_the_run_computes_and_long_after(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    assert table.expire(10_000.0) == []
    table.offer(10_000.0, RUN, (GROUP,), TAIL)
    table.finished(10_000.0, RUN)
    assert table.expire(10_299.0) == []
    assert runs(table.expire(10_300.0)) == [RUN]
    with pytest.raises(WorkerLost, match="did not release"):
        table.offers("c", 0)


def test_a_finished_run_that_nobody_claims_is_freed_after_thirty_seconds(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.offer(5.0, RUN, (GROUP,), TAIL)
    table.finished(5.0, RUN)
    assert table.expire(34.9) == []
    assert runs(table.expire(35.0)) == [RUN]
    with pytest.raises(StaleAttempt, match="has ended here"):
        table.open(36.0, "late", claim())


def test_expiry_looks_past_entries_that_have_not_expired(table: ClaimTable) -> None:
    early, late = AttemptId("early", 1), AttemptId("late", 1)
    table.expect(0.0, late, SECRET, 0)
    table.expect(0.0, early, SECRET, 0)
    table.finished(20.0, late)
    table.finished(1.0, early)
    assert runs(table.expire(31.0)) == [early]


def test_a_cancelled_run_ends_its_claim_with_the_reason(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.open(1.0, "c", claim())
    error = Cancelled("the client left")
    assert table.revoke(2.0, RUN, error) == [Freed(RUN, error)]
    assert table.revoke(2.0, RUN, error) == []
    with pytest.raises(Cancelled, match="the client left"):
        table.offers("c", 0)
    assert table.release(3.0, "c", SECRET) == (False, [])
    table.offer(4.0, RUN, (GROUP,), TAIL)  # still on its way from the engine; nobody is left to see it


def test_a_newer_attempt_ends_the_older_and_an_older_one_is_stale(table: ClaimTable) -> None:
    table.expect(0.0, AttemptId("r", 2), SECRET, 0)
    freed = table.expect(1.0, AttemptId("r", 3), SECRET, 0)
    assert runs(freed) == [AttemptId("r", 2)]
    assert isinstance(freed[0].error, StaleAttempt)
    for attempt in (1, 2, 3):
        with pytest.raises(StaleAttempt, match="comes after attempt 3"):
            table.expect(2.0, AttemptId("r", attempt), SECRET, 0)
    with pytest.raises(StaleAttempt, match="has ended here"):
        table.open(2.0, "c", claim(AttemptId("r", 2)))


def test_an_ended_attempt_is_remembered_for_a_minute(table: ClaimTable) -> None:
    table.expect(0.0, RUN, SECRET, 0)
    table.revoke(1.0, RUN, Cancelled("gone"))
    table.expire(60.9)
    with pytest.raises(StaleAttempt):
        table.expect(60.9, RUN, SECRET, 0)
    table.expire(61.0)
    assert table.expect(61.0, RUN, SECRET, 0) == []


def test_a_run_whose_reader_gave_up_before_it_came_is_cancelled_at_the_door(table: ClaimTable) -> None:
    table.open(0.0, "c", claim())
    assert table.release(1.0, "c", SECRET) == (False, [])
    with pytest.raises(Cancelled, match="given up"):
        table.expect(2.0, RUN, SECRET, 0)


def test_giving_up_a_claim_with_a_guessed_secret_stops_nobody(table: ClaimTable) -> None:
    table.open(0.0, "thief", claim(secret=OTHER))
    table.release(1.0, "thief", OTHER)
    assert table.expect(2.0, RUN, SECRET, 0) == []


def test_a_full_table_refuses_runs_and_early_claims_and_forgets_the_oldest_endings() -> None:
    table = ClaimTable(CARD, ClaimLimits(max_runs=2, max_early_claims=1, max_tombstones=3))
    table.expect(0.0, AttemptId("a", 1), SECRET, 0)
    table.expect(0.0, AttemptId("b", 1), SECRET, 0)
    with pytest.raises(Overloaded, match="2 runs"):
        table.expect(0.0, AttemptId("c", 1), SECRET, 0)
    table.expect(0.0, AttemptId("b", 2), SECRET, 0)  # takes the place of b/1
    table.open(0.0, "x", claim(AttemptId("d", 1)))
    with pytest.raises(Overloaded, match="1 claims"):
        table.open(0.0, "y", claim(AttemptId("e", 1)))
    for n in range(10):
        table.revoke(1.0, AttemptId("b", 2 + n), Cancelled("gone"))
        table.expect(1.0, AttemptId("b", 3 + n), SECRET, 0)
    for name in "fghijk":
        table.revoke(1.0, AttemptId("a", 1), Cancelled("gone"))
        table.expect(1.0, AttemptId(name, 1), SECRET, 0)
        table.revoke(1.0, AttemptId(name, 1), Cancelled("gone"))
    assert table.counts().tombstones == 3


def runs(freed: list[Freed]) -> list[AttemptId]:
    return [one.run for one in freed]


REQUESTS = st.sampled_from(["p", "q"])
ATTEMPTS = st.integers(1, 3)
SECRETS = st.sampled_from([SECRET, OTHER])


class AnyOrder(RuleBasedStateMachine):
    """Whatever arrives in whatever order: every run that was accepted is freed exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table = ClaimTable(CARD)
        self.held: dict[AttemptId, bool] = {}  # run -> whether its tail was offered
        self.streams: set[str] = set()
        self.ids: list[str] = []

    def freed(self, freed: list[Freed]) -> None:
        for one in freed:
            del self.held[one.run]  # KeyError: freed twice, or never held

    @rule(request=REQUESTS, attempt=ATTEMPTS, secret=SECRETS)
    def expect(self, request: str, attempt: int, secret: bytes) -> None:
        run = AttemptId(request, attempt)
        try:
            freed = self.table.expect(self.now, run, secret, 0)
        except (StaleAttempt, Cancelled):
            return
        self.freed(freed)
        assert all(other.request_id != request for other in self.held)
        self.held[run] = False

    @rule(request=REQUESTS, attempt=ATTEMPTS, secret=SECRETS)
    def open(self, request: str, attempt: int, secret: bytes) -> None:
        claim_id = f"c{len(self.ids)}"
        try:
            self.table.open(self.now, claim_id, claim(AttemptId(request, attempt), secret))
        except (StaleAttempt, ClaimRefused):
            return
        self.ids.append(claim_id)
        self.streams.add(claim_id)

    @rule(request=REQUESTS, attempt=ATTEMPTS, last=st.booleans())
    def offer(self, request: str, attempt: int, last: bool) -> None:
        run = AttemptId(request, attempt)
        if not self.held.get(run, False):
            self.table.offer(self.now, run, (GROUP,), TAIL if last else None)
            if run in self.held:
                self.held[run] = last

    @rule(request=REQUESTS, attempt=ATTEMPTS)
    def finished(self, request: str, attempt: int) -> None:
        self.table.finished(self.now, AttemptId(request, attempt))

    @rule(request=REQUESTS, attempt=ATTEMPTS)
    def revoke(self, request: str, attempt: int) -> None:
        self.freed(self.table.revoke(self.now, AttemptId(request, attempt), Cancelled("test")))

    @rule(data=st.data())
    def broken(self, data: st.DataObject) -> None:
        if self.streams:
            claim_id = data.draw(st.sampled_from(sorted(self.streams)))
            self.streams.remove(claim_id)
            self.table.broken(self.now, claim_id)

    @rule(data=st.data(), secret=SECRETS)
    def release(self, data: st.DataObject, secret: bytes) -> None:
        if self.ids:
            try:
                _, freed = self.table.release(self.now, data.draw(st.sampled_from(self.ids)), secret)
            except ClaimRefused:
                return
            self.freed(freed)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if self.streams:
            claim_id = data.draw(st.sampled_from(sorted(self.streams)))
            try:
                offers = self.table.offers(claim_id, 0)
            except PenumbraError:
                return
            assert offers is None or [offer.seq for offer in offers] == list(range(len(offers)))

    @rule(seconds=st.sampled_from([1.0, 9.0, 31.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.freed(self.table.expire(self.now))
        deadline = self.table.next_deadline()
        assert deadline is None or deadline > self.now

    @invariant()
    def the_table_holds_what_was_not_freed(self) -> None:
        assert self.table.counts().runs == len(self.held)

    def teardown(self) -> None:
        for claim_id in sorted(self.streams):
            self.table.broken(self.now, claim_id)
        for run in list(self.held):
            self.table.finished(self.now, run)
        self.now += 400.0
        self.freed(self.table.expire(self.now))
        self.table.expire(self.now + 60.0)
        assert not self.held
        assert self.table.counts() == TableCounts(runs=0, early_claims=0, open_claims=0, tombstones=0, held=0)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
