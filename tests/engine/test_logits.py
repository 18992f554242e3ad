"""Logits of the paged engine against transformers (exact layout) and against a dense forward (both layouts)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.transformers_v4 import Picks, transformers_model
from engine.batch import Sequence, StepMeta
from engine.kernels import experts
from engine.kernels import index_topk as index_topk_module
from engine.kernels.linear import Matrix, linear
from engine.kernels.rows import RowPool, read_rows
from engine.model import moe
from engine.model.deepseek_v4 import DeepseekV4
from tests.engine.dense_forward import Stored, dense_forward, stored_index, stored_latent
from tests.engine.geometries import PATTERNS, random_tensors, tiny_config
from tests.engine.paged import Paged

TIE_MARGIN = 1e-5
LENGTHS = (1, 2, 3, 127, 128, 129, 255, 256, 257, 511, 1000, 3000)


class Judged:
    """Stands where the model chooses rows and experts: our choice must be the judge's, except among scores that tie.

    The judge's choice is then used, so that a tie broken the other way does not spread into every later logit.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, paged: Paged) -> None:
        self.paged, self.ties = paged, 0
        self.rows: dict[int, Tensor] = {}  # layer -> [T, rows] bool
        self.experts: dict[int, Tensor] = {}  # layer -> [T, k]
        # Choices are judged between the kernels; test_fused.py shows that the one call makes the same.
        paged.model.fused = None
        self.layer_of = {id(layer.moe.gate): n for n, layer in enumerate(paged.model.layers)}
        self._topk = index_topk_module.index_topk
        monkeypatch.setattr(index_topk_module, "index_topk", self.index_topk)
        monkeypatch.setattr(moe, "route_scored", self.route_scored)

    def _tie(self, layer: int, position: int, scores: Tensor) -> None:
        """`scores` are those of all that one side chose and the other did not."""
        assert scores.max() - scores.min() < TIE_MARGIN, f"layer {layer} position {position}: {scores}"
        self.ties += 1

    def index_topk(self, q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool) -> Tensor:
        ours = self._topk(q, w, pool, meta, k)
        layer = next(n for n, p in self.paged.pools.index.items() if p is pool)
        judged = ours.clone()
        for t, position in enumerate(meta.positions.tolist()):
            visible = (position + 1) // 4
            theirs = self.rows[layer][position][:visible]
            mine = torch.zeros(visible, dtype=torch.bool)
            mine[ours[t][ours[t] >= 0].long()] = True
            if not torch.equal(mine, theirs):
                blocks = (mine ^ theirs).nonzero()[:, 0]
                pages = meta.page_table[int(meta.segment[t])].long()
                keys = read_rows(pool, pages[blocks // 64] * 64 + blocks % 64)
                self._tie(layer, position, ((keys @ q[t].T).relu() * w[t]).sum(-1))
                chosen = theirs.nonzero()[:, 0].int()
                judged[t] = -1
                judged[t, : len(chosen)] = chosen
        return judged

    def route_scored(self, x: Tensor, gate: Matrix, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
        picks, weights = experts.route_scored(x, gate, bias, k, scaling)
        layer = self.layer_of[id(gate)]
        theirs = self.experts[layer][self.paged.positions]
        differ = (picks.long().sort(-1).values != theirs.sort(-1).values).any(-1)
        for t in differ.nonzero()[:, 0].tolist():
            scores = torch.nn.functional.softplus(linear(x[t : t + 1], gate)[0]).sqrt()
            either = torch.tensor(sorted(set(picks[t].tolist()) ^ set(theirs[t].tolist())))
            self._tie(layer, int(self.paged.positions[t]), (scores + bias)[either])
            picks[t] = theirs[t].int()
            weights[t] = scores[theirs[t]] / (scores[theirs[t]].sum() + 1e-20) * scaling
        return picks, weights


def as_mask(picks: Tensor, rows: int) -> Tensor:
    """[T, k] block numbers with -1 for none -> [T, rows] bool."""
    mask = torch.zeros(len(picks), rows + 1, dtype=torch.bool)
    return mask.scatter(1, torch.where(picks < 0, rows, picks), True)[:, :rows]


def check_against_transformers(
    monkeypatch: pytest.MonkeyPatch, seed: int, pattern: str, lengths: tuple[int, ...], chunks: dict[int, int]
) -> int:
    """chunks: chunk size -> prompt tokens to run at that size. Returns how many ties were met."""
    config = tiny_config(seed, pattern)
    tensors = random_tensors(config, seed)
    oracle = transformers_model(config, tensors)
    recorded = Picks(oracle)
    paged = Paged(DeepseekV4(config, dict(tensors)), "exact")
    judged = Judged(monkeypatch, paged)
    prompt = torch.randint(config.vocab_size, (max(lengths),), generator=torch.Generator().manual_seed(seed))

    def expected(n: int) -> Tensor:
        with torch.inference_mode():
            logits = oracle(prompt[None, :n], use_cache=False).logits[0]
        judged.rows = {layer: as_mask(p, n // 4) for layer, p in recorded.rows.items()}
        judged.experts = recorded.experts
        return logits

    for n in lengths:
        want = expected(n)
        got = paged.prefill(prompt[:n], n)
        assert (want - got).abs().max() <= 1e-4, f"{n} tokens at once: {(want - got).abs().max():.2e}"
    # `want` and the judge's picks are those of the longest prompt from here on.
    for chunk, n in chunks.items():
        error = (want[:n] - paged.prefill(prompt[:n], chunk)).abs().max()
        assert error <= 1e-4, f"chunks of {chunk}: {error:.2e}"
    return judged.ties


@pytest.mark.parametrize(("seed", "pattern"), [(1, "flash"), (8, "pro"), (3, "all"), (4, "c4")])
def test_logits_match_transformers_at_every_length_and_chunk_size(
    monkeypatch: pytest.MonkeyPatch, seed: int, pattern: str
) -> None:
    lengths = LENGTHS if pattern in ("flash", "pro") else (1, 3, 128, 257, 1000)
    check_against_transformers(
        monkeypatch, seed, pattern, lengths, {1: 280, 3: 300, 100: 1000, 256: lengths[-1], 300: lengths[-1]}
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 120))
def test_logits_match_transformers_over_twenty_geometries(
    monkeypatch: pytest.MonkeyPatch, seed: int, record_property: pytest.RecordProperty
) -> None:
    pattern = list(PATTERNS)[seed % len(PATTERNS)]
    ties = check_against_transformers(
        monkeypatch, seed, pattern, LENGTHS, {1: 1000, 3: 1000, 100: 3000, 256: 3000, 300: 3000}
    )
    record_property("ties", ties)


class EngineRows(Stored):
    """Lets the dense forward read the very rows and choices of a paged run, once each is proved to be a right one.

    Rounding makes a chaotic system of the model: one key that rounds the other way, because two float32 sums were
    added in another order, is a step of e4m3 away and turns other keys over in every layer above (a perturbation of
    1e-6 in the embedding moves logits by 0.4 within 700 tokens). So the judge rounds by itself, and where our row is
    the other neighbour of a value that lies between two, goes on with ours.
    """

    def __init__(self, paged: Paged, sequence: Sequence, picks: dict[int, list[Tensor]]) -> None:
        self.pools, self.sequence, self.picks = paged.pools, sequence, picks
        self.same = self.values = self.ties = 0

    def _accept(self, ours: Tensor, keys: Tensor, rounded: Tensor) -> Tensor:
        # Half a step of e4m3 is a sixteenth of a normal value; subnormal steps are 2^-9 of a scale of at most 2/448
        # of the largest value. Rope channels are bfloat16: 2^-9.
        step = keys.abs() / 16 + keys.abs().amax(-1, keepdim=True) * 2 / 448 * 2**-10 + 2e-5
        assert ((ours - keys).abs() <= step).all(), "a stored value is not one of the two next to the right one"
        self.same += int((ours == rounded).sum())
        self.values += rounded.numel()
        return ours

    def latent(self, layer: int, pool: str, keys: Tensor) -> Tensor:
        rows, ratio = torch.arange(len(keys)), self.pools.window[layer].rows_per_item
        source, pages = self.pools.window[layer], self.sequence.swa_pages
        if pool == "compressed":
            source = self.pools.c4.get(layer) or self.pools.c128[layer]
            ratio, pages = source.rows_per_item, self.sequence.pages
        ours = read_rows(source, torch.tensor(pages)[rows // ratio] * ratio + rows % ratio)
        return self._accept(ours, keys, stored_latent(keys))

    def index(self, layer: int, keys: Tensor) -> Tensor:
        rows = torch.arange(len(keys))
        ours = read_rows(self.pools.index[layer], torch.tensor(self.sequence.pages)[rows // 64] * 64 + rows % 64)
        return self._accept(ours, keys, stored_index(keys))

    def choose(self, layer: int, scores: Tensor, chosen: Tensor) -> Tensor:
        ours = as_mask(torch.cat(self.picks[layer]).long(), chosen.shape[1])
        for t in (ours != chosen).any(1).nonzero()[:, 0].tolist():
            differing = scores[t][ours[t] ^ chosen[t]]
            assert differing.max() - differing.min() < TIE_MARGIN, f"layer {layer} position {t}: {differing}"
            self.ties += 1
        return ours


def check_against_dense(monkeypatch: pytest.MonkeyPatch, seed: int, pattern: str, n: int, chunk: int) -> None:
    """The packed layout needs production row sizes, so this model is wider than the others."""
    config = tiny_config(seed, pattern, head_dim=512, rope_dim=64, index_head_dim=128, index_topk=64)
    tensors = random_tensors(config, seed)
    paged = Paged(DeepseekV4(config, dict(tensors)), "v4", keep_windows=True)
    prompt = torch.randint(config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))
    picks: dict[int, list[Tensor]] = {}

    topk = index_topk_module.index_topk

    def recording(q: Tensor, w: Tensor, pool: RowPool, meta: StepMeta, k: int, half: bool) -> Tensor:
        chosen = topk(q, w, pool, meta, k)
        layer = next(n for n, p in paged.pools.index.items() if p is pool)
        picks.setdefault(layer, []).append(chosen)
        return chosen

    paged.model.fused = None
    monkeypatch.setattr(index_topk_module, "index_topk", recording)
    sequence = paged.sequence()
    got = torch.cat([paged.step((sequence, part))[0] for part in prompt.split(chunk)])
    stored = EngineRows(paged, sequence, picks)
    want, _ = dense_forward(config, tensors, prompt, stored)
    assert (want - got).abs().max() <= 1e-3
    assert stored.same >= 0.999 * stored.values, "most values round alike"
    assert stored.ties <= n // 100


@pytest.mark.parametrize(("seed", "pattern"), [(11, "flash"), (12, "pro")])
def test_packed_layout_matches_a_dense_forward_with_quantised_keys(
    monkeypatch: pytest.MonkeyPatch, seed: int, pattern: str
) -> None:
    check_against_dense(monkeypatch, seed, pattern, 700, 256)


def test_dense_forward_is_itself_right() -> None:
    config = tiny_config(5, "flash", index_topk=16)
    tensors = random_tensors(config, 5)
    prompt = torch.randint(config.vocab_size, (400,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        want = transformers_model(config, tensors)(prompt[None], use_cache=False).logits[0]
    got, _ = dense_forward(config, tensors, prompt)
    assert (want - got).abs().max() <= 2e-5


@pytest.mark.parametrize("layout", ["v4", "exact"])
def test_a_row_has_the_same_bits_in_any_chunk_and_any_batch(layout: str) -> None:
    config = tiny_config(21, "flash", head_dim=512, rope_dim=64, index_head_dim=128, index_topk=32)
    paged = Paged(DeepseekV4(config, random_tensors(config, 21)), layout)  # type: ignore[arg-type]
    prompt = torch.randint(config.vocab_size, (330,), generator=torch.Generator().manual_seed(21))
    whole = paged.prefill(prompt, 330)
    for chunk in (1, 7, 100, 256):
        assert torch.equal(paged.prefill(prompt, chunk), whole), f"chunks of {chunk}"
    ours, *others = [paged.sequence() for _ in range(4)]
    got = []
    for part in prompt.split(37):
        crowd = [(other, prompt[i : i + 1 + 3 * i]) for i, other in enumerate(others)]
        got.append(paged.step(crowd[0], (ours, part), *crowd[1:])[1])
    assert torch.equal(torch.cat(got), whole), "beside three other sequences"
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(paged.prefill(prompt, 256), whole), "with another thread count"
    finally:
        torch.set_num_threads(threads)
