"""Which drafts stay, and where guesses go on, on the device: a program looks at one segment."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.batch import StepMeta
from engine.kernels.device.early import await_previous, early
from engine.kernels.sample import DRAWN
from engine.kernels.verify import MOST_DRAFTS, Asked, Guessing
from wire.types import PAGE_TOKENS

_DRAWN, _PAGE = tl.constexpr(DRAWN), tl.constexpr(PAGE_TOKENS)


@triton.jit
def _go_on(ids, places, going, swa_table, pages, b, goes, token, place):
    """The next guess of segment b, if it goes on and the page of its place is mapped."""
    page = place // _PAGE
    goes = goes & (page < pages)
    goes = goes & (tl.load(swa_table + b * pages + page, mask=goes, other=0) != 0)
    tl.store(ids + b, tl.where(goes, token, 0))
    tl.store(places + b, tl.where(goes, place, 0))
    tl.store(going + b, goes.to(tl.int32))


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["swa_table", "drafts", "draws", "wanted"])
def _verify(
    drawn, tokens, offsets, starts, swa_table, pages, drafts, draws, wanted, kept, ids, places, going, guesses,
    MOST: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    await_previous()
    b = tl.program_id(0)
    count, drawing = tl.load(drafts + b), tl.load(draws + b) > 0
    first, end = tl.load(offsets + b), tl.load(offsets + b + 1)
    row = end - 1 - count
    i = tl.arange(0, MOST)
    draft = drawing & (i < count)
    token, state = tl.load(drawn + 2 * (row + i), mask=draft, other=0), tl.load(drawn + 2 * (row + i) + 1, mask=draft)
    said = tl.load(tokens + row + 1 + i, mask=draft, other=0).to(tl.int32)
    agreed = tl.min(tl.where(draft & (state == _DRAWN) & (token == said), MOST, i), axis=0)
    stay = end - first - count + agreed
    tl.store(kept + b, stay)
    last = drawn + 2 * (row + agreed)
    goes = drawing & (tl.load(last + 1, mask=drawing, other=-1) == _DRAWN) & (tl.load(wanted + b) > 0)
    place = (tl.load(starts + b) + stay).to(tl.int32)
    _go_on(ids, places, going, swa_table, pages, b, goes, tl.load(last, mask=drawing, other=0), place)
    g = tl.arange(0, GUESSES)
    tl.store(guesses + b * GUESSES + g, tl.zeros((GUESSES,), tl.int32) - 1)


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["swa_table", "wanted"])
def _advance(drawn, swa_table, pages, wanted, ids, places, going, guesses, GUESSES: tl.constexpr):
    await_previous()
    b = tl.program_id(0)
    token = tl.load(drawn + 2 * b)
    goes = (tl.load(going + b) > 0) & (tl.load(drawn + 2 * b + 1) == _DRAWN)
    made = tl.sum((tl.load(guesses + b * GUESSES + tl.arange(0, GUESSES)) >= 0).to(tl.int32), axis=0)
    tl.store(guesses + b * GUESSES + made, token, mask=goes)
    goes = goes & (made + 1 < tl.load(wanted + b))
    _go_on(ids, places, going, swa_table, pages, b, goes, token, tl.load(places + b) + 1)


def verify(
    drawn: Tensor, ids: Tensor, meta: StepMeta, asked: Asked, kept: Tensor, guessing: Guessing, guesses: Tensor
) -> None:
    """As `engine.kernels.verify.verify`; G is a power of two."""
    _verify[(len(kept),)](
        drawn, ids, meta.offsets, meta.starts, meta.swa_table.contiguous(), meta.swa_table.shape[1], *asked, kept,
        *guessing, guesses, MOST=MOST_DRAFTS + 1, GUESSES=guesses.shape[1], num_warps=1, **early(),
    )  # fmt: skip


def advance(drawn: Tensor, swa_table: Tensor, asked: Asked, guessing: Guessing, guesses: Tensor) -> None:
    """As `engine.kernels.verify.advance`; G is a power of two."""
    _advance[(len(drawn),)](
        drawn, swa_table.contiguous(), swa_table.shape[1], asked.guesses, *guessing, guesses,
        GUESSES=guesses.shape[1], num_warps=1, **early(),
    )  # fmt: skip
