"""Drawing tokens: distribution, every option against its definition, reproducibility, logprobs, and logits that are
not numbers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.batch import Sampled
from engine.kernels.sample import CANDIDATES, History, Row, gumbel, sample
from wire.types import SamplingParams

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 2.0, -np.float32(3)], dtype=np.float32)
PROMPT = (3, 3, 1)
ANSWER = (0, 4, 4)
ENDS = (5,)

Options = dict[str, object]

FILTERS: dict[str, Options] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.7},
    "logit_bias": {"logit_bias": ((1, 1.5), (4, -100.0))},
    "min_tokens": {"min_tokens": 9},
    "filters": {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "everything": {
        "temperature": 1.3,
        "top_k": 5,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.2,
        "logit_bias": ((2, 1.0),),
        "min_tokens": 4,
    },
}


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1, "seed": 7} | changes))  # type: ignore[arg-type]


def draw(logits: np.ndarray, n: int, **changes: object) -> list[Sampled]:
    """The tokens of `n` positions that all have these logits."""
    options = params(**changes)
    return sample(np.broadcast_to(logits, (n, len(logits))), [Row(params=options, position=i) for i in range(n)])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def naive_scores(
    logits: np.ndarray,
    p: SamplingParams,
    prompt: tuple[int, ...] = (),
    answer: tuple[int, ...] = (),
    ends: tuple[int, ...] = (),
    mask: np.ndarray | None = None,
) -> list[float]:
    """Each option as its documentation words it, one token after another: scores whose softmax is drawn from."""
    x = [float(value) for value in logits]
    for t in range(len(x)):
        if t in prompt or t in answer:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * answer.count(t)
        x[t] -= p.presence_penalty * (t in answer)
        x[t] += sum(bias for token, bias in p.logit_bias if token == t)
        if (t in ends and len(answer) < p.min_tokens) or (mask is not None and not mask[t]):
            x[t] = -np.inf
    if p.temperature == 0:
        best = max(range(len(x)), key=lambda t: (x[t], -t))
        return [x[t] if t == best else -np.inf for t in range(len(x))]
    x = [value / p.temperature for value in x]
    ranked = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if p.top_k:
        ranked = ranked[: p.top_k]
    weight = {t: np.exp(x[t] - x[ranked[0]]) for t in ranked}
    nucleus, reached, total = [], 0.0, sum(weight.values())
    for t in ranked:
        if p.top_p >= 1 or reached < p.top_p * total:
            nucleus.append(t)
        reached += weight[t]
    kept = {t for t in nucleus if weight[t] >= p.min_p}
    return [x[t] if t in kept else -np.inf for t in range(len(x))]


def history(p: SamplingParams) -> History:
    made = History(PROMPT if p.repetition_penalty != 1 else ())
    made.push(ANSWER)
    return made


def chi_square_of(name: str, n: int) -> tuple[float, int]:
    """(statistic, degrees of freedom) of `n` draws with the option against its definition."""
    p = params(**FILTERS[name])
    past = history(p)
    rows = [Row(params=p, position=i, index=len(ANSWER), history=past, banned=ENDS) for i in range(n)]
    drawn = sample(np.broadcast_to(LOGITS, (n, len(LOGITS))), rows)
    seen = np.bincount([d.token_id for d in drawn], minlength=len(LOGITS))
    expected = n * softmax(np.array(naive_scores(LOGITS, p, PROMPT, ANSWER, ENDS)))
    possible = expected > 0
    assert not seen[~possible].any()
    return float(((seen - expected)[possible] ** 2 / expected[possible]).sum()), int(possible.sum()) - 1


def limit(freedom: int) -> float:
    """What a chi-square with that much freedom exceeds less than once in 10^5 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * np.sqrt(2 / (9 * freedom))) ** 3


def test_temperature_zero_takes_the_lowest_of_the_most_likely() -> None:
    assert draw(LOGITS, 1, temperature=0)[0].token_id == 0


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution_that_an_option_defines(name: str) -> None:
    statistic, freedom = chi_square_of(name, 10_000)
    assert freedom >= 1
    assert statistic < limit(freedom)


@pytest.mark.long
@pytest.mark.parametrize("name", FILTERS)
def test_many_draws_follow_the_distribution_that_an_option_defines(name: str, record_property) -> None:
    statistic, freedom = chi_square_of(name, 100_000)
    record_property("chi_square", f"{statistic:.1f}")
    record_property("freedom", freedom)
    assert statistic < limit(freedom)


def chi_square_of_pairs(name: str, n: int) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, share of drafts kept) of `n` pairs of neighbouring tokens that were verified as
    the engine does it: the first is drafted from other logits with its own noise, and where the draft was right the
    second comes of the same step, taking the draft as given; else of the next step.
    """
    p, size = params(**FILTERS[name]), len(LOGITS)
    past = history(p)
    wide = np.broadcast_to(LOGITS, (n, size))

    def rows(place: int, histories: list[History], drafts: list[tuple[int, ...]]) -> list[Row]:
        index = len(ANSWER) + place
        return [
            Row(params=p, position=2 * i + place, index=index, history=h, drafts=d, banned=ENDS)
            for i, (h, d) in enumerate(zip(histories, drafts, strict=True))
        ]

    guessing = np.broadcast_to(LOGITS + np.array([0, 1, -1, 0.5, -1, 0], dtype=np.float32), (n, size))
    guesses = [d.token_id for d in sample(guessing, rows(0, [past] * n, [()] * n))]
    first = [d.token_id for d in sample(wide, rows(0, [past] * n, [()] * n))]
    behind_drafts = [d.token_id for d in sample(wide, rows(1, [past] * n, [(g,) for g in guesses]))]
    pushed = []
    for token in range(size):
        longer = history(p)
        longer.push([token])
        pushed.append(longer)
    behind_first = [d.token_id for d in sample(wide, rows(1, [pushed[t] for t in first], [()] * n))]
    kept = np.array(guesses) == np.array(first)
    second = np.where(kept, behind_drafts, behind_first)
    seen = np.bincount(np.array(first) * size + second, minlength=size * size)
    share = softmax(np.array(naive_scores(LOGITS, p, PROMPT, ANSWER, ENDS)))
    then = [softmax(np.array(naive_scores(LOGITS, p, PROMPT, (*ANSWER, t), ENDS))) for t in range(size)]
    expected = n * (share[:, None] * np.array(then)).reshape(-1)
    possible = expected > 0
    assert not seen[~possible].any()
    common = expected > 5  # rarer pairs are counted together
    cells = np.append(expected[common], expected[possible & ~common].sum())
    counted = np.append(seen[common], seen[possible & ~common].sum())
    cells, counted = cells[cells > 0], counted[cells > 0]
    return float(((counted - cells) ** 2 / cells).sum()), len(cells) - 1, float(kept.mean())


@pytest.mark.parametrize("name", ["temperature", "filters", "everything"])
def test_drafted_pairs_follow_the_distribution_that_an_option_defines(name: str) -> None:
    statistic, freedom, kept = chi_square_of_pairs(name, 5_000)
    assert statistic < limit(freedom)
    assert 0.1 < kept < 0.99


@pytest.mark.long
@pytest.mark.parametrize("name", FILTERS)
def test_many_drafted_pairs_follow_the_distribution_that_an_option_defines(name: str, record_property) -> None:
    statistic, freedom, kept = chi_square_of_pairs(name, 100_000)
    record_property("chi_square", f"{statistic:.1f}")
    record_property("freedom", freedom)
    record_property("drafts_kept", f"{kept:.2f}")
    assert statistic < limit(freedom)


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_each_draw_is_the_one_its_definition_gives(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = data.draw(st.sampled_from([3, 40, 3 * CANDIDATES]))
    logits = (rng.standard_normal((4, size)) * data.draw(st.sampled_from([0.1, 1.0, 8.0]))).round(1).astype(np.float32)
    rows, expected = [], []
    for i in range(4):
        p = params(
            seed=seed + i,
            choice=i % 2,
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 2, 30, CANDIDATES, 2 * CANDIDATES])),
            top_p=data.draw(st.sampled_from([1e-9, 0.3, 0.97, 1.0])),
            min_p=data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
            presence_penalty=data.draw(st.sampled_from([0.0, -1.0, 2.0])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.7])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 0.8, 1.5])),
            logit_bias=data.draw(st.sampled_from([(), ((0, 5.0), (2, -7.0)), ((1, 1.0), (1, 1.0))])),
            min_tokens=data.draw(st.sampled_from([0, 7])),
        )
        prompt = tuple(rng.integers(0, size, 5).tolist())
        answer = tuple(rng.integers(0, size, 5).tolist())
        mask = rng.random(size) < 0.5 if data.draw(st.booleans()) else None
        if mask is not None:
            mask[0] = True
        num_drafts = data.draw(st.integers(0, 3))
        past = History(prompt if p.repetition_penalty != 1 else ())
        past.push(answer[: 5 - num_drafts])
        rows.append(
            Row(
                params=p,
                position=90 + i,
                index=5,
                history=past,
                drafts=answer[5 - num_drafts :],
                banned=(1,),
                mask=mask,
            )
        )
        scores = np.array(naive_scores(logits[i], p, prompt, answer, (1,), mask))
        noise = gumbel([p.seed], [p.choice], [90 + i], np.arange(size))[0] if p.temperature else 0
        expected.append(int((scores + noise).argmax()))
    assert [d.token_id for d in sample(logits, rows)] == expected


def test_top_p_never_leaves_the_nucleus() -> None:
    order = np.argsort(-LOGITS, kind="stable")
    reach = np.cumsum(softmax(LOGITS)[order])
    nucleus = set(order[: int(np.searchsorted(reach, 0.8)) + 1].tolist())
    assert {d.token_id for d in draw(LOGITS, 2_000, top_p=0.8)} == nucleus


def test_a_tiny_top_p_is_greedy() -> None:
    assert {d.token_id for d in draw(LOGITS, 50, top_p=1e-9)} == {0}


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20), choice=st.integers(0, 7))
def test_noise_depends_on_seed_choice_position_and_token_alone(seed: int, position: int, choice: int) -> None:
    def noise(seed: int, choice: int, position: int, ids: NDArray[np.int64]) -> np.ndarray:
        return gumbel([seed], [choice], [position], ids)[0]

    ids = np.arange(64)
    once = noise(seed, choice, position, ids)
    assert np.isfinite(once).all()
    assert np.array_equal(once, noise(seed, choice, position, np.arange(256))[:64])
    assert np.array_equal(once[::-1], noise(seed, choice, position, ids[::-1]))
    for other in (
        noise(seed, choice, position + 1, ids),
        noise(seed, choice + 1, position, ids),
        noise(seed ^ 1, choice, position, ids),
    ):
        assert not np.array_equal(once, other)


def test_choices_of_one_seed_are_drawn_independently() -> None:
    n = 4_000
    first, second = (np.array([d.token_id for d in draw(LOGITS, n, choice=choice)]) for choice in (0, 1))
    alike = float((softmax(LOGITS) ** 2).sum())
    assert abs((first == second).mean() - alike) < 5 * np.sqrt(alike * (1 - alike) / n)


@pytest.mark.parametrize("size", [97, 5 * CANDIDATES])
def test_a_row_is_drawn_alike_alone_and_in_a_batch(size: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((22, size)).astype(np.float32)
    rows = []
    for i, options in enumerate([*FILTERS.values(), *FILTERS.values()]):
        p = dataclasses.replace(params(**options), seed=i, logprobs=i % 3 > 0, top_logprobs=5 * (i % 3))
        rows.append(Row(params=p, position=i, index=3, history=history(p), banned=ENDS))
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert sample(logits, rows) == alone
    assert sample(logits[::-1], rows[::-1]) == alone[::-1]


def test_drafts_count_as_tokens_of_the_answer_without_staying_in_it() -> None:
    p = params(temperature=0, frequency_penalty=1.0)
    past = History()
    past.push([0])

    def token(*drafts: int) -> int:
        row = Row(params=p, position=1, index=1 + len(drafts), history=past, drafts=drafts)
        return sample(LOGITS[None], [row])[0].token_id

    # 2, 1, 0, -1, 2, -3, less one for each time a token occurred.
    assert token() == 4
    assert token(4) == 0
    assert token(4, 4, 0) == 1
    assert token() == 4
    past.push([4])
    assert token() == 0


def test_history_counts_however_long_it_gets() -> None:
    rng = np.random.default_rng(1)
    prompt, answer, drafts = rng.integers(0, 500, 300), rng.integers(0, 500, 700), rng.integers(400, 600, 5)
    past = History(prompt)
    for token in answer:
        past.push([int(token)])
    ids, counts = past.counts(drafts.tolist())
    assert sorted(ids) == sorted({*prompt.tolist(), *answer.tolist(), *drafts.tolist()})
    expected = np.bincount(answer, minlength=600) + np.bincount(drafts, minlength=600)
    assert np.array_equal(counts, expected[ids])


def test_the_end_stays_possible_where_a_grammar_leaves_nothing_else() -> None:
    only_end = np.arange(6) == 5
    row = Row(params=params(min_tokens=10), position=0, index=1, banned=ENDS, mask=only_end)
    assert sample(LOGITS[None], [row])[0].token_id == 5


def test_ids_outside_the_vocabulary_are_passed_over() -> None:
    p = params(temperature=0, logit_bias=((600, 9.0), (1, 9.0)), min_tokens=3)
    assert sample(LOGITS[None], [Row(params=p, position=0, banned=(700,))])[0].token_id == 1


def test_logprobs_are_those_of_the_model_whatever_the_options() -> None:
    expected = np.log(softmax(LOGITS))
    for options in FILTERS.values():
        p = params(**({"temperature": 0.1} | options), logprobs=True, top_logprobs=3)
        (drawn,) = sample(LOGITS[None], [Row(params=p, position=0, history=history(p), banned=ENDS)])
        assert drawn.logprob == pytest.approx(expected[drawn.token_id], abs=1e-6)
        assert [i for i, _ in drawn.top] == [0, 4, 1]
        assert [value for _, value in drawn.top] == pytest.approx([expected[0], expected[4], expected[1]], abs=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_fail_their_own_row_only(poison: float) -> None:
    rows = np.stack([LOGITS, LOGITS, LOGITS])
    rows[1, 3] = poison
    drawn = sample(rows, [Row(params=params(temperature=0), position=i) for i in range(3)])
    assert [d.ok for d in drawn] == [True, False, True]
    assert drawn[0].token_id == drawn[2].token_id == 0


def test_what_a_row_keeps_does_not_depend_on_how_many_candidates_others_have() -> None:
    rng = np.random.default_rng(5)
    size = 40 * CANDIDATES
    logits = rng.standard_normal((64, size)).astype(np.float32)
    logits[1::2, : size // 2] = 3.0  # equals by the thousand: every one of them is a candidate
    p = params(top_k=300, top_p=0.9)
    rows = [Row(params=dataclasses.replace(p, seed=i), position=i) for i in range(64)]
    assert sample(logits, rows) == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)]
