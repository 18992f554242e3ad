"""Prefixes that stay on a decode worker: found again, not fetched again, and the same to the bit."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import pytest

from decode_worker.scheduler import (
    Cancel,
    DecodeAction,
    Emit,
    OfferArrived,
    OpenClaim,
    PrefixesChanged,
    Start,
)
from engine.batch import Drawn, Sampled
from engine.cache.pools import PoolSizes, item_bytes
from engine.colocated import generate
from engine.config import KvLayout
from engine.loop import StepFailed
from kvtransfer.plan import item_bytes as bytes_of
from kvtransfer.plan import plan
from tests.books import CheckedDecode as DecodeCore
from tests.decode_worker.conftest import MakeRunner
from tests.decode_worker.oracle import OraclePools, answer, pair, pair_of, until
from tests.decode_worker.test_preemption import limits as real_limits
from tests.decode_worker.test_preemption import said
from tests.decode_worker.test_scheduler import (
    CARD,
    SECRET,
    A,
    B,
    Pools,
    decode_step,
    failure,
    full_pages,
    group,
    landed,
    last_offer,
    limits,
    meeting,
    needed,
    request,
    state_pages,
    submitted,
    window_pages,
)
from tests.decode_worker.test_service import prompt_of
from tests.decode_worker.test_service import request as ask
from wire.prefix import page_hashes
from wire.types import (
    Admitted,
    AttemptId,
    Fetching,
    Finished,
    PageClass,
    PageGroup,
    PageOffer,
    SamplingParams,
    StartRequest,
    Stored,
)

names = (f"reuse-{n}" for n in itertools.count())
C = AttemptId("c", 1)


def sharing(**changes: float) -> DecodeCore:
    return DecodeCore(Pools(**changes), limits(prefix_cache=True))  # type: ignore[arg-type]


def from_tokens(name: str, tokens: tuple[int, ...], **sampling: object) -> StartRequest:
    return replace(request(name, 1, **sampling), prompt=tokens)


def arrive(core: DecodeCore, req: StartRequest, first: int = 50) -> tuple[int, list[DecodeAction]]:
    """Start `req` and bring what it asks for; (tokens it found resident, actions of the moment it joins)."""
    run, n = AttemptId(req.request_id, req.attempt), len(req.prompt)
    (skip,) = [a.from_token for a in core.step(0.0, Start(req, SECRET)) if isinstance(a, OpenClaim)]
    core.step(0.0, OfferArrived(run, meeting()))
    pages = skip // 256
    groups: tuple[PageGroup, ...] = (group(PageClass.SWA, window_pages(n)),)
    groups += (group(PageClass.FULL, full_pages(n)[pages:]),)
    groups += (group(PageClass.STATE, state_pages(n)),) if state_pages(n) else ()
    offer = last_offer(n, 1, groups, first, total=needed(n) - pages)
    return skip, core.step(0.0, landed(submitted(core.step(0.0, OfferArrived(run, offer)))))


def say(core: DecodeCore, ids: list[int]) -> list[DecodeAction]:
    return [action for token in ids for action in decode_step(core, token)]


def resident(core: DecodeCore) -> int:
    """Pages of prefixes that nobody uses."""
    return core.load().pages[PageClass.FULL].evictable


PROMPT = request(num_tokens=500).prompt


def test_a_follow_up_fetches_only_what_neither_prompt_nor_answer_left_here() -> None:
    core = sharing()
    assert arrive(core, from_tokens("a", PROMPT, max_tokens=14))[0] == 0
    say(core, list(range(100, 113)))  # 500 + 13 tokens have been computed: two whole pages
    assert resident(core) == 2
    conversation = (*PROMPT, 50, *range(100, 113))
    follow_up = from_tokens("b", (*conversation, *range(200, 286)), max_tokens=4)
    actions = core.step(0.0, Start(follow_up, SECRET))
    assert actions[:3] == [
        Emit(B, Admitted(resident_prefix=512, secret=SECRET)),
        Emit(B, Fetching(pages=1 + 2 + 1)),  # of 600 tokens: page 2, the window over pages 1 and 2, the open rows
        OpenClaim(B, follow_up.source, 512, SECRET),
    ]
    core.step(0.0, OfferArrived(B, meeting()))
    again = PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [1]),))
    failed = failure(core.step(0.0, OfferArrived(B, again)))
    assert "full page 1 is offered twice or is none" in failed.message


def test_the_last_prompt_token_is_always_prefills_to_compute() -> None:
    core = sharing()
    prompt = PROMPT[:256] * 2
    arrive(core, from_tokens("a", prompt, max_tokens=1))
    assert resident(core) == 2
    assert arrive(core, from_tokens("b", prompt))[0] == 256
    assert arrive(core, from_tokens("c", (*prompt, 5)))[0] == 512


def test_requests_that_come_together_share_pages_as_soon_as_the_first_has_them() -> None:
    core = sharing()
    _, actions = arrive(core, from_tokens("a", PROMPT))
    (changed,) = [action for action in actions if isinstance(action, PrefixesChanged)]
    assert changed.events == (Stored(digests=tuple(page_hashes(PROMPT, b"")), parent=b""),)
    assert arrive(core, from_tokens("b", PROMPT))[0] == 256
    batch = core.next_batch(0.0)
    assert batch[0].sequence.pages[0] == batch[1].sequence.pages[0]
    assert batch[0].sequence.pages[1] != batch[1].sequence.pages[1]


def test_two_that_fetched_the_same_pages_keep_one_copy() -> None:
    core = sharing()
    for name in "ab":  # both admitted before either has anything
        core.step(0.0, Start(from_tokens(name, PROMPT), SECRET))
        core.step(0.0, OfferArrived(AttemptId(name, 1), meeting()))
    assert core.load().pages[PageClass.FULL].used == 4
    for run in (A, B):
        groups = (group(PageClass.FULL, [0, 1]), group(PageClass.SWA, [1]), group(PageClass.STATE, [1]))
        core.step(0.0, landed(submitted(core.step(0.0, OfferArrived(run, last_offer(500, 1, groups))))))
    assert core.load().pages[PageClass.FULL].used == 3
    one, two = (segment.sequence.pages for segment in core.next_batch(0.0))
    assert one[0] == two[0]


def test_a_namespace_sees_nothing_of_another() -> None:
    core = sharing()
    arrive(core, replace(from_tokens("a", PROMPT), namespace=b"one"))
    assert arrive(core, replace(from_tokens("b", PROMPT), namespace=b"two"))[0] == 0
    assert arrive(core, replace(from_tokens("c", PROMPT), namespace=b"one"))[0] == 256


def test_what_a_client_left_behind_in_mid_answer_stays_matchable() -> None:
    core = sharing()
    arrive(core, from_tokens("a", PROMPT, max_tokens=400))
    say(core, list(range(100, 113)))
    core.step(0.0, Cancel(A))
    assert resident(core) == 2
    assert core.load().pages[PageClass.FULL].used == 2


@pytest.mark.parametrize("fault", ["not finite", "the step raised"])
def test_an_answer_that_went_wrong_is_not_kept_and_its_prompt_only_if_its_rows_are_numbers(fault: str) -> None:
    core = sharing()
    arrive(core, from_tokens("a", PROMPT, max_tokens=400))
    say(core, list(range(100, 113)))
    core.next_batch(0.0)
    if fault == "not finite":
        core.finish(0.0, [Drawn((Sampled(token_id=0, logprob=0.0, ok=False),))])
    else:
        core.step(0.0, StepFailed("RuntimeError: boom"))
    kept = 0 if fault == "not finite" else 1  # of 500 tokens
    assert resident(core) == kept
    assert core.load().pages[PageClass.FULL].used == kept


def test_pages_of_an_unfinished_fetch_are_shown_to_nobody() -> None:
    core = sharing()
    core.step(0.0, Start(from_tokens("a", PROMPT), SECRET))
    core.step(0.0, OfferArrived(A, meeting()))
    offer = PageOffer(seq=1, claim_id="c", groups=(group(PageClass.FULL, [0]),))
    core.step(0.0, landed(submitted(core.step(0.0, OfferArrived(A, offer)))))
    assert arrive(core, from_tokens("b", PROMPT))[0] == 0
    core.step(0.0, Cancel(A))
    assert core.load().pages[PageClass.FULL].quarantined == 0


def test_prefixes_nobody_uses_give_way_and_those_in_use_do_not() -> None:
    core = sharing(full=6)
    other = tuple(id + 1 for id in PROMPT)
    arrive(core, from_tokens("a", (*PROMPT, *PROMPT), max_tokens=1))  # 3 whole pages stay
    arrive(core, from_tokens("b", other, max_tokens=400))
    assert resident(core) == 3
    third = tuple(id + 2 for id in PROMPT)
    assert arrive(core, from_tokens("c", third, max_tokens=12))[0] == 0  # evicts one of a's: the last
    assert resident(core) == 2
    say_both = [decode_step(core, 60, 60) for _ in range(11)]  # c ends with 511 tokens computed
    assert any(isinstance(a, Emit) and isinstance(a.event, Finished) for a in say_both[-1])
    assert resident(core) == 3
    assert core.load().free_tokens == 256 * 4


def flash_pools(pages: int) -> Pools:
    """Pools whose items have the bytes of DeepSeek-V4-Flash's."""
    from tests.engine.geometries import tiny_config

    ratios = (0, 0, *(4, 128) * 20, 4)
    flash = tiny_config(0, "flash", compress_ratios=ratios, head_dim=512, rope_dim=64, index_head_dim=128)
    sizes = item_bytes(flash, "v4")
    assert sizes[PageClass.FULL] == 998_208
    pools = Pools(full=pages)
    pools.classes = tuple(
        replace(cls, regions=tuple(replace(region, item_bytes=sizes[cls.name]) for region in cls.regions))
        for cls in pools.classes
    )
    return pools


def test_a_follow_up_of_4k_on_128k_moves_less_than_a_twelfth_of_the_cold_transfer() -> None:
    pools = flash_pools(pages=600)
    theirs = tuple(
        replace(cls, regions=tuple(replace(r, num_items=1000) for r in cls.regions)) for cls in pools.classes
    )
    core = DecodeCore(pools, limits(prefix_cache=True, max_context=1 << 18))

    def moved(req: StartRequest) -> int:
        run, n = AttemptId(req.request_id, 1), len(req.prompt)
        (skip,) = [a.from_token for a in core.step(0.0, Start(req, SECRET)) if isinstance(a, OpenClaim)]
        core.step(0.0, OfferArrived(run, replace(meeting(), owner=replace(CARD, classes=theirs))))
        groups = (group(PageClass.FULL, full_pages(n)[skip // 256 :], 1), group(PageClass.SWA, window_pages(n)))
        offer = last_offer(n, 1, groups, total=needed(n) - skip // 256)
        job = submitted(core.step(0.0, OfferArrived(run, offer)))
        core.step(0.0, landed(job))
        return sum(part.num_bytes for part in plan(job.groups, job.local, pools.classes, theirs))

    rng = random.Random(1)
    said_so_far = tuple(rng.randrange(2, 1000) for _ in range(130_816))
    cold = moved(from_tokens("a", said_so_far, max_tokens=257))
    answered = [rng.randrange(2, 1000) for _ in range(256)]
    say(core, answered)
    said_so_far = (*said_so_far, 50, *answered)
    follow_up = (*said_so_far, *(rng.randrange(2, 1000) for _ in range(135_168 - len(said_so_far))))
    warm = moved(from_tokens("b", follow_up, max_tokens=1))
    assert warm == 16 * 998_208 + sum(bytes_of(cls) for cls in pools.classes if cls.name is PageClass.SWA)
    assert warm <= 30_000_000
    assert warm <= 0.08 * cold
    assert cold > 510 * 998_208


async def test_a_conversation_goes_on_where_it_was_and_moves_only_what_is_new() -> None:
    async with pair(next(names)) as workers:
        text = prompt_of(2000)
        expected_hits = 0
        for turn in range(4):
            ids, events = await ask(workers, f"turn-{turn}", text, 200)
            assert ids == answer(text, 200)
            assert isinstance(events[0], Admitted)
            assert events[0].resident_prefix == expected_hits
            expected_hits = (len(text) + 199) // 256 * 256
            text = (*text, *ids, *prompt_of(90, seed=turn))
        await workers.settle()
        await until(lambda: workers.metric("penumbra_prefix_cache_hits_total") > 0)
        asked = [2000 + 290 * turn for turn in range(4)]
        assert workers.metric("penumbra_prefix_cache_queries_total") == sum(asked)
        hits = [(n - 91) // 256 * 256 for n in asked[1:]]
        assert workers.metric("penumbra_prefix_cache_hits_total") == sum(hits)


async def test_conversations_that_fork_overlap_and_break_off_answer_as_if_nothing_were_kept() -> None:
    """With pools a third of what they say, and an engine that notices every wrong byte."""
    rng = random.Random(11)
    async with pair(next(names), decode_pools=OraclePools(full=20, swa=12, slots=4)) as workers:
        opening = prompt_of(700)

        async def converse(name: str) -> None:
            text = opening[: rng.choice([256, 500, 700])]
            for turn in range(5):
                text = (*text, *prompt_of(rng.choice([1, 40, 256, 300]), seed=rng.randrange(3)))
                limit = rng.choice([None, None, None, 0.01, 0.05])
                try:
                    async with asyncio.timeout(limit):
                        ids, _ = await ask(workers, f"{name}-{turn}", text, n := rng.choice([5, 60, 257]))
                except TimeoutError:
                    continue
                assert ids == answer(text, n)
                text = (*text, *ids)

        await asyncio.gather(*(converse(f"c{i}") for i in range(8)))
        await workers.settle()
        await until(lambda: workers.metric("penumbra_prefix_cache_hits_total") > 0)


@pytest.mark.parametrize("layout", ["v4", "exact"])
async def test_a_real_model_answers_to_the_bit_as_it_would_with_nothing_kept(
    make_runner: MakeRunner, layout: KvLayout
) -> None:
    """Conversations that share their beginning, under a decode pool too small for them, some broken off."""
    roomy = PoolSizes(full=60, swa=32, slots=8)
    prefill, alone = make_runner(layout, roomy), make_runner(layout, roomy)
    decode = make_runner(layout, PoolSizes(full=11, swa=12, slots=5))
    rng = random.Random(7)
    opening = tuple(rng.randrange(3, 250) for _ in range(520))
    spoken: list[tuple[tuple[int, ...], SamplingParams, list[tuple[int, float]]]] = []
    async with pair_of(
        next(names), (prefill.pools, prefill), (decode.pools, decode), *real_limits(alone, growth_tokens=0)
    ) as workers:

        async def converse(name: str, leaves_at: int) -> None:
            text = opening
            for turn in range(3):
                text = (*text, *(rng.randrange(3, 250) for _ in range(rng.choice([3, 100, 250]))))
                n = rng.choice([4, 30])
                sampling = SamplingParams(max_tokens=n, seed=turn, temperature=0.9, ignore_eos=True)
                try:
                    async with asyncio.timeout(0.2 if turn == leaves_at else None):
                        _, events = await ask(workers, f"{name}-{turn}", text, sampling=sampling)
                except TimeoutError:
                    continue
                tokens = [(token.token_id, token.logprob) for token in said(events)]
                spoken.append((text, sampling, tokens))
                text = (*text, *(token_id for token_id, _ in tokens))

        await asyncio.gather(*(converse(f"c{i}", leaves_at=i) for i in range(4)))
        await workers.settle()
        await until(lambda: workers.metric("penumbra_prefix_cache_hits_total") >= 512)
    for text, sampling, tokens in spoken:
        reference = list(generate(alone, text, sampling))
        assert tokens == [(sampled.token_id, sampled.logprob) for sampled in reference]
