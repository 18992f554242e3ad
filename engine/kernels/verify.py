"""What a step's draws decide: which drafts stay, and where the draft layer guesses on. Said where tokens are drawn, so
that what comes next need not wait for the host.

T tokens of B segments. No value is looked at here but by the twins.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.sample import DRAWN
from wire.types import PAGE_TOKENS

MOST_DRAFTS = 63
"""Of a segment that is verified here."""


class Asked(NamedTuple):
    """What is wanted of each segment, all [B] int32.

    drafts   how many of its last tokens are guesses, to be compared with what is drawn in front of them
    draws    1 where tokens are drawn, else 0
    guesses  how many more are wanted, at most
    """

    drafts: Tensor
    draws: Tensor
    guesses: Tensor


class Guessing(NamedTuple):
    """Where a guess is to be made behind which token, all [B] int32; zeros where none is. Written in place."""

    ids: Tensor
    places: Tensor
    going: Tensor


def verify(
    drawn: Tensor, ids: Tensor, meta: StepMeta, asked: Asked, kept: Tensor, guessing: Guessing, guesses: Tensor
) -> None:
    """What stays of each segment, up to the first draft that is not what was drawn, and its first guess.

    drawn    [T, 2] int32, as `engine.kernels.sample.draw` says; ids [T] int64 the step's tokens
    kept     [B] int32, written: tokens of the segment that stay
    guesses  [B, G] int32, written: -1, no guesses yet
    """
    if drawn.is_cuda:
        from engine.kernels.device import verify as device

        device.verify(drawn, ids, meta, asked, kept, guessing, guesses)
        return
    guesses.fill_(-1)
    for b, (drafts, draws, wanted) in enumerate(zip(*(part.tolist() for part in asked), strict=True)):
        first, end = meta.offsets[b : b + 2].tolist()
        agreed = 0
        while agreed < drafts:
            at = end - 1 - drafts + agreed
            if drawn[at].tolist() != [int(ids[at + 1]), DRAWN]:
                break
            agreed += 1
        kept[b] = end - first - drafts + agreed
        place = int(meta.starts[b]) + int(kept[b])
        goes = (
            draws
            and int(drawn[end - 1 - drafts + agreed, 1]) == DRAWN
            and wanted > 0
            and _is_mapped(meta.swa_table, b, place)
        )
        token = int(drawn[end - 1 - drafts + agreed, 0]) if goes else 0
        for part, value in zip(guessing, (token, place, 1) if goes else (0, 0, 0), strict=True):
            part[b] = value


def advance(drawn: Tensor, swa_table: Tensor, asked: Asked, guessing: Guessing, guesses: Tensor) -> None:
    """Each guess that was drawn behind those before, and where the next one goes.

    drawn    [B, 2] int32; what it says of segments without a guess means nothing
    guesses  [B, G] int32, G no less than any segment wants
    """
    if drawn.is_cuda:
        from engine.kernels.device import verify as device

        device.advance(drawn, swa_table, asked, guessing, guesses)
        return
    for b, (token, state) in enumerate(drawn.tolist()):
        goes = bool(guessing.going[b]) and state == DRAWN
        made = int((guesses[b] >= 0).sum())
        if goes:
            guesses[b, made] = token
        place = int(guessing.places[b]) + 1
        goes = goes and made + 1 < int(asked.guesses[b]) and _is_mapped(swa_table, b, place)
        for part, value in zip(guessing, (token, place, 1) if goes else (0, 0, 0), strict=True):
            part[b] = value


def _is_mapped(swa_table: Tensor, segment: int, place: int) -> bool:
    page = place // PAGE_TOKENS
    return page < swa_table.shape[1] and bool(swa_table[segment, page])
