"""Draw one token per row of logits, reproducibly.

Noise is a pure function of (seed, choice, position, token id), so a request draws the same tokens on any worker, in any
batch and after any migration. A draw is argmax(logits / temperature + Gumbel noise), which samples the softmax.

What is done to a row's logits, in this order; each part only where it was asked for:

1. penalties   repetition (prompt and answer: divide a positive logit, multiply a negative one), then
               frequency (times in the answer) and presence (is in the answer), subtracted
2. logit_bias  added
3. min_tokens  EOS and stop tokens ruled out before the answer has that many tokens
4. the grammar's mask
   temperature 0 takes the most likely token here
5. temperature
6. top_k       the k most likely
7. top_p       of what is left, renormalised, the smallest set of most likely tokens that reaches top_p
8. min_p       of what is left, those at least min_p times as likely as the most likely

Equally likely tokens rank by id, the lower first. Log probabilities are those of the logits as the model gave them,
before any of this.

S rows, V tokens in the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Sampled
from wire.types import SamplingParams

CANDIDATES = 512
"""At least as many of the most likely tokens filters look at first: what they keep is nearly always among these, and to
find these in a vocabulary of 129,280 costs a tenth of sorting it."""

DRAWN, NOT_FINITE, UNSURE = range(3)
"""What became of a row that was drawn where its logits are: as in engine/csrc/sample_rows.cu."""

BLOCK_LOGITS = 1 << 16
"""Logits worked on at once: half a MiB of them as doubles, which stays in a core's cache from pass to pass."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

F64 = NDArray[np.float64]
Floats = NDArray[np.float32] | F64
Ids = NDArray[np.int64]
Top = Callable[[Floats], tuple[Ids, F64, bool]]


class History:
    """How often each token occurs in one sequence: what penalties are computed from. Grows with the sequence."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        prompt_ids = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._place: dict[int, int] = {int(token): i for i, token in enumerate(prompt_ids)}
        self._ids = np.concatenate([prompt_ids, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.int64)

    def push(self, tokens: Iterable[int]) -> None:
        """These tokens were added to the answer."""
        for token in tokens:
            at = self._place.setdefault(token, len(self._place))
            if at == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[at] = token
            self._counts[at] += 1

    def counts(self, drafts: Iterable[int] = ()) -> tuple[Ids, Ids]:
        """(distinct ids, times each is in the answer), with `drafts` at its end; prompt tokens count 0 times."""
        n = len(self._place)
        ids, counts = self._ids[:n], self._counts[:n]
        more: dict[int, int] = {}
        for token in drafts:
            more[token] = more.get(token, 0) + 1
        if not more:
            return ids, counts
        counts = counts.copy()
        for token in [token for token in more if token in self._place]:
            counts[self._place[token]] += more.pop(token)
        return np.append(ids, list(more)).astype(np.int64), np.append(counts, list(more.values())).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of logits and what its draw depends on.

    position  of the token to draw, in its sequence
    index     of the token to draw, in the answer
    history   the sequence's tokens before `drafts`; only needed with penalties
    drafts    tokens drafted between those and this position, which this draw takes as given
    banned    token ids that end the answer, ruled out while `index` is less than min_tokens
    mask      [V] bool, the tokens that a grammar allows here
    problem   why there is nothing to draw, if so
    """

    params: SamplingParams
    position: int
    index: int = 0
    history: History | None = None
    drafts: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    mask: NDArray[np.bool_] | None = None
    problem: str = ""


def sample(logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Sampled]:
    """logits [S, V], left as they are. A row with a problem, or whose logits are not all finite, is answered with `ok`
    False.
    """
    # Rows know nothing of each other, so they are taken as many at a time as stay in the processor's caches.
    step = max(1, BLOCK_LOGITS // logits.shape[-1])
    blocks = range(0, len(rows), step)
    return [sampled for i in blocks for sampled in _sample(logits[i : i + step], rows[i : i + step])]


def sample_rows(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """`sample` of logits [S, V] fp32 wherever they lie.

    On a GPU those rows are drawn there that only temperature, top_k, top_p and min_p shape, so that no logits of theirs
    have to come here.
    """
    if not logits.is_cuda:
        return sample(logits.numpy(), rows)
    answers: dict[int, Sampled] = {}
    if takes(logits.device, logits.shape[1]) and (plain := [i for i, row in enumerate(rows) if is_plain(row)]):
        how = How.of_rows([rows[i] for i in plain])
        bits = torch.from_numpy(how.bits.view(np.int64)).to(logits.device)
        every = logits if len(plain) == len(rows) else logits[plain]
        drawn = draw(every, bits, bool(how.filtered.any())).tolist()
        for i, (token, state) in zip(plain, drawn, strict=True):
            if state != UNSURE:
                answers[i] = Sampled(token_id=token, logprob=0.0, ok=state == DRAWN)
    if left := [i for i in range(len(rows)) if i not in answers]:
        here = sample(logits[left].cpu().numpy(), [rows[i] for i in left])
        answers |= dict(zip(left, here, strict=True))
    return [answers[i] for i in range(len(rows))]


HOW = 5
"""Numbers of 64 bits that say how a row is drawn from."""


class How:
    """How S rows are drawn from, as engine/csrc/sample_rows.cu takes it: [S, HOW] uint64, a row's key of the noise and
    the bits of its temperature, top_p, min_p and top_k.
    """

    def __init__(self, bits: NDArray[np.uint64]) -> None:
        self.bits = bits

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> How:
        """For draws at any position: see `at`."""
        bits = np.empty((len(params), HOW), dtype=np.uint64)
        bits[:, 0] = _base_keys(params)
        for place, name in enumerate(("temperature", "top_p", "min_p"), start=1):
            bits[:, place] = np.array([getattr(p, name) for p in params], dtype=np.float64).view(np.uint64)
        bits[:, 4] = [p.top_k for p in params]
        return cls(bits)

    @classmethod
    def all_of(cls, parts: Sequence[How]) -> How:
        """Rows of these, one behind the other."""
        return cls(np.concatenate([part.bits for part in parts]))

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> How:
        return cls.of([row.params for row in rows]).at([row.position for row in rows])

    def at(self, positions: Sequence[int] | Ids) -> How:
        """For the draws at these positions [S]."""
        bits = self.bits.copy()
        bits[:, 0] = _mix(bits[:, 0] + np.asarray(positions).astype(np.uint64) * _GOLDEN)
        return How(bits)

    def only(self, rows: Ids) -> How:
        return How(self.bits[rows])

    @property
    def keys(self) -> NDArray[np.uint64]:
        return self.bits[:, 0]

    @property
    def temperature(self) -> F64:
        return self._column(1)

    @property
    def top_p(self) -> F64:
        return self._column(2)

    @property
    def min_p(self) -> F64:
        return self._column(3)

    @property
    def top_k(self) -> Ids:
        return self.bits[:, 4].astype(np.int64)

    @property
    def filtered(self) -> NDArray[np.bool_]:
        """[S] whether top_k, top_p or min_p say which tokens may be drawn."""
        return (self.temperature != 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

    def _column(self, place: int) -> F64:
        return np.ascontiguousarray(self.bits[:, place]).view(np.float64)


ANYHOW = How(np.zeros((1, HOW), dtype=np.uint64))
"""For a row that is drawn only because its neighbours are."""


def takes(device: torch.device, vocabulary: int) -> bool:
    """Whether `draw` takes logits of so many tokens there: any on a CPU, most on a GPU."""
    if device.type != "cuda":
        return True
    from engine.kernels.device import sample_rows

    return sample_rows.takes(vocabulary)


def draw(
    logits: Tensor, how: Tensor, filtered: bool, segment: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """logits [S, V] fp32 -> [S, 2] int32: a token and DRAWN, or one that means nothing where logits are not finite, or
    where, on a GPU, more than CANDIDATES tokens pass a row's filters (UNSURE).

    how        [., 5] int64, bits of a `How`: row i is drawn by row i of it, or by row segment[i]; all where logits are
    filtered   any of them has top_k, top_p or min_p
    segment    [S] int32
    positions  [S] int64, of the tokens in front of those that are drawn, for a `How` of any position
    """
    if logits.is_cuda:
        from engine.kernels.device import sample_rows as device

        return device.draw(logits, how, filtered, segment, positions)
    of = How(how.numpy().view(np.uint64))
    if segment is not None:
        of = of.only(segment.numpy())
    if positions is not None:
        of = of.at(positions.numpy() + 1)
    values = logits.numpy()
    finite = np.isfinite(values).all(axis=-1)
    drawn = np.zeros((len(values), 2), dtype=np.int32)
    drawn[:, 1] = np.where(finite, DRAWN, NOT_FINITE)
    for some, drawer in (
        (finite & (of.temperature == 0), lambda scores, _: scores.argmax(axis=-1)),
        (finite & (of.temperature != 0), _draw),
    ):
        if (rows := np.flatnonzero(some)).size:
            drawn[rows, 0] = drawer(values[rows], of.only(rows))
    return torch.from_numpy(drawn)


def is_plain(row: Row) -> bool:
    """Whether its logits are needed for nothing but the draw, as they are."""
    return not (_is_shaped(row) or row.params.logprobs or row.problem)


def _sample(logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Sampled]:
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=-1))
    finite = finite & np.array([not row.problem for row in rows])
    shaped = np.array([_is_shaped(row) for row in rows])
    values = _shape(logits[shaped], [row for row, touched in zip(rows, shaped.tolist(), strict=True) if touched])
    how = How.of_rows(rows)
    chosen = np.zeros(len(rows), dtype=np.int64)
    greedy = finite & (how.temperature == 0)
    if greedy.any():
        chosen[greedy] = logits[greedy].argmax(axis=-1)
        chosen[greedy & shaped] = values[greedy[shaped]].argmax(axis=-1)
    drawn = finite & (how.temperature != 0)
    # Shaped rows have twice the digits, and are few as a rule.
    for part, which, scores in ((drawn & shaped, drawn[shaped], values), (drawn & ~shaped, drawn & ~shaped, logits)):
        if part.any():
            chosen[part] = _draw(scores if which.all() else scores[which], how.only(np.flatnonzero(part)))
    answers = [
        Sampled(token_id=int(token), logprob=0.0, ok=ok, problem=row.problem)
        for token, ok, row in zip(chosen, finite.tolist(), rows, strict=True)
    ]
    asked = [i for i in np.flatnonzero(finite).tolist() if rows[i].params.logprobs]
    if asked:
        told = _with_logprobs(logits[asked], [rows[i] for i in asked], chosen[asked])
        for i, sampled in zip(asked, told, strict=True):
            answers[i] = sampled
    return answers


def _column(rows: Sequence[Row], name: str) -> F64:
    return np.array([getattr(row.params, name) for row in rows], dtype=np.float64)


# 1 to 4: what changes logits


def needs_history(params: SamplingParams) -> bool:
    """Whether rows with these options need a `History`."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _is_short(row: Row) -> bool:
    return bool(row.banned) and row.index < row.params.min_tokens


def _is_shaped(row: Row) -> bool:
    return bool(row.params.logit_bias) or needs_history(row.params) or row.mask is not None or _is_short(row)


def _shape(logits: NDArray[np.float32], rows: Sequence[Row]) -> F64:
    """[S, V] logits after penalties, bias, min_tokens and mask."""
    shaped = logits.astype(np.float64)
    vocab_size = logits.shape[-1]
    if penalised := [i for i, row in enumerate(rows) if row.history is not None and needs_history(row.params)]:
        _penalise(shaped, rows, penalised)
    if biased := [i for i, row in enumerate(rows) if row.params.logit_bias]:
        at = np.concatenate([np.full(len(rows[i].params.logit_bias), i) for i in biased])
        ids = np.array([token for i in biased for token, _ in rows[i].params.logit_bias])
        bias = np.array([value for i in biased for _, value in rows[i].params.logit_bias])
        known = ids < vocab_size
        np.add.at(shaped, (at[known], ids[known]), bias[known])
    for i, row in enumerate(rows):
        if row.mask is not None:
            np.putmask(shaped[i], ~row.mask, -np.inf)
        if _is_short(row):
            before = shaped[i].copy()
            shaped[i, [token for token in row.banned if token < vocab_size]] = -np.inf
            if not np.isfinite(shaped[i]).any():
                shaped[i] = before  # a grammar that is complete allows nothing but the end
    return shaped


def _penalise(shaped: F64, rows: Sequence[Row], penalised: list[int]) -> None:
    """In place, on the tokens that occur: one gather and one scatter for all rows."""
    histories = [rows[i].history for i in penalised]
    counted = [h.counts(rows[i].drafts) for i, h in zip(penalised, histories, strict=True) if h is not None]
    lengths = [len(ids) for ids, _ in counted]
    at = np.repeat(np.array(penalised), lengths)
    ids = np.concatenate([ids for ids, _ in counted])
    counts = np.concatenate([counts for _, counts in counted])

    def per_token(name: str) -> F64:
        return np.repeat(_column([rows[i] for i in penalised], name), lengths)

    values = shaped[at, ids]
    repetition = per_token("repetition_penalty")
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= per_token("frequency_penalty") * counts
    values -= per_token("presence_penalty") * (counts > 0)
    shaped[at, ids] = values


# 5 to 8: what is drawn from


def _draw(scores: Floats, how: How) -> Ids:
    """scores [S, V], logits before temperature -> [S] tokens."""
    chosen = np.zeros(len(scores), dtype=np.int64)
    filtered = how.filtered
    free = np.flatnonzero(~filtered)
    if len(free):
        noise = _gumbel(how.keys[free, None], np.arange(scores.shape[-1]))
        noise += scores[free] / how.temperature[free, None]
        chosen[free] = noise.argmax(axis=-1)
    left = np.flatnonzero(filtered)
    for top in (_head, _all):
        if not len(left):
            break
        ids, values, kept, sure = _keep(scores[left], how.only(left), top)
        row, place = np.nonzero(kept & sure[:, None])
        ids = ids[row, place]
        noisy = values[row, place] + _gumbel(how.keys[left[row]], ids)
        first = np.flatnonzero(np.diff(row, prepend=-1))
        best = np.flatnonzero(noisy == np.repeat(np.maximum.reduceat(noisy, first), np.diff(first, append=len(row))))
        # Ids ascend within a row, so the first of equals is the lowest.
        winners = best[np.flatnonzero(np.diff(row[best], prepend=-1))]
        chosen[left[row[winners]]] = ids[winners]
        left = left[~sure]
    return chosen


def _keep(scores: Floats, how: How, top: Top) -> tuple[Ids, F64, NDArray[np.bool_], NDArray[np.bool_]]:
    """([S, K] candidates, [S, K] their scores over temperature, [S, K] which of them the filters leave, at least the
    most likely one; [S] whether more candidates could not change that).
    """
    ids, values, whole = top(scores)
    values = values / how.temperature[:, None]
    ranked = np.sort(values, axis=-1)[:, ::-1]
    counts, least = _count_kept(scores, ranked, how)
    # Had they kept the last candidate, they might keep one that we have not seen.
    sure = (counts < np.isfinite(values).sum(axis=-1)) | whole
    kept = values >= least[:, None]
    for i in np.flatnonzero(kept.sum(axis=-1) > counts):
        equals = np.flatnonzero(values[i] == least[i])
        kept[i, equals[counts[i] - np.count_nonzero(values[i] > least[i]) :]] = False
    return ids, values, kept, sure


def _all(scores: Floats) -> tuple[Ids, F64, bool]:
    ids = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    return ids, scores.astype(np.float64), True


def _head(scores: Floats) -> tuple[Ids, F64, bool]:
    """([S, K] ids of the highest scores of each row, ascending, [S, K] these scores, rows of fewer padded with -inf;
    whether these are all).

    At least CANDIDATES blocks of a row have a maximum of `least` or more, so as many scores do: two passes over
    the row find them, where selecting them would take many.
    """
    size = scores.shape[-1]
    block = size // (4 * CANDIDATES)
    if block < 2:
        return _all(scores)
    num_blocks = size // block
    # A block is every num_blocks-th score: maxima of neighbours would be taken a few at a time.
    maxima = scores[:, : num_blocks * block].reshape(len(scores), block, num_blocks).max(axis=1)
    least = np.partition(maxima, num_blocks - CANDIDATES, axis=-1)[:, num_blocks - CANDIDATES, None]
    row, found = np.divmod(np.flatnonzero(scores >= least), size)
    lengths = np.bincount(row, minlength=len(scores))
    place = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    ids = np.zeros((len(scores), int(lengths.max())), dtype=np.int64)
    values = np.full(ids.shape, -np.inf)
    ids[row, place], values[row, place] = found, scores[row, found]
    return ids, values, False


def _count_kept(scores: Floats, values: F64, how: How) -> tuple[Ids, F64]:
    """([S] how many tokens the filters leave, the most likely first; [S] the score over temperature of the last of
    them), as far as the most likely ones, whose scores over temperature are `values` [S, K], tell.
    """
    size = scores.shape[-1]
    rank = np.arange(values.shape[-1])
    top_k = np.where(how.top_k > 0, np.minimum(how.top_k, size), size)
    top_p, temperature = how.top_p, how.temperature[:, None]
    weights = np.exp(values - values[:, :1])
    keep = (rank < top_k[:, None]) & (weights >= how.min_p[:, None]) & np.isfinite(values)
    if (nucleus := np.flatnonzero(top_p < 1)).size:
        within = np.where(rank < top_k[nucleus, None], weights[nucleus], 0.0)
        # One after the other, since how many candidates there are depends on the other rows.
        reached = np.cumsum(within, axis=-1)
        total = reached[:, -1]
        # Summed over the whole row where top_k leaves it whole, in one order whatever the width.
        if (whole := np.flatnonzero(top_k[nucleus] == size)).size:
            every = scores[nucleus[whole]] / temperature[nucleus[whole]]
            every -= values[nucleus[whole], :1]
            total[whole] = np.exp(every, out=every).sum(axis=-1)
        keep[nucleus] &= reached - within < top_p[nucleus, None] * total[:, None]
    keep[:, 0] = True
    # Each condition holds up to some rank and then no more, so a count says it all.
    counts = keep.sum(axis=-1)
    return counts, np.take_along_axis(values, counts[:, None] - 1, axis=-1)[:, 0]


def _most_likely(scores: Floats, width: int) -> Ids:
    """[S, K] ids of the `width` highest scores of each row, highest first, the lower id first among equals."""
    ids, values, _ = _head(scores) if width <= CANDIDATES else _all(scores)
    least = np.partition(values, values.shape[-1] - width, axis=-1)[:, values.shape[-1] - width]
    found = np.zeros((len(scores), width), dtype=np.int64)
    for i, row in enumerate(values):
        among = np.flatnonzero(row >= least[i])
        found[i] = ids[i, among[np.argsort(-row[among], kind="stable")][:width]]
    return found


# Noise


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int], ids: Ids) -> F64:
    """[S, K] standard Gumbel noise of tokens `ids` ([S, K] or [K]) at `positions` [S] of sequences with these 64-bit
    seeds [S] and choices [S].
    """
    params = [SamplingParams(max_tokens=1, seed=s, choice=c) for s, c in zip(seeds, choices, strict=True)]
    return _gumbel(How.of(params).at(positions).keys[:, None], ids)


def _base_keys(params: Sequence[SamplingParams]) -> NDArray[np.uint64]:
    key = _mix(np.array([p.seed & (2**64 - 1) for p in params], dtype=np.uint64))
    return _mix(key + np.array([p.choice for p in params], dtype=np.uint64) * _GOLDEN)


def _gumbel(keys: NDArray[np.uint64], ids: Ids) -> F64:
    bits = _mix(keys + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 53 bits, shifted by half a step so that neither 0 nor 1 occurs and both logarithms are finite.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


# Log probabilities


def score(logits: NDArray[np.float32], tokens: Sequence[int], width: int) -> list[Sampled]:
    """Log probabilities of these tokens, one for each row of logits [S, V], and of the `width` most likely ones."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    width = min(width, logits.shape[-1])
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if width:
        # By logit, as ranks of equal logits must not depend on how a logarithm rounds.
        ids = _most_likely(logits, width)
        values = (np.take_along_axis(shifted, ids, axis=-1) - total).astype(np.float32)
        tops = [tuple(zip(ids[i].tolist(), values[i].tolist(), strict=True)) for i in range(len(tokens))]
    chosen = np.array(tokens, dtype=np.int64)
    own = (np.take_along_axis(shifted, chosen[:, None], axis=-1) - total)[:, 0].astype(np.float32)
    return [
        Sampled(token_id=int(token), logprob=float(logprob), top=top)
        for token, logprob, top in zip(chosen, own, tops, strict=True)
    ]


def _with_logprobs(logits: NDArray[np.float32], rows: list[Row], chosen: Ids) -> list[Sampled]:
    scored = score(logits, chosen.tolist(), max(row.params.top_logprobs for row in rows))
    return [replace(one, top=one.top[: row.params.top_logprobs]) for one, row in zip(scored, rows, strict=True)]
