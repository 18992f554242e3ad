"""Which drafts stay and where guesses go on, said without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import StepMeta, Tables
from engine.kernels.sample import DRAWN, NOT_FINITE, UNSURE
from engine.kernels.verify import Asked, Guessing, advance, verify

STARTS, COUNTS = [10, 250, 0, 511, 7], [4, 5, 1, 1, 3]
IDS = [1, 20, 30, 40, 2, 50, 51, 52, 53, 9, 8, 0, 0, 0]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def meta_of() -> StepMeta:
    swa_pages = torch.tensor([[3, 0, 0], [4, 5, 0], [6, 0, 0], [0, 7, 0], [0, 0, 0]], dtype=torch.int32)
    tables = Tables(int32(1, 2, 3, 4, 0), torch.zeros_like(swa_pages), swa_pages)
    return StepMeta.at(tables, torch.tensor(STARTS), torch.tensor(COUNTS), sum(COUNTS))


def verified(drawn: Tensor, asked: Asked) -> tuple[Tensor, Guessing, Tensor]:
    kept, guesses = int32(*[9] * 5), torch.zeros(5, 4, dtype=torch.int32)
    guessing = Guessing(*(int32(*[9] * 5) for _ in range(3)))
    verify(drawn, torch.tensor(IDS), meta_of(), asked, kept, guessing, guesses)
    assert (guesses == -1).all()
    return kept, guessing, guesses


def drawn_as(*tokens: int, broken: dict[int, int] | None = None) -> Tensor:
    """[T, 2]; `broken` are states of those that are not drawn."""
    return torch.tensor([(token, (broken or {}).get(i, DRAWN)) for i, token in enumerate(tokens)], dtype=torch.int32)


ASKED = Asked(int32(3, 4, 0, 0, 0), int32(1, 1, 1, 1, 0), int32(3, 3, 3, 3, 0))


def test_drafts_stay_up_to_the_first_that_was_not_drawn_and_a_guess_is_made_behind_the_last_token() -> None:
    drawn = drawn_as(20, 30, 41, 77, 50, 51, 52, 53, 54, 5, 6, 0, 0, 0)
    kept, guessing, _ = verified(drawn, ASKED)
    assert kept.tolist() == [3, 5, 1, 1, 3]
    assert guessing.ids.tolist() == [41, 54, 5, 0, 0]  # the fourth's page, 2, is not mapped
    assert guessing.places.tolist() == [13, 255, 1, 0, 0]
    assert guessing.going.tolist() == [1, 1, 1, 0, 0]


def test_where_nothing_could_be_drawn_a_segment_ends() -> None:
    """At its first draft, though the token would be right; at its last; and where the host has to look."""
    drawn = drawn_as(20, 30, 40, 1, 50, 51, 52, 53, 54, 5, 6, 0, 0, 0, broken={0: NOT_FINITE, 8: UNSURE, 9: UNSURE})
    kept, guessing, _ = verified(drawn, ASKED)
    assert kept.tolist() == [1, 5, 1, 1, 3]
    assert guessing.going.tolist() == [0] * 5
    assert guessing.ids.tolist() == guessing.places.tolist() == [0] * 5


def test_a_segment_that_draws_nothing_stays_whole() -> None:
    asked = Asked(int32(0, 0, 0, 0, 0), int32(0, 1, 0, 0, 0), int32(0, 0, 0, 0, 0))
    kept, guessing, _ = verified(drawn_as(*[20] * 14), asked)
    assert kept.tolist() == COUNTS
    assert guessing.going.tolist() == [0] * 5


def test_guesses_go_on_until_enough_are_made_or_none_is_drawn_or_a_page_is_not_mapped() -> None:
    kept, guessing, guesses = verified(drawn_as(20, 30, 40, 41, 2, 0, 0, 0, 0, 5, 6, 0, 0, 0), ASKED)
    assert kept.tolist() == [4, 1, 1, 1, 3]
    swa_table = meta_of().swa_table
    asked = ASKED._replace(guesses=int32(3, 2, 3, 3, 0))
    for drawn in (drawn_as(60, 61, 62, 1, 1), drawn_as(70, 71, 72, 1, 1, broken={2: NOT_FINITE})):
        advance(drawn, swa_table, asked, guessing, guesses)
    assert guesses.tolist() == [[60, 70, -1, -1], [61, 71, -1, -1], [62, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert guessing.going.tolist() == [1, 0, 0, 0, 0]
    assert guessing.places.tolist() == [16, 0, 0, 0, 0]
    assert guessing.ids.tolist() == [70, 0, 0, 0, 0]
    guessing.places[0] = 255
    advance(drawn_as(80, 1, 1, 1, 1), swa_table, asked, guessing, guesses)
    assert guesses[0].tolist() == [60, 70, 80, -1]
    assert guessing.going.tolist() == [0] * 5
