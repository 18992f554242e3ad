"""The prefill core, driven by events and by results that a model could have returned."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batch import Sampled, Segment
from engine.cache.pools import PageAllocator
from engine.loop import StepFailed, Tick
from prefill_worker.scheduler import (
    Crowded,
    Drop,
    Ended,
    Offered,
    PrefillAction,
    PrefillLimits,
    PrefixesChanged,
    Progressed,
    Submit,
)
from tests.books import CheckedPrefill as PrefillCore
from wire.errors import ConfigError
from wire.types import (
    AttemptId,
    Failed,
    PageClass,
    PageGroup,
    Progress,
    Region,
    RegionClass,
    RunFinished,
    RunRequest,
    SamplingParams,
)

TOKEN = Sampled(token_id=42, logprob=-0.5, top=((42, -0.5),))


class Pools:
    """Allocators, and for checksums a function of class and item that a test can predict."""

    def __init__(self, full: int = 32, swa: int = 16, slots: int = 4, stateful: bool = True) -> None:
        self.full, self.swa, self.slots = (
            PageAllocator(full + 1),
            PageAllocator(swa + 1),
            PageAllocator(slots + 1),
        )
        self.classes = tuple(
            RegionClass(name=cls, regions=(Region(name="r", address=0, item_bytes=8, num_items=n),) if here else ())
            for cls, n, here in (
                (PageClass.FULL, full + 1, True),
                (PageClass.SWA, swa + 1, True),
                (PageClass.STATE, 2 * (slots + 1), stateful),
            )
        )

    def export_pages(self, page_class: PageClass, items: Items[int]) -> list[int]:
        return [checksum(page_class, item) for item in items]


def checksum(page_class: PageClass, item: int) -> int:
    return 1000 * list(PageClass).index(page_class) + item


def limits(**changes: float) -> PrefillLimits:
    values = {
        "chunk_tokens": 512,
        "max_batch_tokens": 1024,
        "max_context": 8192,
        "vocab_size": 1000,
        **changes,
    }
    return PrefillLimits(**values)  # type: ignore[arg-type]


def request(name: str, num_tokens: int, skip: int = 0, attempt: int = 1, fork: int = 0) -> RunRequest:
    """Every name has tokens of its own; of a forked one's prompt all others' forked prompts share the beginning."""
    return RunRequest(
        request_id=name,
        attempt=attempt,
        prompt=tuple((i if i < fork else ord(name) + i) % 1000 for i in range(num_tokens)),
        sampling=SamplingParams(max_tokens=4, seed=0),
        skip=skip,
        secret=b"s" * 16,
    )


def answer(batch: list[Segment], result: Sampled = TOKEN) -> list[Sampled | None]:
    return [result if segment.sample else None for segment in batch]


def spans(batch: list[Segment]) -> list[tuple[str, int, int]]:
    return [(s.sequence.request_id, s.start, s.start + len(s.tokens)) for s in batch]


def told(actions: list[PrefillAction]) -> list[PrefillAction]:
    """Without what is said about the cache and the room in it."""
    return [action for action in actions if not isinstance(action, PrefixesChanged | Crowded)]


def test_a_later_attempt_takes_over_what_an_earlier_one_has_computed() -> None:
    """Nothing is computed, the first token is the same, and the checksums are those of the first offer."""
    pools = Pools()
    core = PrefillCore(pools, limits())
    core.step(0.0, Submit(request("a", 600)))
    offered: list[PrefillAction] = []
    while batch := core.next_batch(0.0):
        offered += core.finish(0.0, answer(batch))
    first = [action for action in offered if isinstance(action, Offered)]
    again = told(core.step(0.0, Submit(request("a", 600, skip=256, attempt=2))))
    run = AttemptId("a", 2)
    progressed, offer, ended = again
    assert progressed == Progressed(run, Progress(done=600, total=600, cached=600))
    assert ended == Ended(run, RunFinished(prompt_tokens=600, cached_tokens=600))
    assert isinstance(offer, Offered)

    def pages(groups: Items[PageGroup]) -> set[tuple[PageClass, int, int, int]]:
        return {
            (group.page_class, *page)
            for group in groups
            for page in zip(group.positions, group.items, group.checksums, strict=True)
        }

    before = {page for action in first for page in pages(action.groups)}
    found = pages(offer.groups)
    assert found == {page for page in before if (page[0], page[1]) != (PageClass.FULL, 0)}
    assert offer.tail is not None
    assert first[-1].tail is not None
    assert offer.tail.first == first[-1].tail.first
    assert offer.tail.total_pages == len(found)
    core.step(0.0, Drop(AttemptId("a", 1)))  # overtaken: it holds nothing any more
    assert held(core)[0] == 3
    core.step(0.0, Drop(run))
    assert held(core) == (0, 0, 0)


def test_a_prompt_that_finds_no_room_says_so() -> None:
    core = PrefillCore(Pools(full=4), limits())
    core.step(0.0, Submit(request("a", 700)))
    while batch := core.next_batch(0.0):
        core.finish(0.0, answer(batch))
    assert Crowded() in core.step(0.0, Submit(request("b", 700)))
    assert Crowded() not in core.step(0.0, Drop(AttemptId("a", 1)))


def held(core: PrefillCore) -> tuple[int, ...]:
    """Items of each pool that somebody holds: all in use, except prefixes that are only kept."""
    return tuple(counts.used - counts.evictable for counts in core.load().pages.values())


def run_to_end(core: PrefillCore) -> list[PrefillAction]:
    actions: list[PrefillAction] = []
    while batch := core.next_batch(0.0):
        actions += core.finish(0.0, answer(batch))
    return actions


def groups(actions: list[PrefillAction]) -> list[PageGroup]:
    return [group for action in actions if isinstance(action, Offered) for group in action.groups]


def positions(actions: list[PrefillAction], page_class: PageClass) -> list[int]:
    return [j for group in groups(actions) if group.page_class is page_class for j in group.positions]


A, B = AttemptId("a", 1), AttemptId("b", 1)


def test_a_prompt_is_computed_in_chunks_and_its_pages_offered_as_they_finish() -> None:
    pools = Pools()
    core = PrefillCore(pools, limits())
    assert core.step(0.0, Submit(request("a", 1100))) == [Progressed(A, Progress(done=0, total=1100, cached=0))]

    batch = core.next_batch(0.0)
    assert spans(batch) == [("a", 0, 512)]
    assert not batch[0].sample
    assert batch[0].tokens == [(97 + i) % 1000 for i in range(512)]
    pages = batch[0].sequence.pages
    assert told(core.finish(0.0, answer(batch))) == [
        Progressed(A, Progress(done=512, total=1100, cached=0)),
        Offered(
            A,
            (
                PageGroup(
                    page_class=PageClass.FULL,
                    positions=(0, 1),
                    items=tuple(pages[:2]),
                    generations=(0, 0),
                    checksums=tuple(checksum(PageClass.FULL, item) for item in pages[:2]),
                ),
            ),
            None,
        ),
    ]
    batch = core.next_batch(0.0)
    assert spans(batch) == [("a", 512, 1024)]
    core.finish(0.0, answer(batch))
    batch = core.next_batch(0.0)
    assert spans(batch) == [("a", 1024, 1100)]
    assert batch[0].sample
    progressed, offered, ended = told(core.finish(0.0, answer(batch)))
    assert progressed == Progressed(A, Progress(done=1100, total=1100, cached=0))
    assert isinstance(offered, Offered)
    assert [(group.page_class, group.positions) for group in offered.groups] == [
        (PageClass.FULL, (4,)),  # the ragged page
        (PageClass.SWA, (3, 4)),  # tokens 972..1099
        (PageClass.STATE, (4,)),  # 76 raw rows of the block from 1024 on
    ]
    sequence = batch[0].sequence
    assert offered.groups[2].items == (2 * sequence.slot + 0,)
    assert offered.tail is not None
    assert offered.tail.total_pages == 5 + 2 + 1
    assert (offered.tail.first.index, offered.tail.first.token_id, offered.tail.first.logprob) == (
        0,
        42,
        -0.5,
    )
    assert ended == Ended(A, RunFinished(prompt_tokens=1100, cached_tokens=0))


@pytest.mark.parametrize(
    ("n", "full", "swa", "state"),
    [
        (1, [0], [0], [0]),
        (128, [0], [0], []),
        (255, [0], [0], [0]),
        (256, [0], [0], []),
        (257, [0, 1], [0, 1], [1]),
        (383, [0, 1], [0, 1], [1]),
        (384, [0, 1], [1], []),
        (512, [0, 1], [1], []),
        (513, [0, 1, 2], [1, 2], [2]),
        (640, [0, 1, 2], [2], []),
    ],
)
def test_every_page_a_reader_needs_is_offered_exactly_once(
    n: int, full: list[int], swa: list[int], state: list[int]
) -> None:
    core = PrefillCore(Pools(), limits(chunk_tokens=200))
    core.step(0.0, Submit(request("a", n)))
    actions = run_to_end(core)
    assert positions(actions, PageClass.FULL) == full
    assert positions(actions, PageClass.SWA) == swa
    assert positions(actions, PageClass.STATE) == state
    tails = [action.tail for action in actions if isinstance(action, Offered) and action.tail is not None]
    assert [tail.total_pages for tail in tails] == [len(full) + len(swa) + len(state)]


def test_an_open_block_in_the_second_half_of_the_ring_is_the_slots_second_item() -> None:
    core = PrefillCore(Pools(), limits())
    core.step(0.0, Submit(request("a", 200)))
    batch = core.next_batch(0.0)
    (state,) = [g for g in groups(core.finish(0.0, answer(batch))) if g.page_class is PageClass.STATE]
    assert state.items == (2 * batch[0].sequence.slot + 1,)


def test_a_model_without_c128_layers_offers_no_state() -> None:
    core = PrefillCore(Pools(stateful=False), limits())
    core.step(0.0, Submit(request("a", 200)))
    assert [g.page_class for g in groups(run_to_end(core))] == [PageClass.FULL, PageClass.SWA]


def test_skipped_pages_are_computed_but_not_offered_and_the_window_always_is() -> None:
    core = PrefillCore(Pools(), limits())
    core.step(0.0, Submit(request("a", 1100, skip=1024)))
    actions = run_to_end(core)
    assert positions(actions, PageClass.FULL) == [4]
    assert positions(actions, PageClass.SWA) == [3, 4]
    assert [a.progress.done for a in actions if isinstance(a, Progressed)] == [512, 1024, 1100]


def test_chunks_end_on_pages_also_when_the_budget_does_not() -> None:
    core = PrefillCore(Pools(), limits(chunk_tokens=600, max_batch_tokens=600))
    core.step(0.0, Submit(request("a", 1300)))
    seen = []
    while batch := core.next_batch(0.0):
        seen += spans(batch)
        core.finish(0.0, answer(batch))
    assert seen == [("a", 0, 512), ("a", 512, 1024), ("a", 1024, 1300)]


def test_a_short_prompt_behind_a_long_one_takes_part_in_the_next_step() -> None:
    core = PrefillCore(Pools(), limits(max_batch_tokens=512))
    core.step(0.0, Submit(request("a", 4000)))
    seen = []
    for _ in range(3):
        batch = core.next_batch(0.0)
        if not seen:
            core.step(0.0, Submit(request("b", 10)))
        seen.append(spans(batch))
        core.finish(0.0, answer(batch))
    assert seen == [[("a", 0, 512)], [("b", 0, 10), ("a", 512, 768)], [("a", 768, 1280)]]


def test_a_short_prompt_waits_for_two_chunks_of_long_ones_at_most_and_they_go_on() -> None:
    core = PrefillCore(Pools(full=128, swa=64, slots=8), limits(max_batch_tokens=512))
    for name in "abcde":
        core.step(0.0, Submit(request(name, 5000)))
    core.finish(0.0, answer(core.next_batch(0.0)))
    core.step(0.0, Submit(request("f", 2048)))
    chunks: dict[str, list[int]] = {name: [] for name in "abcdef"}
    for step in range(32):
        batch = core.next_batch(0.0)
        for name, _, _ in spans(batch):
            chunks[name].append(step)
        core.finish(0.0, answer(batch))
    assert chunks["f"][0] <= 1
    waits = [later - earlier for earlier, later in zip(chunks["f"], chunks["f"][1:], strict=False)]
    assert max(waits) <= 3, "two chunks of others in between"
    assert all(len(chunks[name]) >= 3 for name in "abcde"), "nobody is put off for ever"


def test_a_short_prompt_beside_a_deep_one_waits_for_one_step_of_half_a_second_and_then_goes_on_alone() -> None:
    core = PrefillCore(Pools(full=512, swa=64, slots=8), limits(max_context=100_000))
    core.step(0.0, Submit(request("a", 100_000)))
    now = 0.0

    def step() -> list[str]:
        """Names of those who took part. A token costs 50 us, and another 50 us for each 1,000 in front of it."""
        nonlocal now
        batch = core.next_batch(now)
        now += sum(len(segment.tokens) * (50e-6 + segment.start * 50e-9) for segment in batch)
        core.finish(now, answer(batch))
        return [segment.sequence.request_id for segment in batch]

    def depth() -> int:
        """Of the long one, while it is alone."""
        return 100_000 - core.load().queued_tokens

    while depth() < 70_000:
        before = now
        step()
        assert now - before <= 0.6, "what the last steps took tells how long the next one may be"
    core.step(now, Submit(request("b", 2048)))
    came = now
    names = [step() for _ in range(5)]
    assert sorted(map(tuple, names)) == [("a",), *[("b",)] * 4], "one step of the long one's at most"
    assert now - came <= 0.6 + 2048 * 160e-6
    assert core.load().running == 1
    assert core.load().queued_depth == depth(), "who comes next is told how deep it is"
    # One short prompt behind another: the long one still gets nearly half of the time.
    came, deep = now, depth()
    for number in range(30):
        name = chr(ord("c") + number)
        core.step(now, Submit(request(name, 2048)))
        while core.load().running > 1:
            step()
        core.step(now, Drop(AttemptId(name, 1)))
    assert depth() - deep >= 0.4 * (now - came) / (50e-6 + depth() * 50e-9)


def test_a_worker_that_stood_still_in_a_step_puts_its_long_prompt_off_no_longer_than_ever() -> None:
    core = PrefillCore(Pools(full=128, swa=64, slots=8), limits())
    core.step(0.0, Submit(request("a", 8_000)))
    core.finish(100.0, answer(core.next_batch(0.0)))  # frozen, and thawed
    now, names = 100.0, []
    for number in range(20):
        name = chr(ord("b") + number)
        core.step(now, Submit(request(name, 512)))  # one short prompt behind another
        batch = core.next_batch(now)
        now += 0.125
        core.finish(now, answer(batch))
        names.append({segment.sequence.request_id for segment in batch})
        if name in names[-1]:
            core.step(now, Drop(AttemptId(name, 1)))
        if "a" in names[-1]:
            break
    assert now - 100.0 <= 0.5 + 0.125, names


def test_several_prompts_share_a_step_up_to_its_budget() -> None:
    core = PrefillCore(Pools(), limits(chunk_tokens=256, max_batch_tokens=600))
    for name in "abc":
        core.step(0.0, Submit(request(name, 300)))
    assert spans(core.next_batch(0.0)) == [("a", 0, 256), ("b", 0, 256), ("c", 0, 88)]


def test_window_pages_are_released_behind_the_window_while_a_long_prompt_is_computed() -> None:
    pools = Pools(full=32, swa=4)
    core = PrefillCore(pools, limits())
    core.step(0.0, Submit(request("a", 8000)))
    most = 0
    while batch := core.next_batch(0.0):
        most = max(most, held(core)[1])
        core.finish(0.0, answer(batch))
    assert most == 3  # one page of window, two of chunk
    assert held(core)[1] == 2  # tokens 7872..7999 wait for their reader


def test_pages_are_held_until_dropped_and_all_come_back() -> None:
    pools = Pools()
    core = PrefillCore(pools, limits())
    core.step(0.0, Submit(request("a", 1100)))
    run_to_end(core)
    assert held(core) == (5, 2, 1)
    assert core.step(1.0, Drop(A)) == []
    assert held(core) == (0, 0, 0)
    assert core.step(1.0, Drop(A)) == []
    assert core.load().queued_tokens == 0


def test_dropping_a_run_between_chunks_stops_it_and_lets_the_next_one_in() -> None:
    pools = Pools(full=5)
    core = PrefillCore(pools, limits())
    core.step(0.0, Submit(request("a", 1100)))
    assert core.step(0.0, Submit(request("b", 300))) == []  # no pages left
    core.finish(0.0, answer(core.next_batch(0.0)))
    assert core.step(0.0, Drop(A)) == [Progressed(B, Progress(done=0, total=300, cached=0))]
    assert spans(core.next_batch(0.0)) == [("b", 0, 300)]
    assert core.load().queued_tokens == 300


def test_pages_offered_again_after_reuse_have_a_new_generation() -> None:
    pools = Pools(full=1)
    core = PrefillCore(pools, limits())
    for attempt in (1, 2):
        core.step(0.0, Submit(request("a", 100, attempt=attempt)))
        (full,) = [g for g in groups(run_to_end(core)) if g.page_class is PageClass.FULL]
        assert (full.items, full.generations) == ((1,), (attempt - 1,))
        core.step(0.0, Drop(AttemptId("a", attempt)))


def test_a_result_that_is_not_finite_fails_that_run_alone_and_keeps_its_pages_for_the_claim_table() -> None:
    pools = Pools()
    core = PrefillCore(pools, limits())
    core.step(0.0, Submit(request("a", 100)))
    core.step(0.0, Submit(request("b", 100)))
    batch = core.next_batch(0.0)
    nan = Sampled(token_id=0, logprob=0.0, ok=False)
    ended = {a.run: a.outcome for a in core.finish(0.0, [nan, TOKEN]) if isinstance(a, Ended)}
    assert spans(batch) == [("a", 0, 100), ("b", 0, 100)]
    failed = ended[A]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("numerical_error", True)
    assert ended[B] == RunFinished(prompt_tokens=100, cached_tokens=0)
    assert held(core) == (2, 2, 2)
    core.step(0.0, Drop(A))
    core.step(0.0, Drop(B))
    assert held(core) == (0, 0, 0)


def test_a_step_that_raised_fails_its_runs_and_no_others() -> None:
    core = PrefillCore(Pools(), limits(max_batch_tokens=100, chunk_tokens=100))
    core.step(0.0, Submit(request("a", 200)))
    core.next_batch(0.0)
    core.step(0.0, Submit(request("b", 50)))
    (ended,) = core.step(0.0, StepFailed("RuntimeError: boom"))
    assert isinstance(ended, Ended)
    assert ended.run == A
    assert isinstance(ended.outcome, Failed)
    assert (ended.outcome.code, ended.outcome.retryable) == ("worker_lost", True)
    assert spans(core.next_batch(0.0)) == [("b", 0, 50)]


def test_a_run_that_finds_no_room_is_refused_after_its_patience_and_takes_nothing() -> None:
    pools = Pools(full=2)
    core = PrefillCore(pools, limits(queue_timeout_s=60.0))
    core.step(0.0, Submit(request("a", 500)))
    core.step(5.0, Submit(request("b", 500)))
    assert core.next_deadline() == 65.0
    (ended,) = core.step(65.0, Tick())
    assert ended == Ended(
        B,
        Failed(
            code="overloaded",
            message="no room for a prompt of 500 tokens within 60 s; try again",
            retryable=True,
        ),
    )
    assert core.next_deadline() is None
    assert held(core) == (2, 0, 1)


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        (request("x", 0), "invalid_request", "empty"),
        (request("x", 9000), "invalid_request", "9000 tokens and the context is 8192"),
        (request("x", 8192), "invalid_request", "needs 32 pages and this worker has 8 in all"),
        (request("x", 600, skip=100), "invalid_request", "skip=100"),
        (request("x", 512, skip=512), "invalid_request", "skip=512"),
    ],
)
def test_a_run_that_can_never_be_done_is_refused_with_its_numbers(bad: RunRequest, code: str, words: str) -> None:
    core = PrefillCore(Pools(full=8), limits())
    (ended,) = core.step(0.0, Submit(bad))
    assert isinstance(ended, Ended)
    assert isinstance(ended.outcome, Failed)
    assert (ended.outcome.code, ended.outcome.retryable) == (code, False)
    assert words in ended.outcome.message


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    core = PrefillCore(Pools(), limits(vocab_size=5))
    (ended,) = core.step(0.0, Submit(request("x", 6)))
    assert isinstance(ended, Ended)
    assert isinstance(ended.outcome, Failed)
    assert "vocabulary of 5" in ended.outcome.message


def test_a_full_queue_refuses_at_once_and_may_be_tried_elsewhere() -> None:
    core = PrefillCore(Pools(full=1), limits(max_waiting=1))
    core.step(0.0, Submit(request("a", 10)))
    core.step(0.0, Submit(request("b", 10)))
    (ended,) = core.step(0.0, Submit(request("c", 10)))
    assert isinstance(ended, Ended)
    assert isinstance(ended.outcome, Failed)
    assert (ended.outcome.code, ended.outcome.retryable) == ("overloaded", True)


def test_a_chunk_that_the_window_pool_can_not_hold_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"a chunk of 1024 tokens needs 6 window pages and the pool has 4"):
        PrefillCore(Pools(swa=4), limits(chunk_tokens=1024))


def cached(actions: list[PrefillAction]) -> int:
    (tail,) = [action.tail for action in actions if isinstance(action, Offered) and action.tail is not None]
    return tail.cached_tokens


def finish_run(core: PrefillCore, run: RunRequest) -> list[PrefillAction]:
    actions = core.step(0.0, Submit(run)) + run_to_end(core)
    core.step(0.0, Drop(AttemptId(run.request_id, run.attempt)))
    return actions


def test_a_prompt_that_was_computed_before_starts_behind_its_last_page_and_offers_all_of_it_at_once() -> None:
    core = PrefillCore(Pools(), limits())
    first = finish_run(core, request("a", 1100))
    again = core.step(0.0, Submit(request("a", 1100, attempt=2)))
    run = AttemptId("a", 2)
    assert again[0] == Progressed(run, Progress(done=1024, total=1100, cached=1024))
    assert isinstance(again[1], Offered)
    assert positions(again, PageClass.FULL) == [0, 1, 2, 3]
    batch = core.next_batch(0.0)
    assert spans(batch) == [("a", 1024, 1100)]
    actions = core.finish(0.0, answer(batch))
    assert [positions(actions, cls) for cls in PageClass] == [[4], [3, 4], [4]]
    assert cached(actions) == 1024
    assert actions[-1] == Ended(run, RunFinished(prompt_tokens=1100, cached_tokens=1024))

    def items(seen: list[PrefillAction]) -> list[int]:
        return [item for g in groups(seen) if g.page_class is PageClass.FULL for item in g.items][:4]

    assert items(again) == items(first)


def test_a_follow_up_on_128k_computes_only_the_answer_before_it_and_what_is_new() -> None:
    core = PrefillCore(Pools(full=600), limits(max_context=1 << 18))
    prompt = request("a", 131_072).prompt
    finish_run(core, request("a", 131_072))
    follow_up = replace(request("a", 0, attempt=2), prompt=(*prompt, *[7] * 256, *[8] * 4096))
    core.step(0.0, Submit(follow_up))
    seen = []
    while batch := core.next_batch(0.0):
        seen += spans(batch)
        core.finish(0.0, answer(batch))
    assert (seen[0][1], seen[-1][2]) == (131_072, 131_072 + 256 + 4096)
    assert sum(end - start for _, start, end in seen) == 256 + 4096


def test_the_last_token_is_computed_even_of_a_prompt_that_is_cached_whole() -> None:
    core = PrefillCore(Pools(), limits())
    assert cached(finish_run(core, request("a", 512))) == 0
    assert cached(finish_run(core, request("a", 512, attempt=2))) == 256
    assert cached(finish_run(core, request("a", 513, attempt=3))) == 512
    core.cache.check({})


def test_equal_prompts_of_two_namespaces_share_nothing() -> None:
    core = PrefillCore(Pools(), limits())
    finish_run(core, request("a", 600))
    assert cached(finish_run(core, replace(request("a", 600, attempt=2), namespace=b"other"))) == 0
    assert cached(finish_run(core, replace(request("a", 600, attempt=3), namespace=b"other"))) == 512


def test_without_a_prefix_cache_every_prompt_is_computed_whole_and_nothing_is_kept() -> None:
    pools = Pools()
    core = PrefillCore(pools, limits(prefix_cache=False))
    for attempt in (1, 2):
        assert cached(finish_run(core, request("a", 1100, attempt=attempt))) == 0
    assert pools.full.counts().used == pools.swa.counts().used == 0


def test_a_prompt_behind_one_like_it_follows_instead_of_computing_the_same() -> None:
    core = PrefillCore(Pools(), limits(max_batch_tokens=512))
    core.step(0.0, Submit(request("a", 2000)))
    core.finish(0.0, answer(core.next_batch(0.0)))
    core.step(0.0, Submit(replace(request("a", 2000), request_id="b")))
    seen = []
    while batch := core.next_batch(0.0):
        seen += spans(batch)
        core.finish(0.0, answer(batch))
    ends = sorted(end for _, _, end in seen)
    assert ends == [1024, 1536, 2000, 2000], "what follows the last whole page is each one's own"


def test_a_lost_window_is_computed_again_and_its_compressed_rows_are_not() -> None:
    core = PrefillCore(Pools(), limits(num_layers=3))  # 512 tokens to compute again
    finish_run(core, request("a", 1600))
    assert core.cache.evict(PageClass.SWA, 16) > 0
    actions = core.step(0.0, Submit(request("a", 1700, attempt=2)))
    assert positions(actions, PageClass.FULL) == [0, 1, 2, 3, 4, 5]
    seen = []
    while batch := core.next_batch(0.0):
        seen += [(*span, segment.rebuild) for span, segment in zip(spans(batch), batch, strict=True)]
        actions += core.finish(0.0, answer(batch))
    assert seen == [("a", 1024, 1536, True), ("a", 1536, 1700, False)]
    assert cached(actions) == 1024
    core.step(0.0, Drop(AttemptId("a", 2)))
    assert cached(finish_run(core, request("a", 1800, attempt=3))) == 1536
    core.cache.check({})


def test_where_prompts_part_a_window_is_left_for_the_next_one_that_parts_there() -> None:
    core = PrefillCore(Pools(full=64, swa=32), limits(num_layers=3))
    finish_run(core, request("a", 3000, fork=1800))
    assert cached(finish_run(core, request("b", 3000, fork=1800))) == 1536  # behind the window where a chunk ended
    assert cached(finish_run(core, request("c", 3000, fork=1800))) == 1792


def test_rows_that_are_not_numbers_are_not_found_by_the_next_try() -> None:
    core = PrefillCore(Pools(), limits())
    core.step(0.0, Submit(request("a", 700)))
    core.finish(0.0, answer(core.next_batch(0.0)))
    core.finish(0.0, answer(core.next_batch(0.0), Sampled(token_id=0, logprob=0.0, ok=False)))
    assert held(core) == (3, 1, 1), "its reader may be reading them"
    core.step(0.0, Drop(A))
    assert cached(finish_run(core, request("a", 700, attempt=2))) == 0


def test_cached_prefixes_give_way_to_prompts_that_need_room() -> None:
    pools = Pools(full=8)
    core = PrefillCore(pools, limits())
    finish_run(core, request("a", 1800))
    assert pools.full.free == 1
    assert core.load().free_tokens == 8 * 256
    assert cached(finish_run(core, request("b", 1000))) == 0
    assert cached(finish_run(core, request("a", 1800, attempt=2))) > 0
    core.cache.check({})


def test_small_prompts_pass_a_large_one_that_has_no_room_but_not_for_ever() -> None:
    core = PrefillCore(Pools(full=8, slots=16), limits())
    core.step(0.0, Submit(request("a", 1000)))
    core.step(0.0, Submit(request("b", 2000)))
    passed = [attempt for attempt in range(1, 12) if told(finish_run(core, request("c", 10, attempt=attempt)))]
    assert passed == [1, 2, 3, 4, 5, 6, 7, 8]
    core.step(0.0, Submit(request("c", 10, attempt=12)))
    core.step(0.0, Drop(A))
    assert spans(core.next_batch(0.0)) == [("b", 0, 512)]


def test_a_chunk_is_as_long_as_half_a_second_lasts() -> None:
    core = PrefillCore(Pools(full=64), limits(step_s=0.5))
    core.step(0.0, Submit(request("a", 8000)))
    now, lengths = 0.0, []
    while batch := core.next_batch(now):
        (segment,) = batch
        lengths.append(len(segment.tokens))
        # Each token costs a millisecond, and another one for every 1,000 tokens before it.
        now += len(segment.tokens) * (1e-3 + segment.start * 1e-6)
        core.finish(now, answer(batch))
    assert lengths[0] == 512
    assert 32 <= lengths[-2] <= 128, "4,000 to 8,000 tokens deep a token takes 5 to 9 ms"
    assert sum(lengths) == 8000


NAMES = st.sampled_from("abcdef")


class AnyOrder(RuleBasedStateMachine):
    """Small pools, runs that come, end, fail and go in any order: no page is lost, doubled or kept."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools(full=6, swa=7, slots=3)
        self.core = PrefillCore(self.pools, limits(chunk_tokens=300, max_batch_tokens=400, queue_timeout_s=5.0))
        self.now = 0.0
        self.attempt = 0
        self.live: set[AttemptId] = set()
        self.batch: list[Segment] = []

    def see(self, actions: list[PrefillAction]) -> None:
        for action in actions:
            if isinstance(action, PrefixesChanged | Crowded):
                continue
            assert action.run in self.live
            if isinstance(action, Ended) and isinstance(action.outcome, Failed):
                self.see(self.core.step(self.now, Drop(action.run)))  # what the claim table does with a failed run

    @precondition(lambda self: not self.batch)
    @rule(name=NAMES, n=st.integers(1, 1200))
    def submit(self, name: str, n: int) -> None:
        self.attempt += 1
        self.live.add(AttemptId(name, self.attempt))
        # Some prompts begin alike and go on differently.
        self.see(self.core.step(self.now, Submit(request(name, n, attempt=self.attempt, fork=700 if n % 2 else 0))))

    @precondition(lambda self: not self.batch and self.live)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.see(self.core.step(self.now, Drop(data.draw(st.sampled_from(sorted(self.live))))))

    @precondition(lambda self: not self.batch)
    @rule()
    def plan(self) -> None:
        self.batch = self.core.next_batch(self.now)
        assert sum(len(segment.tokens) for segment in self.batch) <= 400
        for segment in self.batch:
            start, end = segment.start, segment.start + len(segment.tokens)
            first = max(0, start - 127) // 256
            needed = range(first, (end - 1) // 256 + 1)
            assert all(segment.sequence.swa_pages[j] for j in needed)
            assert all(segment.sequence.pages[j] for j in needed)

    @precondition(lambda self: self.batch)
    @rule(ok=st.booleans())
    def finish(self, ok: bool) -> None:
        batch, self.batch = self.batch, []
        self.see(self.core.finish(self.now, answer(batch, TOKEN if ok else Sampled(token_id=0, logprob=0.0, ok=False))))

    @precondition(lambda self: self.batch)
    @rule()
    def crash(self) -> None:
        self.batch = []
        self.see(self.core.step(self.now, StepFailed("test")))

    @precondition(lambda self: not self.batch)
    @rule()
    def wait(self) -> None:
        self.now += 3.0
        self.see(self.core.step(self.now, Tick()))
        deadline = self.core.next_deadline()
        assert deadline is None or deadline > self.now

    @invariant()
    def every_page_has_one_owner(self) -> None:
        private: dict[PageClass, list[int]] = {PageClass.FULL: [], PageClass.SWA: []}
        for run in self.core._runs.values():
            if run.sequence is not None:
                private[PageClass.FULL] += run.sequence.pages[run.lease.pages :]
                private[PageClass.SWA] += [run.sequence.swa_pages[j] for j in self.core._window.mapped(run.sequence)]
        self.core.cache.check(private)
        for allocator in (self.pools.full, self.pools.swa, self.pools.slots):
            counts = allocator.counts()
            assert counts.free + counts.used == allocator.capacity
            assert counts.quarantined == 0

    def teardown(self) -> None:
        if self.batch:
            self.crash()
        for run in sorted(self.live):
            self.see(self.core.step(self.now, Drop(run)))
        assert held(self.core) == (0, 0, 0)
        load = self.core.load()
        assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
