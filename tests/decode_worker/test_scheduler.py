"""The decode core, driven by offers and results that a prefill worker, a reader and a model could have sent."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_worker.admission import Place
from decode_worker.preemption import HostPages
from decode_worker.scheduler import (
    Cancel,
    CancelRead,
    ClaimEnded,
    CloseClaim,
    DecodeAction,
    DecodeLimits,
    Emit,
    OfferArrived,
    OpenClaim,
    PrefixesChanged,
    ReadEnded,
    Restore,
    Restored,
    Save,
    Saved,
    Settled,
    Start,
    SubmitRead,
)
from engine.batch import Chain, Drawn, Sampled, Segment
from engine.cache.pools import PageAllocator
from engine.loop import StepFailed, Tick
from kvtransfer.reader import ReadJob, ReadResult
from tests.books import CheckedDecode as DecodeCore
from wire.errors import TransferFailed, WorkerLost
from wire.types import (
    Admitted,
    AttemptId,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    OwnerCard,
    PageClass,
    PageGroup,
    PageOffer,
    Region,
    RegionClass,
    Replaying,
    SamplingParams,
    StartEvent,
    StartRequest,
    Stored,
    Tail,
    TokenEvent,
    Tokens,
    WorkerRef,
)

SECRET = b"s" * 16
SOURCE = WorkerRef(worker_id="prefill-0", address="127.0.0.1:1", epoch=7)
EOS = 1


def classes(full: int, swa: int, slots: int) -> tuple[RegionClass, ...]:
    sizes = {PageClass.FULL: full, PageClass.SWA: swa, PageClass.STATE: 2 * slots}
    return tuple(
        RegionClass(name=cls, regions=(Region(name="r", address=0, item_bytes=8, num_items=n),))
        for cls, n in sizes.items()
    )


CARD = OwnerCard(
    worker_id="prefill-0",
    epoch=7,
    transport="loopback",
    agent="a",
    metadata=b"",
    signature="sig",
    classes=classes(100, 100, 100),
)


class Pools:
    signature = "sig"

    def __init__(self, full: int = 32, swa: int = 16, slots: int = 4) -> None:
        self.full, self.swa, self.slots = (
            PageAllocator(full + 1),
            PageAllocator(swa + 1),
            PageAllocator(slots + 1),
        )
        self.classes = classes(full + 1, swa + 1, slots + 1)

    def counts(self, state: str) -> tuple[int, int, int]:
        return tuple(getattr(a.counts(), state) for a in (self.full, self.swa, self.slots))  # type: ignore[return-value]


def limits(**changes: float) -> DecodeLimits:
    values = {"max_context": 8192, "vocab_size": 1000, "eos_token_id": EOS, "prefix_cache": False, **changes}
    return DecodeLimits(**values)  # type: ignore[arg-type]


def request(name: str = "a", num_tokens: int = 300, attempt: int = 1, **sampling: object) -> StartRequest:
    params = {"max_tokens": 4, "seed": 0, **sampling}
    return StartRequest(
        request_id=name,
        attempt=attempt,
        prompt=tuple(2 + i % 900 for i in range(num_tokens)),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        source=SOURCE,
    )


def group(page_class: PageClass, positions: list[int], first_item: int = 40) -> PageGroup:
    n = len(positions)
    items = tuple(range(first_item, first_item + n))
    return PageGroup(
        page_class=page_class,
        positions=tuple(positions),
        items=items,
        generations=(0,) * n,
        checksums=(5,) * n,
    )


def meeting(claim_id: str = "c") -> PageOffer:
    return PageOffer(seq=0, claim_id=claim_id, owner=CARD)


def last_offer(n: int, seq: int, groups: tuple[PageGroup, ...], first: int = 50, total: int | None = None) -> PageOffer:
    if total is None:
        total = needed(n)
    tail = Tail(
        prompt_tokens=n,
        cached_tokens=0,
        first=TokenEvent(index=0, token_id=first, logprob=-0.25),
        total_pages=total,
    )
    return PageOffer(seq=seq, claim_id="c", groups=groups, tail=tail)


def full_pages(n: int) -> list[int]:
    return list(range(-(-n // 256)))


def window_pages(n: int) -> list[int]:
    return list(range(max(0, n - 128) // 256, -(-n // 256)))


def state_pages(n: int) -> list[int]:
    return [] if n % 128 == 0 else [-(-n // 256) - 1]


def needed(n: int) -> int:
    return len(full_pages(n)) + len(window_pages(n)) + len(state_pages(n))


def everything(n: int) -> tuple[PageGroup, ...]:
    found = [group(PageClass.FULL, full_pages(n)), group(PageClass.SWA, window_pages(n))]
    return (*found, group(PageClass.STATE, state_pages(n))) if state_pages(n) else tuple(found)


def landed(job: ReadJob | str, *, ok: bool = True, unsettled: tuple[Place, ...] = ()) -> ReadEnded:
    return ReadEnded(
        ReadResult(
            job_id=job if isinstance(job, str) else job.job_id,
            ok=ok,
            error=None if ok else TransferFailed("2 pages do not match their checksum"),
            unsettled=unsettled,
            num_bytes=8,
            seconds=0.1,
        )
    )


def submitted(actions: list[DecodeAction]) -> ReadJob:
    (job,) = [action.job for action in actions if isinstance(action, SubmitRead)]
    return job


def emitted(actions: list[DecodeAction]) -> list[StartEvent]:
    return [action.event for action in actions if isinstance(action, Emit)]


def token_ids(actions: list[DecodeAction]) -> list[int]:
    return [t.token_id for event in emitted(actions) if isinstance(event, Tokens) for t in event.tokens]


def failure(actions: list[DecodeAction]) -> Failed:
    (failed,) = [event for event in emitted(actions) if isinstance(event, Failed)]
    return failed


def make_running(core: DecodeCore, req: StartRequest, first: int = 50) -> list[DecodeAction]:
    """Start `req`, let all its pages arrive in one offer; the actions of the moment it joins the batch."""
    run = AttemptId(req.request_id, req.attempt)
    core.step(0.0, Start(req, SECRET))
    core.step(0.0, OfferArrived(run, meeting()))
    n = len(req.prompt)
    job = submitted(core.step(0.0, OfferArrived(run, last_offer(n, 1, everything(n), first))))
    return core.step(0.0, landed(job))


def drawn(*results: Sampled) -> list[Drawn]:
    """One token for each request of the batch."""
    return [Drawn((sampled,)) for sampled in results]


def decode_step(core: DecodeCore, *ids: int) -> list[DecodeAction]:
    assert len(core.next_batch(0.0)) == len(ids)
    return core.finish(0.0, drawn(*(Sampled(token_id=i, logprob=-1.0) for i in ids)))


A, B = AttemptId("a", 1), AttemptId("b", 1)


def test_admission_says_what_it_set_aside_and_opens_the_claim() -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    assert core.step(0.0, Start(request(num_tokens=300), SECRET)) == [
        Emit(A, Admitted(resident_prefix=0, secret=SECRET)),
        Emit(A, Fetching(pages=2 + 2 + 1)),
        OpenClaim(A, SOURCE, 0, SECRET),
    ]
    assert pools.counts("used") == (2, 2, 1)


def test_an_offer_becomes_a_read_into_our_own_places() -> None:
    core = DecodeCore(Pools(), limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    assert core.step(0.0, OfferArrived(A, meeting())) == []
    offer = PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0], 77),))
    (action,) = core.step(0.0, OfferArrived(A, offer))
    assert action == SubmitRead(ReadJob(job_id="a/1/1", card=CARD, groups=offer.groups, local={PageClass.FULL: {0: 1}}))
    job = submitted(
        core.step(
            0.0,
            OfferArrived(
                A,
                last_offer(
                    300,
                    2,
                    (
                        group(PageClass.FULL, [1]),
                        group(PageClass.SWA, [0, 1]),
                        group(PageClass.STATE, [1]),
                    ),
                ),
            ),
        )
    )
    # Slot 1, 300 tokens: the open block of 256..299 is in the first half of the slot's ring.
    assert job.local == {PageClass.FULL: {1: 2}, PageClass.SWA: {0: 1, 1: 2}, PageClass.STATE: {1: 2}}


def test_token_0_goes_out_when_the_last_read_has_landed_and_not_before() -> None:
    core = DecodeCore(Pools(), limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    early = submitted(
        core.step(0.0, OfferArrived(A, PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0]),))))
    )
    rest = (group(PageClass.FULL, [1]), group(PageClass.SWA, [0, 1]), group(PageClass.STATE, [1]))
    late = submitted(core.step(0.0, OfferArrived(A, last_offer(300, 2, rest))))
    assert core.step(0.0, landed(late)) == []
    assert core.next_batch(0.0) == []
    assert core.step(0.0, landed(early)) == [
        Emit(A, Tokens(attempt=1, tokens=(TokenEvent(index=0, token_id=50, logprob=-0.25),))),
        CloseClaim(A, SOURCE, "c", SECRET),
    ]


def test_decoding_continues_at_the_prompts_end_with_the_token_before() -> None:
    core = DecodeCore(Pools(), limits())
    make_running(core, request(num_tokens=300))
    (segment,) = core.next_batch(0.0)
    assert (segment.start, segment.tokens, segment.sample, segment.index) == (300, [50], True, 1)
    actions = core.finish(0.0, drawn(Sampled(token_id=60, logprob=-1.0, top=((60, -1.0),))))
    assert actions == [
        Emit(A, Tokens(attempt=1, tokens=(TokenEvent(index=1, token_id=60, logprob=-1.0, top=((60, -1.0),)),)))
    ]
    (segment,) = core.next_batch(0.0)
    assert (segment.start, segment.tokens, segment.index) == (301, [60], 2)


def test_requests_of_different_age_share_every_step() -> None:
    core = DecodeCore(Pools(), limits())
    make_running(core, request("a", 300))
    decode_step(core, 60)
    make_running(core, request("b", 10))
    batch = core.next_batch(0.0)
    assert [(s.sequence.request_id, s.start, s.index) for s in batch] == [("a", 301, 2), ("b", 10, 1)]
    actions = core.finish(0.0, drawn(Sampled(token_id=61, logprob=0.0), Sampled(token_id=71, logprob=0.0)))
    assert [(a.run, a.event.tokens[0].token_id) for a in actions if isinstance(a, Emit)] == [(A, 61), (B, 71)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        ({"max_tokens": 3}, [50, 60, 70], FinishReason.LENGTH),
        ({"max_tokens": 9}, [50, 60, EOS], FinishReason.STOP),
        ({"max_tokens": 3, "ignore_eos": True}, [50, EOS, EOS], FinishReason.LENGTH),
        ({"max_tokens": 9, "stop_token_ids": (60,)}, [50, 60], FinishReason.STOP),
        ({"max_tokens": 9, "stop_token_ids": (60,), "ignore_eos": True}, [50, EOS, 60], FinishReason.STOP),
        ({"max_tokens": 1}, [50], FinishReason.LENGTH),
        ({"max_tokens": 9}, [EOS], FinishReason.STOP),
    ],
)
def test_a_request_ends_where_it_should_and_gives_everything_back(
    sampling: dict[str, object], tokens: list[int], reason: FinishReason
) -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    actions = make_running(core, request(num_tokens=300, **sampling), first=tokens[0])
    for token in tokens[1:]:
        actions += decode_step(core, token)
    assert token_ids(actions) == tokens
    assert emitted(actions)[-1] == Finished(
        reason=reason, prompt_tokens=300, cached_tokens=0, completion_tokens=len(tokens)
    )
    assert CloseClaim(A, SOURCE, "c", SECRET) in actions
    assert core.next_batch(0.0) == []
    assert pools.counts("used") == pools.counts("quarantined") == (0, 0, 0)


def test_window_pages_follow_a_long_answer_and_never_exceed_two() -> None:
    pools = Pools(full=8, swa=2)
    core = DecodeCore(pools, limits())
    make_running(core, request(num_tokens=250, max_tokens=900))
    for k in range(898):
        (segment,) = core.next_batch(0.0)
        position = segment.start
        assert position == 250 + k
        for j in range(max(0, position - 127) // 256, position // 256 + 1):
            assert segment.sequence.swa_pages[j] != 0
            assert segment.sequence.pages[j] != 0
        core.finish(0.0, drawn(Sampled(token_id=60, logprob=0.0)))
    assert emitted(decode_step(core, 60))[-1] == Finished(
        reason=FinishReason.LENGTH, prompt_tokens=250, cached_tokens=0, completion_tokens=900
    )
    assert pools.counts("free") == (8, 2, 4)


def test_requests_wait_in_line_for_room_and_come_in_as_others_leave() -> None:
    core = DecodeCore(Pools(full=3), limits())
    make_running(core, request("a", 300, max_tokens=2))
    assert core.step(0.0, Start(request("b", 500, max_tokens=9), SECRET)) == []
    assert core.step(0.0, Start(request("c", 10), SECRET)) == []  # would fit, but b came first
    assert (core.load().waiting, core.load().queued_tokens) == (2, 510)
    actions = decode_step(core, 60)
    assert [a.run.request_id for a in actions if isinstance(a, OpenClaim)] == ["b", "c"]


def test_a_cancelled_fetch_quarantines_what_is_being_read_until_the_read_has_ended() -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    offer = PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0]), group(PageClass.STATE, [1])))
    job = submitted(core.step(0.0, OfferArrived(A, offer)))
    assert core.step(0.0, Cancel(A)) == [CloseClaim(A, SOURCE, "c", SECRET), CancelRead(job.job_id)]
    assert pools.counts("used") == (0, 0, 0)
    assert pools.counts("quarantined") == (1, 0, 1)
    assert core.load().quarantined_total == 2
    assert core.step(0.0, landed(job)) == []
    assert pools.counts("quarantined") == (0, 0, 0)
    assert core.step(0.0, Cancel(A)) == []


def test_a_read_that_fails_unsettled_quarantines_its_pages_until_they_are_quiet() -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    job = submitted(core.step(0.0, OfferArrived(A, last_offer(300, 1, everything(300)))))
    stuck = ((PageClass.FULL, 2), (PageClass.SWA, 1), (PageClass.STATE, 2))
    actions = core.step(0.0, landed(job, ok=False, unsettled=stuck))
    assert (failure(actions).code, failure(actions).retryable) == ("transfer_failed", True)
    assert pools.counts("quarantined") == (1, 1, 1)
    assert pools.counts("used") == (0, 0, 0)
    core.step(0.0, Settled(stuck[:2]))
    assert pools.counts("quarantined") == (0, 0, 1)
    core.step(0.0, Settled(stuck[2:]))
    assert pools.counts("free") == (32, 16, 4)


def test_a_cancelled_read_that_stays_unsettled_keeps_only_those_pages() -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    job = submitted(core.step(0.0, OfferArrived(A, last_offer(300, 1, everything(300)))))
    core.step(0.0, Cancel(A))
    assert pools.counts("quarantined") == (2, 2, 1)
    core.step(0.0, landed(job, ok=False, unsettled=((PageClass.SWA, 2),)))
    assert pools.counts("quarantined") == (0, 1, 0)
    core.step(0.0, Settled(((PageClass.SWA, 2),)))
    assert pools.counts("free") == (32, 16, 4)


def test_a_claim_that_ends_before_the_tail_fails_the_attempt_and_after_it_means_nothing() -> None:
    core = DecodeCore(Pools(), limits())
    core.step(0.0, Start(request("a"), SECRET))
    core.step(0.0, Start(request("b"), SECRET))
    failed = failure(core.step(0.0, ClaimEnded(A, WorkerLost("gone"))))
    assert (failed.code, failed.message, failed.retryable) == ("worker_lost", "gone", True)
    core.step(0.0, OfferArrived(B, meeting()))
    job = submitted(core.step(0.0, OfferArrived(B, last_offer(300, 1, everything(300)))))
    assert core.step(0.0, ClaimEnded(B, WorkerLost("gone"))) == []
    assert token_ids(core.step(0.0, landed(job))) == [50]


FULL2 = group(PageClass.FULL, [0, 1])


@pytest.mark.parametrize(
    ("offers", "code", "words"),
    [
        ([replace(meeting(), seq=1)], "transfer_failed", "offer 1 came where 0 was due"),
        ([PageOffer(seq=0, claim_id="c")], "transfer_failed", "does not carry the owner's card"),
        ([replace(meeting(), groups=(FULL2,))], "transfer_failed", "does not carry the owner's card alone"),
        ([replace(meeting(), owner=replace(CARD, epoch=8))], "worker_lost", "another epoch"),
        (
            [replace(meeting(), owner=replace(CARD, worker_id="prefill-1"))],
            "worker_lost",
            "answers as prefill-1",
        ),
        ([replace(meeting(), owner=replace(CARD, signature="other"))], "layout_mismatch", "--kv-layout"),
        ([meeting(), PageOffer(seq=2, claim_id="c")], "transfer_failed", "offer 2 came where 1 was due"),
        ([meeting(), PageOffer(seq=1, claim_id="d")], "transfer_failed", "another claim"),
        (
            [meeting(), PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [2]),))],
            "transfer_failed",
            "full page 2 is offered twice or is none",
        ),
        (
            [
                meeting(),
                PageOffer(seq=1, claim_id="c", groups=(FULL2,)),
                PageOffer(seq=2, claim_id="c", groups=(FULL2,)),
            ],
            "transfer_failed",
            "full page 0 is offered twice",
        ),
        (
            [meeting(), PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0], 0),))],
            "transfer_failed",
            "item 0 is outside",
        ),
        (
            [meeting(), PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0], 100),))],
            "transfer_failed",
            "item 100 is outside the owner's pool of 100",
        ),
        (
            [meeting(), PageOffer(seq=1, claim_id="c", groups=(replace(FULL2, checksums=(1,)),))],
            "transfer_failed",
            "different lengths",
        ),
        ([meeting(), last_offer(300, 1, (FULL2,))], "transfer_failed", "3 never came"),
        ([meeting(), last_offer(300, 1, everything(300), total=9)], "transfer_failed", "counts 9 pages of 5"),
        (
            [
                meeting(),
                replace(last_offer(300, 1, everything(300)), tail=last_offer(299, 1, (), total=5).tail),
            ],
            "transfer_failed",
            "the tail is for 299 tokens",
        ),
        ([meeting(), last_offer(300, 1, everything(300), first=1000)], "transfer_failed", "first token 1000"),
        (
            [meeting(), last_offer(300, 1, everything(300)), PageOffer(seq=2, claim_id="c")],
            "transfer_failed",
            "after the last one",
        ),
    ],
)
def test_a_wrong_offer_fails_the_attempt_and_leaves_nothing(offers: list[PageOffer], code: str, words: str) -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    core.step(0.0, Start(request(num_tokens=300), SECRET))
    actions: list[DecodeAction] = []
    for offer in offers:
        actions += core.step(0.0, OfferArrived(A, offer))
    failed = failure(actions)
    assert (failed.code, failed.retryable) == (code, True)
    assert words in failed.message
    for action in actions:
        if isinstance(action, SubmitRead):
            core.step(0.0, landed(action.job))
    assert pools.counts("free") == (32, 16, 4)


def test_a_result_that_is_not_finite_fails_its_request_and_its_neighbours_go_on() -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    make_running(core, request("a"))
    make_running(core, request("b"))
    core.next_batch(0.0)
    actions = core.finish(0.0, drawn(Sampled(token_id=0, logprob=0.0, ok=False), Sampled(token_id=60, logprob=0.0)))
    assert failure(actions).code == "numerical_error"
    assert token_ids(actions) == [60]
    assert [s.sequence.request_id for s in core.next_batch(0.0)] == ["b"]
    assert pools.counts("used")[2] == 1


def test_a_step_that_raised_fails_its_requests_and_not_one_still_fetching() -> None:
    core = DecodeCore(Pools(), limits())
    make_running(core, request("a"))
    core.step(0.0, Start(request("b"), SECRET))
    core.next_batch(0.0)
    actions = core.step(0.0, StepFailed("RuntimeError: boom"))
    assert [(a.run, a.event.code) for a in actions if isinstance(a, Emit) and isinstance(a.event, Failed)] == [
        (A, "worker_lost")
    ]
    assert core.step(0.0, OfferArrived(B, meeting())) == []


def test_waiting_and_fetching_both_end_in_time() -> None:
    pools = Pools(full=2)
    core = DecodeCore(pools, limits(queue_timeout_s=30.0, offer_timeout_s=300.0))
    core.step(0.0, Start(request("a"), SECRET))
    core.step(1.0, Start(request("b"), SECRET))
    assert core.next_deadline() == 31.0
    assert failure(core.step(31.0, Tick())).code == "overloaded"
    core.step(200.0, OfferArrived(A, meeting()))
    assert core.next_deadline() == 500.0
    assert failure(core.step(500.0, Tick())).code == "deadline_exceeded"
    assert core.next_deadline() is None
    assert pools.counts("free") == (2, 16, 4)


def test_the_same_attempt_twice_is_stale_and_a_newer_one_takes_over() -> None:
    core = DecodeCore(Pools(), limits())
    core.step(0.0, Start(request("a", attempt=2), SECRET))
    assert failure(core.step(0.0, Start(request("a", attempt=2), SECRET))).code == "stale_attempt"
    assert failure(core.step(0.0, Start(request("a", attempt=1), SECRET))).code == "stale_attempt"
    actions = core.step(0.0, Start(request("a", attempt=3), SECRET))
    assert [(a.run.attempt, type(a.event)) for a in actions if isinstance(a, Emit)] == [
        (2, Failed),
        (3, Admitted),
        (3, Fetching),
    ]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request(num_tokens=0), "empty"),
        (request(max_tokens=0), "max_tokens=0"),
        (
            request(num_tokens=8190, max_tokens=3),
            "8190 prompt tokens and max_tokens=3 exceed the context of 8192",
        ),
        (request(num_tokens=2048, max_tokens=1), "need 9 pages and this worker has 8 in all"),
        (replace(request(), emitted=(5,) * 5), "5 tokens have been emitted of max_tokens=4"),
        (replace(request(), emitted=(1000,)), "emitted token ids are outside the vocabulary"),
        (replace(request(), prompt=(1000,)), "vocabulary of 1000"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_its_numbers(bad: StartRequest, words: str) -> None:
    pools = Pools(full=8)
    core = DecodeCore(pools, limits())
    failed = failure(core.step(0.0, Start(bad, SECRET)))
    assert (failed.code, failed.retryable) == ("invalid_request", False)
    assert words in failed.message
    assert pools.counts("free") == (8, 16, 4)


def test_emitted_tokens_are_computed_and_not_drawn_and_the_answer_goes_on_behind_them() -> None:
    """Page by page, as many in a step as the limit allows, and nothing is said twice."""
    core = DecodeCore(Pools(), limits())
    said = tuple(2 + i % 7 for i in range(300))
    moved = replace(request(num_tokens=300, max_tokens=400, attempt=2), emitted=said)
    actions = make_running(core, moved, first=said[0])
    assert emitted(actions) == [Replaying(done=0, total=300)]
    (first,) = core.next_batch(0.0)
    assert (first.start, first.tokens, first.sample) == (300, list(said[:212]), False)  # to the page's end
    assert emitted(core.finish(0.0, [Drawn()])) == [Replaying(done=212, total=300)]
    (second,) = core.next_batch(0.0)
    assert (second.start, second.tokens) == (512, list(said[212:]))
    assert (second.sample, second.index) == (True, 300)
    assert token_ids(core.finish(0.0, drawn(Sampled(token_id=77, logprob=-1.0)))) == [77]
    (third,) = core.next_batch(0.0)
    assert (third.start, third.tokens, third.index) == (600, [77], 301)


def test_many_answers_that_move_here_share_what_a_step_may_compute_again_and_others_go_on() -> None:
    core = DecodeCore(Pools(), limits())
    make_running(core, request("b"))
    for name in "ac":
        make_running(core, replace(request(name, max_tokens=400), emitted=tuple(range(2, 202))))
    batch = core.next_batch(0.0)
    assert [len(segment.tokens) for segment in batch] == [1, 200, 56]
    assert [segment.sample for segment in batch] == [True, True, False]


@pytest.mark.parametrize(("last", "reason"), [(9, FinishReason.LENGTH), (EOS, FinishReason.STOP)])
def test_an_answer_whose_last_token_was_emitted_elsewhere_ends_at_once(last: int, reason: FinishReason) -> None:
    pools = Pools()
    core = DecodeCore(pools, limits())
    over = replace(request(max_tokens=3 if last != EOS else 9), emitted=(7, 8, last))
    (end,) = emitted(core.step(0.0, Start(over, SECRET)))
    assert end == Finished(reason=reason, prompt_tokens=300, cached_tokens=0, completion_tokens=3)
    assert pools.counts("used") == (0, 0, 0)


def test_a_replaying_request_that_makes_room_comes_back_to_the_token_it_was_at() -> None:
    core = DecodeCore(Pools(full=5), limits(growth_tokens=0))
    make_running(core, request("b", num_tokens=256, max_tokens=300))
    make_running(core, replace(request("a", num_tokens=300, max_tokens=700), emitted=tuple(range(2, 602))))
    seen: list[DecodeAction] = []
    positions: list[int] = []
    for _ in range(700):
        batch = core.next_batch(0.0)
        if not batch:
            break
        positions += [s.start for s in batch if s.sequence.request_id == "a"]
        results = [Drawn((Sampled(token_id=60, logprob=-1.0),)) if s.sample else Drawn() for s in batch]
        seen += carry_out(core, core.finish(0.0, results))
    assert any(isinstance(action, Save) and action.run == A for action in seen)
    assert positions == sorted(positions)
    tokens = [e for action in seen if isinstance(action, Emit) and action.run == A for e in [action.event]]
    indices = [t.index for event in tokens if isinstance(event, Tokens) for t in event.tokens]
    assert indices == list(range(600, 700))


def test_pages_that_had_landed_when_an_owner_was_lost_are_not_fetched_again() -> None:
    core = DecodeCore(Pools(), limits(prefix_cache=True))
    core.step(0.0, Start(request(num_tokens=700), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    for seq, positions in ((1, [0]), (2, [1])):
        offer = PageOffer(seq=seq, claim_id="c", groups=(group(PageClass.FULL, positions, 40 + seq),))
        job = submitted(core.step(0.0, OfferArrived(A, offer)))
        if seq == 1:
            core.step(0.0, landed(job))
    core.step(0.0, ClaimEnded(A, WorkerLost("the owner died")))
    actions = core.step(0.0, Start(request(num_tokens=700, attempt=2), SECRET))
    assert emitted(actions)[0] == Admitted(resident_prefix=256, secret=SECRET)


def test_a_full_queue_refuses_at_once_and_may_be_tried_elsewhere() -> None:
    core = DecodeCore(Pools(slots=1), limits(max_waiting=1))
    for name in "ab":
        core.step(0.0, Start(request(name), SECRET))
    failed = failure(core.step(0.0, Start(request("c"), SECRET)))
    assert (failed.code, failed.retryable) == ("overloaded", True)


def say(core: DecodeCore, steps: int) -> list[DecodeAction]:
    """Let the batch advance, everyone by one token a step; copies are answered at once, as the engine does."""
    seen: list[DecodeAction] = []
    for _ in range(steps):
        batch = core.next_batch(0.0)
        if not batch:
            break
        seen += carry_out(core, core.finish(0.0, drawn(*(Sampled(token_id=60, logprob=-1.0) for _ in batch))))
    return seen


NOTHING = HostPages({}, {})


def carry_out(core: DecodeCore, actions: list[DecodeAction]) -> list[DecodeAction]:
    """All actions, those that followed from answering copies included."""
    seen, left = [], list(actions)
    while left:
        action = left.pop(0)
        seen.append(action)
        if isinstance(action, Save):
            left += core.step(0.0, Saved(action.run, NOTHING))
        elif isinstance(action, Restore):
            left += core.step(0.0, Restored(action.run, 0))
    return seen


def test_answers_that_outgrow_the_pages_move_the_last_request_to_host_memory_and_back() -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0))
    make_running(core, request("a", 500, max_tokens=40))
    make_running(core, request("b", 500, max_tokens=40))
    before = say(core, 12)  # 512 tokens each: both need a page and there is none
    assert Save(B, {PageClass.FULL: [3, 4], PageClass.SWA: [2], PageClass.STATE: []}) in before
    assert (core.load().preemptions_total, core.load().host_bytes) == (1, 3 * 8)
    assert pools.counts("used") == (3, 1, 1)
    assert [s.sequence.request_id for s in core.next_batch(0.0)] == ["a"]
    after = carry_out(core, core.finish(0.0, drawn(Sampled(token_id=60, logprob=-1.0))))
    after += say(core, 60)
    (restore,) = [action for action in after if isinstance(action, Restore)]
    assert restore.pages is NOTHING
    assert [len(items) for items in restore.items.values()] == [2, 1, 0]
    for run in (A, B):  # both say everything once, in order
        said = [a.event for a in (*before, *after) if isinstance(a, Emit) and a.run == run]
        indices = [token.index for event in said if isinstance(event, Tokens) for token in event.tokens]
        assert indices == list(range(1, 40))
        assert isinstance(said[-1], Finished)
    assert pools.counts("free") == (4, 16, 4)
    assert core.load().host_bytes == 0


def test_a_preempted_request_goes_on_at_its_token_with_its_places_renewed() -> None:
    pools = Pools(full=4, swa=4)
    core = DecodeCore(pools, limits(growth_tokens=0))
    make_running(core, request("a", 500, max_tokens=14))
    make_running(core, request("b", 500, max_tokens=40), first=51)
    say(core, 12)
    core.step(0.0, Start(request("c", 3, max_tokens=40), SECRET))  # waits: who was here comes first
    assert core.load().waiting == 1
    say(core, 1)  # the end of a
    (segment, *_) = core.next_batch(0.0)
    assert (segment.sequence.request_id, segment.start, segment.tokens, segment.index) == ("b", 512, [60], 13)
    assert len(segment.sequence.pages) == 3
    assert [bool(item) for item in segment.sequence.swa_pages] == [False, True, True]


def test_requests_that_take_turns_all_get_ahead() -> None:
    pools = Pools(full=5)
    core = DecodeCore(pools, limits(growth_tokens=0))
    make_running(core, request("a", 511, max_tokens=300))
    make_running(core, request("b", 511, max_tokens=300))
    seen = say(core, 700)  # three pages each, and five in all: they never run together again
    ends = [action.run for action in seen if isinstance(action, Emit) and isinstance(action.event, Finished)]
    assert ends == [A, B]
    assert core.load().preemptions_total == 1


def test_a_request_that_needs_a_page_alone_waits_for_reads_to_settle_rather_than_fail() -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0, queue_timeout_s=30.0))
    make_running(core, request("a", 500, max_tokens=400))
    core.step(0.0, Start(request("b", 500), SECRET))
    core.step(0.0, OfferArrived(B, meeting()))
    job = submitted(core.step(0.0, OfferArrived(B, last_offer(500, 1, everything(500)))))
    core.step(0.0, Cancel(B))
    say(core, 12)
    assert core.next_batch(0.0) == []  # b's pages are still being written
    assert core.next_deadline() == 30.0
    core.step(0.0, landed(job))
    assert [s.start for s in core.next_batch(0.0)] == [512]
    assert core.next_deadline() is None


def test_pages_that_never_settle_end_the_wait_of_a_running_request() -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0, queue_timeout_s=30.0))
    make_running(core, request("a", 500, max_tokens=400))
    core.step(0.0, Start(request("b", 500), SECRET))
    core.step(0.0, OfferArrived(B, meeting()))
    core.step(0.0, OfferArrived(B, last_offer(500, 1, everything(500))))
    core.step(0.0, Cancel(B))
    say(core, 12)
    failed = failure(core.step(30.0, Tick()))
    assert (failed.code, failed.retryable) == ("overloaded", True)
    assert "no page for token 13" in failed.message
    assert pools.counts("used") == (0, 0, 0)


def test_without_host_memory_the_last_request_fails_when_nobody_can_go_on() -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0, host_memory_bytes=23))  # one byte less than b needs
    make_running(core, request("a", 500, max_tokens=40))
    make_running(core, request("b", 500, max_tokens=40))
    actions = say(core, 12)
    failed = failure(actions)
    assert (failed.code, failed.retryable) == ("overloaded", True)
    assert [a.run for a in actions if isinstance(a, Emit) and isinstance(a.event, Failed)] == [B]
    assert [s.sequence.request_id for s in core.next_batch(0.0)] == ["a"]


def test_a_copy_that_comes_back_damaged_fails_its_request_alone() -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0))
    make_running(core, request("a", 500, max_tokens=14))
    make_running(core, request("b", 500, max_tokens=40))
    say(core, 12)
    core.next_batch(0.0)
    actions = core.finish(0.0, drawn(Sampled(token_id=60, logprob=-1.0)))
    (restore,) = [action for action in actions if isinstance(action, Restore)]
    failed = failure(core.step(0.0, Restored(restore.run, 2)))
    assert (failed.code, failed.retryable) == ("transfer_failed", True)
    assert "2 pages of b/1" in failed.message
    assert pools.counts("free") == (4, 16, 4)


@pytest.mark.parametrize("when", ["saving", "preempted", "restoring"])
def test_a_request_cancelled_on_its_way_to_host_memory_or_back_leaves_nothing(when: str) -> None:
    pools = Pools(full=4)
    core = DecodeCore(pools, limits(growth_tokens=0))
    make_running(core, request("a", 500, max_tokens=14))
    make_running(core, request("b", 500, max_tokens=40))
    say(core, 11)
    core.next_batch(0.0)
    (save,) = [
        action
        for action in core.finish(0.0, drawn(*[Sampled(token_id=60, logprob=-1.0)] * 2))
        if isinstance(action, Save)
    ]
    if when == "saving":
        core.step(0.0, Cancel(B))
        assert core.step(0.0, Saved(save.run, NOTHING)) == []
    else:
        core.step(0.0, Saved(save.run, NOTHING))
        if when == "preempted":
            core.step(0.0, Cancel(B))
    core.next_batch(0.0)
    actions = core.finish(0.0, drawn(Sampled(token_id=60, logprob=-1.0)))
    if when == "restoring":
        assert any(isinstance(action, Restore) for action in actions)
        core.step(0.0, Cancel(B))
        assert core.step(0.0, Restored(B, 0)) == []
    assert pools.counts("free") == (4, 16, 4)
    assert core.load().host_bytes == 0


def test_a_new_request_finds_room_to_grow_behind_it_and_leaves_the_others_theirs() -> None:
    pools = Pools(full=6)
    core = DecodeCore(pools, limits(growth_tokens=256))
    make_running(core, request("a", 500, max_tokens=400))  # 2 pages, and 1 to grow
    core.step(0.0, Start(request("b", 500, max_tokens=400), SECRET))  # 2 pages, and 1 to grow
    assert pools.counts("used")[0] == 4
    core.step(0.0, Start(request("c", 10, max_tokens=4), SECRET))  # would need 1 more
    assert (pools.counts("used")[0], core.load().waiting) == (4, 1)


PROMPT_LENGTHS = st.integers(1, 900) | st.sampled_from([250, 255, 256, 500, 508, 511, 512, 767])
"""Often just before a page ends, so that answers soon need another."""


class AnyOrder(RuleBasedStateMachine):
    """Small pools; offers, reads, steps, cancels and faults in any order, also while a step runs and another is planned
    behind it: no page is lost, doubled or kept, and none that a step may write is given away.
    """

    prefix_cache = False
    drafts = 0

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools(full=5, swa=8, slots=4)
        some = limits(queue_timeout_s=5.0, offer_timeout_s=20.0, growth_tokens=0, host_memory_bytes=120)
        self.core = DecodeCore(self.pools, replace(some, prefix_cache=self.prefix_cache, draft_tokens=self.drafts))
        self.now = 0.0
        self.attempt = 0
        self.live: dict[AttemptId, StartRequest] = {}
        self.claims: dict[AttemptId, int] = {}  # next offer of each open claim
        self.jobs: dict[str, ReadJob] = {}
        self.unsettled: list[Place] = []
        self.tokens: dict[AttemptId, int] = {}
        self.flights: deque[list[Segment]] = deque()
        self.chain = Chain(EOS)
        self.saved: dict[AttemptId, HostPages] = {}
        self.resident: dict[AttemptId, int] = {}
        self.known: set[bytes] = set()  # as a listener to the events believes

    def see(self, actions: list[DecodeAction]) -> None:
        for action in actions:
            match action:
                case OpenClaim(run, _, from_token):
                    assert run in self.live
                    assert from_token % 256 == 0
                    assert from_token < len(self.live[run].prompt)
                    self.claims[run] = 0
                    self.resident[run] = from_token // 256
                case CloseClaim(run):
                    del self.claims[run]
                case SubmitRead(job):
                    self.jobs[job.job_id] = job
                case CancelRead(job_id):
                    assert job_id in self.jobs
                case PrefixesChanged(events):
                    for event in events:
                        if isinstance(event, Stored):
                            assert not self.known.intersection(event.digests)
                            self.known.update(event.digests)
                        else:
                            assert self.known.issuperset(event.digests)
                            self.known.difference_update(event.digests)
                case Save(run, items):
                    assert run in self.live
                    assert not self.flights, "nobody moves while a step may write his pages"
                    self.saved[run] = HostPages({}, {})
                    self.answer(Saved(run, self.saved[run]), items)
                case Restore(run, items, pages):
                    assert run in self.live
                    assert pages is self.saved.pop(run)
                    self.answer(Restored(run, 0), items)
                case Emit(run, Tokens(tokens=tokens)):
                    for token in tokens:
                        assert token.index == self.tokens.get(run, 0)
                        self.tokens[run] = token.index + 1
                case Emit(run, Finished(completion_tokens=count)):
                    assert self.tokens[run] == count <= self.live.pop(run).sampling.max_tokens
                case Emit(run, Failed()):
                    del self.live[run]

    def answer(self, event: Saved | Restored, items: dict[PageClass, list[int]]) -> None:
        """The copy is made while its items are in use."""
        for allocator, cls in ((self.pools.full, PageClass.FULL), (self.pools.swa, PageClass.SWA)):
            before = {item: allocator.generation(item) for item in items[cls]}
            assert len(before) == len(items[cls])
            assert not set(allocator._free) & set(before)
        self.see(self.core.step(self.now, event))

    @rule(name=st.sampled_from("abcd"), n=PROMPT_LENGTHS, max_tokens=st.integers(1, 300), fork=st.integers(0, 4))
    def start(self, name: str, n: int, max_tokens: int, fork: int) -> None:
        self.attempt += 1
        req = request(name, n, self.attempt, max_tokens=max_tokens)
        # One prompt begins like another up to a fork; some namespaces are closed to each other.
        prompt = tuple(id if at < 200 * fork else id + 1 for at, id in enumerate(req.prompt))
        req = replace(req, prompt=prompt, namespace=b"ns" if fork == 3 else b"")
        self.live[AttemptId(name, self.attempt)] = req
        self.see(self.core.step(self.now, Start(req, SECRET)))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), fault=st.sampled_from(["none"] * 8 + ["gap", "foreign"]))
    def offer(self, data: st.DataObject, fault: str) -> None:
        self.next_offer(data.draw(st.sampled_from(sorted(self.claims))), fault)

    def next_offer(self, run: AttemptId, fault: str = "none") -> None:
        seq, n = self.claims[run], len(self.live[run].prompt)
        self.claims[run] += 1
        pages = full_pages(n)[self.resident[run] :]
        if seq == 0:
            offer = meeting()
        elif seq == 1:
            offer = PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, pages),))
        else:
            offer = last_offer(n, seq, everything(n)[1:], total=needed(n) - self.resident[run])
        if fault == "gap":
            offer = replace(offer, seq=offer.seq + 1)
        elif fault == "foreign":
            offer = replace(offer, claim_id="other", owner=replace(CARD, epoch=99))
        self.see(self.core.step(self.now, OfferArrived(run, offer)))

    @rule(name=st.sampled_from("abcd"), n=st.sampled_from([250, 255, 500, 508, 511]), fork=st.integers(0, 2))
    def come_in(self, name: str, n: int, fork: int) -> None:
        """Everything goes well until the request runs, and it has a lot to say."""
        self.start(name, n, 500, fork)
        self.all_arrives(AttemptId(name, self.attempt))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def one_arrives(self, data: st.DataObject) -> None:
        self.all_arrives(data.draw(st.sampled_from(sorted(self.claims))))

    def all_arrives(self, run: AttemptId) -> None:
        while self.claims.get(run, 3) < 3:
            self.next_offer(run)
        for job_id in [id for id in self.jobs if id.startswith(f"{run}/")]:
            del self.jobs[job_id]
            self.see(self.core.step(self.now, landed(job_id)))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def claim_ends(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(sorted(self.claims)))
        self.see(self.core.step(self.now, ClaimEnded(run, WorkerLost("test"))))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), ending=st.sampled_from(["ok", "ok", "ok", "failed", "unsettled"]))
    def read_ends(self, data: st.DataObject, ending: str) -> None:
        job = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        places = [(cls, item) for cls, items in job.local.items() for item in items.values()]
        stuck = tuple(places[::2]) if ending == "unsettled" else ()
        self.unsettled += stuck
        self.see(self.core.step(self.now, landed(job.job_id, ok=ending == "ok", unsettled=stuck)))

    @precondition(lambda self: self.unsettled)
    @rule(keep=st.booleans())
    def settle(self, keep: bool) -> None:
        now, self.unsettled = (self.unsettled[:1], self.unsettled[1:]) if keep else (self.unsettled, [])
        self.see(self.core.step(self.now, Settled(tuple(now))))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[run]
        self.see(self.core.step(self.now, Cancel(run)))

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def plan(self) -> None:
        batch = self.core.next_batch(self.now)
        assert not self.core.is_outdated()
        if batch:
            self.flights.append(batch)
        for segment in batch:
            assert segment.sequence.pages[segment.start // 256]

    @precondition(lambda self: self.flights)
    @rule(token=st.sampled_from([60, 60, 60, 60, 60, EOS, -1]), keep=st.integers(0, 3))
    def finish(self, token: int, keep: int) -> None:
        """Every request draws the same, and as many more as it has drafts to keep, up to `keep`."""
        bound = self.chain.bind(self.flights.popleft())
        for segment in bound:
            if segment is not None:
                last, first = (segment.start + len(segment.tokens) - 1) // 256, max(0, segment.start - 127) // 256
                assert segment.sequence.pages[last]
                assert all(segment.sequence.swa_pages[first : last + 1])
        one = Sampled(token_id=token, logprob=0.0, ok=token >= 0)
        results = [
            Drawn() if s is None else Drawn((one,) * (1 + min(keep, s.drafts)), (60,) * s.guesses, s.drafts)
            for s in bound
        ]
        self.chain.drawn(bound, results)
        self.see(self.core.finish(self.now, results))

    @rule(steps=st.integers(2, 20), ahead=st.booleans(), keep=st.integers(0, 3))
    def run_on(self, steps: int, ahead: bool, keep: int) -> None:
        for _ in range(steps):
            while len(self.flights) < 1 + ahead:
                before = len(self.flights)
                self.plan()
                if len(self.flights) == before:
                    break
            if self.flights:
                self.finish(60, keep)

    @precondition(lambda self: len(self.flights) == 2)
    @rule()
    def take_back(self) -> None:
        self.flights.pop()
        self.core.take_back()

    @precondition(lambda self: self.flights)
    @rule()
    def crash(self) -> None:
        if len(self.flights) == 2:
            self.take_back()
        self.flights.clear()
        self.see(self.core.step(self.now, StepFailed("test")))

    @rule()
    def wait(self) -> None:
        self.now += 3.0
        self.see(self.core.step(self.now, Tick()))
        deadline = self.core.next_deadline()
        assert deadline is None or deadline > self.now

    @invariant()
    def every_page_has_one_owner(self) -> None:
        """Free, quarantined, the tree's, or one request's: nothing else, and never two of them."""
        inside = self.core._admission._inside.values()
        cache = self.core._admission.cache
        private = [item for one in inside for item in one.sequence.pages[one.lease.pages :]]
        windows = [item for one in inside for item in one.sequence.swa_pages if item]
        cache.check({PageClass.FULL: private, PageClass.SWA: windows})
        counts = cache.counts(PageClass.FULL)
        owned = counts.evictable + counts.protected + len(private)
        assert counts.free + counts.quarantined + owned == self.pools.full.capacity
        assert self.pools.slots.counts().used == len(inside)
        for segment in [segment for flight in self.flights for segment in flight]:
            assert any(one.sequence is segment.sequence for one in inside)
        for one in inside:
            assert one.lease.items() == one.sequence.pages[: one.lease.pages]
        assert {digest for _, digest in cache.digests()} == self.known

    def teardown(self) -> None:
        if self.flights:
            self.crash()
        for run in sorted(self.live):
            self.see(self.core.step(self.now, Cancel(run)))
        assert not self.claims
        cached = self.core.load().pages[PageClass.FULL].evictable
        assert self.pools.counts("used") == (cached, 0, 0)
        for job_id in sorted(self.jobs):
            self.core.step(self.now, landed(job_id))
        self.core.step(self.now, Settled(tuple(self.unsettled)))
        assert self.pools.counts("free") == (5 - cached, 8, 4)
        load = self.core.load()
        assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)


class AnyOrderSharing(AnyOrder):
    """The same while prompts and answers stay, are shared, and give way."""

    prefix_cache = True
    drafts = 3


TestAnyOrderSharing = AnyOrderSharing.TestCase
TestAnyOrderSharing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestAnyOrderSharingForLong(AnyOrderSharing.TestCase):
    settings = settings(max_examples=5000, stateful_step_count=200, deadline=None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
