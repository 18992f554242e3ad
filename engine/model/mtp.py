"""The draft layer (multi-token prediction): guesses the token behind the next one, which the model then verifies.

At position p it mixes the model's residual streams of token p with the embedding of token p + 1, runs one plain layer
over a window of 128 such mixtures, and guesses token p + 2 with the model's own head. Its own output streams stand in
for the model's when it guesses on.

The mixture needs token p + 1, so its row is kept at that token's place, p + 1: then a page's rows depend on nothing
behind the page, and a page may be shared by prompts that go on differently. Position 0 has no row. Only differences of
positions count in this layer, so it rotates by the place of the row.

Everything the layer needs to go on travels in the SWA pages: its rows, and beside them each page's `draft_state`

    [n, oldest, 0, 0, streams of token n - 1...]    float32

for the last n that was computed while n - 1 lay in this page. Rows from `oldest` to n - 1 are there. Where n is not the
sequence's length the state belongs to another time, because a worker without the draft layer went on from there; the
rows then begin anew. A state that is wrong costs accepted drafts, never a token.

Shapes: T tokens of B segments, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.batch import StepMeta
from engine.cache.pools import KvPools
from engine.config import ModelConfig
from engine.kernels.draft_state import keep, resume
from engine.kernels.hyper_connections import collapse, streams_of
from engine.kernels.linear import Fp8Weight, Matrix, linear
from engine.kernels.norm_rope import linears_of_normed
from engine.model.deepseek_v4 import DeepseekV4, Layer, take, window_rows
from engine.model.publish import quantise_fp8
from engine.model.weights import keep_fp8

HEAD_ROWS = 8_192
"""Of the head, rounded at once."""


def head_for_guesses(head: Matrix) -> Matrix:
    """The model's head; on a GPU in e4m3, of half the bytes. Reading it is most of what a guess takes there, and a
    guess that is rounded away costs an accepted draft, never a token.
    """
    if not (head.data.is_cuda and head.half and head.scales is None):
        return head
    return Matrix.prepare(rounded_to_fp8(head.data))


def rounded_to_fp8(weight: Tensor) -> Fp8Weight:
    """weight [N, K], a part of its rows after the other."""
    parts = [keep_fp8(*quantise_fp8(rows.float())) for rows in weight.split(HEAD_ROWS)]
    return Fp8Weight(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


class DraftLayer:
    """`mtp.0`, over the embedding and the head of the model it drafts for."""

    def __init__(self, model: DeepseekV4, tensors: dict[str, Tensor]) -> None:
        """Takes the layer's tensors by official name and removes them from the dict."""
        self.config: ModelConfig = model.config
        self.embedding, self.head = model.embedding, head_for_guesses(model.head)
        named = partial(take, tensors, "mtp.0.")
        plain = replace(self.config, compress_ratios=(*self.config.compress_ratios, 0))
        self.layer = Layer(plain, self.config.num_layers, named)
        self.e_proj, self.h_proj = Matrix.prepare(named("e_proj.weight")), Matrix.prepare(named("h_proj.weight"))
        self.enorm, self.hnorm, self.norm = (named(f"{name}.weight").float() for name in ("enorm", "hnorm", "norm"))
        self.head_fn, self.head_base, self.head_scale = (
            named(f"hc_head_{part}").float() for part in ("fn", "base", "scale")
        )

    @torch.inference_mode()
    def remember(
        self, streams: Tensor, token_ids: Tensor, meta: StepMeta, kept: Tensor, pools: KvPools
    ) -> tuple[Tensor, Tensor]:
        """Write the rows and states of a step's tokens: cheap, for a row needs neither attention nor experts.

        streams [T, 4, D], token_ids [T] int64   the step's
        kept    [B] int64                        tokens of each segment, from its start, that stay; at least 1
        ->      streams [B, 4, D] behind each segment's last kept token, and `oldest` [B] int64
        """
        token_ids, meta, kept = token_ids.to(streams.device), meta.to(streams.device), kept.to(streams.device)
        assert pools.draft_state is not None
        before, oldest = resume(streams, pools.draft_state, meta)
        rows, behind = keep(streams, pools.draft_state, meta, kept, oldest)
        window = pools.window[self.config.num_layers]
        self.layer.write_window(self._mix(token_ids, before), meta.positions, rows, window)
        return behind, oldest

    @torch.inference_mode()
    def guess(self, token_ids: Tensor, before: Tensor, meta: StepMeta, pools: KvPools) -> tuple[Tensor, Tensor]:
        """One guess for each of T sequences, behind a token that has one place more than `before`.

        token_ids [T] int64   at meta.positions, which are mapped; `meta.oldest` is set
        before    [T, 4, D]   the model's streams of the token before, or this layer's when it guesses on
        ->        logits [T, V] of the token after, and this layer's streams [T, 4, D]
        """
        c = self.config
        token_ids, meta = token_ids.to(before.device), meta.to(before.device)
        streams = streams_of(self.layer(self._mix(token_ids, before), token_ids, meta, window_rows(meta), pools))
        site = self.head_fn, self.head_base, self.head_scale
        return linear(collapse(streams, *site, c.rms_norm_eps, c.hc_eps, self.norm), self.head), streams

    def _mix(self, token_ids: Tensor, before: Tensor) -> Tensor:
        """[T, 4, D]: the embedding of a token added to each stream of the token before, both normed and projected."""
        eps = self.config.rms_norm_eps
        (e,) = linears_of_normed(self.embedding[token_ids].float(), self.enorm, eps, [self.e_proj])
        (h,) = linears_of_normed(before.flatten(0, 1), self.hnorm, eps, [self.h_proj])
        return e[:, None, :] + h.view(before.shape)
