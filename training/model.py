"""DeepSeek-V4 whole sequences at a time and differentiable: the served model's mathematics, without its cache.

Names, shapes and formats of the parameters come from the table the loader checks checkpoints with, rope tables from
the engine. What is here is what autograd must see: tests compare it with the engine and with transformers.

Shapes: B sequences of T tokens, D hidden, H query heads, K head size, R compressed rows, E experts, V vocabulary.
Matrix products take operands of `dtype`; norms, softmax, Sinkhorn, routing and the residual streams are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.config import C4_RATIO, WINDOW, ModelConfig
from engine.model.attention import layer_frequencies
from engine.model.survey import TensorSpec, tensor_table
from training import quantise

HEAD_CHUNK_TOKENS = 4096
"""Logits are made for this many tokens at a time: [4096, V] in float32 is 128 MB at V = 8192."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of everything learned; routed experts stacked, as the loader stacks them.

    Left out are the two tensors that are kept and not learned: `tid2eid`, a fixed table, and `gate.bias`, which
    balances experts by a rule of its own (`Transformer.balance`).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in tensor_table(config, mtp=config.draft_layer).items():
        if name.endswith((".scale", ".tid2eid", "gate.bias")):
            continue
        if ".experts." in name:
            at, _, rest = name.partition(".experts.")
            number, matrix, _ = rest.split(".")
            if number == "0":
                shapes[f"{at}.experts.{matrix}"] = (config.num_experts, *_stored_shape(spec))
        else:
            shapes[name] = _stored_shape(spec)
    return shapes


def kept_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of `tid2eid` tables and balancing biases."""
    table = tensor_table(config, mtp=config.draft_layer)
    return {name: spec.shape for name, spec in table.items() if name.endswith((".tid2eid", "gate.bias"))}


def _stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    return (spec.shape[0], 2 * spec.shape[1]) if spec.dtype == "I8" else spec.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How a forward pass computes.

    dtype       operands of matrix products
    quantised   weights pass through FP4 and FP8 as the checkpoint will hold them
    rows        KV rows and index keys pass through FP8 as the engine's pools will hold them (`kv_layout = "v4"`)
    sparse      C4 layers read the indexer's top k; else every visible row, and the indexer learns from all of them
    observe     measure what the indexer would miss
    recompute   activations of a layer are computed again in the backward pass instead of being kept
    query_chunk queries attended at once, a multiple of 128; 0: all
    """

    dtype: torch.dtype = torch.float32
    quantised: bool = False
    rows: bool = False
    sparse: bool = True
    observe: bool = False
    recompute: bool = False
    query_chunk: int = 0


@dataclass(slots=True)
class Observed:
    """What a pass leaves behind beside its streams.

    index_loss   sum over queries of KL(attention over C4 rows || indexer's softmax), by layer
    recall       by layer: (attention mass that the top k hold, summed over queries; those queries), where k of the
                 visible rows are not all of them
    experts      by layer: [E] picks
    """

    index_loss: dict[int, Tensor] = field(default_factory=dict)
    recall: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)


class Transformer:
    """Float32 master parameters by official name, and the passes over them."""

    def __init__(self, config: ModelConfig, parameters: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
        """`parameters` and `kept` as `parameter_shapes` and `kept_shapes` say; the model takes them as they are.

        Raises ValueError for a tensor that is missing, superfluous or of another shape.
        """
        for wanted, given in ((parameter_shapes(config), parameters), (kept_shapes(config), kept)):
            shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
            if shapes != wanted:
                wrong = sorted(name for name in wanted.keys() | shapes if wanted.get(name) != shapes.get(name))
                raise ValueError(f"{len(wrong)} tensors are not those of this model: {', '.join(wrong[:5])}, ...")
        self.config = config
        self.parameters = {name: tensor.float().requires_grad_() for name, tensor in parameters.items()}
        self.kept = {name: t.float() if t.is_floating_point() else t for name, t in kept.items()}
        device = self.parameters["embed.weight"].device
        ratios = (*config.compress_ratios, 0)  # the draft layer's
        self.ratios = ratios
        self.freqs = {ratio: layer_frequencies(config, ratio).to(device) for ratio in set(ratios)}
        specs = tensor_table(config, mtp=config.draft_layer)
        self.formats = {
            name: specs[f"{name.replace('.experts.', '.experts.0.')}.weight" if ".experts.w" in name else name].dtype
            for name in self.parameters
        }

    def begin(self, numerics: Numerics) -> Pass:
        """A pass over the parameters as they are now; weights are rounded once in it."""
        return Pass(self, numerics)

    @torch.no_grad()
    def balance(self, picks: dict[int, Tensor], speed: float) -> None:
        """Raise the bias of experts picked less than the mean and lower the others': layer -> [E] picks of a step."""
        for layer, counts in picks.items():
            bias = self.kept.get(f"{self.at(layer)}.ffn.gate.bias")
            if bias is not None:
                load = counts.to(bias.dtype)
                bias += speed * torch.sign(load.mean() - load)

    def at(self, layer: int) -> str:
        """The name before a layer's tensors; the draft layer comes after the last."""
        return f"layers.{layer}" if layer < self.config.num_layers else "mtp.0"


class Pass:
    """One forward pass. The streams it returns carry the graph; `observed` fills as layers run."""

    def __init__(self, model: Transformer, numerics: Numerics) -> None:
        self.model, self.config, self.numerics = model, model.config, numerics
        self.observed = Observed()
        self._rounded: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """The parameter as products take it: through its storage format if asked for, then in `dtype`."""
        if name not in self._rounded:
            value = self.model.parameters[name]
            if self.numerics.quantised:
                value = quantise.through(value, self.model.formats[name])
            self._rounded[name] = value.to(self.numerics.dtype)
        return self._rounded[name]

    def plain(self, name: str) -> Tensor:
        """A parameter that is used in float32."""
        value = self.model.parameters[name]
        return quantise.through(value, self.model.formats[name]) if self.numerics.quantised else value

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.to(self.numerics.dtype), self.weight(name))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return _norm(x, self.config.rms_norm_eps) * self.plain(f"{name}.weight")

    # From tokens to streams, from streams to losses.

    def streams(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> [B, T, 4, D] behind the last layer."""
        streams = self.plain("embed.weight")[ids][:, :, None, :].expand(-1, -1, self.config.hc_mult, -1)
        for layer in range(self.config.num_layers):
            streams = self._layer(layer, streams, ids)
        return streams

    def draft_streams(self, before: Tensor, following: Tensor) -> Tensor:
        """The draft layer's own streams: before [B, T, 4, D] of each token, following [B, T] the token behind it."""
        e = self.linear(self.norm(self.plain("embed.weight")[following], "mtp.0.enorm"), "mtp.0.e_proj.weight")
        h = self.linear(self.norm(before, "mtp.0.hnorm"), "mtp.0.h_proj.weight")
        return self._layer(self.config.num_layers, (e[:, :, None, :] + h).float(), following)

    def hidden(self, streams: Tensor, at: str = "") -> Tensor:
        """[..., 4, D] -> [..., D], collapsed and normed as the head reads them; `at` is "mtp.0." for a draft."""
        c = self.config
        mix = _norm(streams.flatten(-2), c.rms_norm_eps) @ self.plain(f"{at}hc_head_fn").T
        weights = torch.sigmoid(mix * self.plain(f"{at}hc_head_scale") + self.plain(f"{at}hc_head_base")) + c.hc_eps
        return self.norm((weights[..., None] * streams).sum(-2), f"{at}norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32."""
        return self.linear(hidden, "head.weight").float()

    def cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D], targets [B, T] int64, weights [B, T] -> weighted sum of losses in nats, and the likeliest
        tokens [B, T].
        """
        losses, likeliest = [], []
        head = self.weight("head.weight")
        pieces = zip(
            hidden.flatten(0, 1).split(HEAD_CHUNK_TOKENS), targets.flatten().split(HEAD_CHUNK_TOKENS), strict=True
        )
        for part, target in pieces:
            loss, best = self._kept_small(_token_losses, part.to(self.numerics.dtype), head, target)
            losses.append(loss)
            likeliest.append(best)
        return (torch.cat(losses) * weights.flatten()).sum(), torch.cat(likeliest).view_as(targets)

    def _kept_small(self, function: Callable[..., tuple[Tensor, ...]], *arguments: object) -> tuple[Tensor, ...]:
        """Calls `function`, keeping its arguments for the backward pass and nothing between."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        result: tuple[Tensor, ...] = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return result

    # One layer.

    def _layer(self, layer: int, streams: Tensor, ids: Tensor) -> Tensor:
        if self.numerics.recompute and torch.is_grad_enabled():
            at = self.model.at(layer)
            for name in self.model.parameters:
                if name.startswith(f"{at}."):
                    self.weight(name)  # rounded outside, or the second run would round again
            result: Tensor = checkpoint(self._block, layer, streams, ids, use_reentrant=False, preserve_rng_state=False)
            return result
        return self._block(layer, streams, ids)

    def _block(self, layer: int, streams: Tensor, ids: Tensor) -> Tensor:
        at = self.model.at(layer)
        x, post, comb = self._mix_in(f"{at}.hc_attn", streams)
        streams = _mix_out(self._attention(layer, self.norm(x, f"{at}.attn_norm")), streams, post, comb)
        x, post, comb = self._mix_in(f"{at}.hc_ffn", streams)
        return _mix_out(self._experts(layer, self.norm(x, f"{at}.ffn_norm"), ids), streams, post, comb)

    def _mix_in(self, site: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, T, 4, D] -> x [B, T, D], post [B, T, 4], comb [B, T, 4, 4] of one hyper-connection site."""
        c, n = self.config, self.config.hc_mult
        base, scale = self.plain(f"{site}_base"), self.plain(f"{site}_scale")
        mix = _norm(streams.flatten(-2), c.rms_norm_eps) @ self.plain(f"{site}_fn").T
        pre = torch.sigmoid(mix[..., :n] * scale[0] + base[:n]) + c.hc_eps
        post = 2 * torch.sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = (mix[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
        return (pre[..., None] * streams).sum(-2), post, sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)

    # Attention.

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        c, numerics = self.config, self.numerics
        at, ratio = f"{self.model.at(layer)}.attn", self.model.ratios[layer]
        turns = _Turns.of(torch.arange(x.shape[1], device=x.device), self.model.freqs[ratio])
        low = self.norm(self.linear(x, f"{at}.wq_a.weight"), f"{at}.q_norm")
        q = self.linear(low, f"{at}.wq_b.weight").unflatten(-1, (c.num_heads, c.head_dim))
        q = turns.turn(_norm(q, c.rms_norm_eps))
        keys = self._latent(turns.turn(self.norm(self.linear(x, f"{at}.wkv.weight"), f"{at}.kv_norm")))
        rows, index = None, None
        if ratio:
            rows = self._latent(self._compress(x, f"{at}.compressor", ratio, c.head_dim))
        if ratio == C4_RATIO:
            index = self._index(x.detach(), low.detach(), f"{at}.indexer", turns)
        rule = _Rule(ratio, c.index_topk, numerics.sparse, numerics.observe)
        out, watched = self._attend(q, keys, rows, index, self.plain(f"{at}.attn_sink"), rule)
        if index is not None:
            self.observed.index_loss[layer] = watched[0]
            self.observed.recall[layer] = watched[1], watched[2]
        out = turns.turn(out, inverse=True).to(numerics.dtype)
        wo_a = self.weight(f"{at}.wo_a.weight").view(c.o_groups, c.o_lora_rank, -1)
        grouped = torch.einsum("btgi,goi->btgo", out.flatten(2).unflatten(-1, (c.o_groups, -1)), wo_a)
        return self.linear(grouped.flatten(2), f"{at}.wo_b.weight").float()

    def _latent(self, rows: Tensor) -> Tensor:
        """What a pool gives back of latent rows."""
        return quantise.latent_rows(rows, self.config.rope_dim) if self.numerics.rows else rows

    def _compress(self, x: Tensor, at: str, ratio: int, size: int) -> Tensor:
        """The row of every whole block of `ratio` tokens: x [B, T, D] -> [B, T // ratio, size], rotated."""
        blocks = x.shape[1] // ratio
        if blocks == 0:
            return x.new_zeros(x.shape[0], 0, size)
        x = x[:, : blocks * ratio]
        u = self.linear(x, f"{at}.wkv.weight").float().unflatten(1, (blocks, ratio))
        g = self.linear(x, f"{at}.wgate.weight").float().unflatten(1, (blocks, ratio)) + self.plain(f"{at}.ape")
        if ratio == C4_RATIO:
            # A block reads the block before it through the first half of the channels, itself through the second.
            u = torch.cat([F.pad(u[:, :-1, :, :size], (0, 0, 0, 0, 1, 0)), u[..., size:]], dim=2)
            before = F.pad(g[:, :-1, :, :size], (0, 0, 0, 0, 1, 0), value=-torch.inf)
            g = torch.cat([before, g[..., size:]], dim=2)
        rows = self.norm((u * g.softmax(dim=2)).sum(2), f"{at}.norm")
        places = torch.arange(blocks, device=x.device) * ratio
        return _Turns.of(places, self.model.freqs[ratio]).turn(rows)

    def _index(self, x: Tensor, low: Tensor, at: str, turns: _Turns) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, J], head weights [B, T, H] and keys [B, R, J] of the indexer.

        Its input is detached: it learns to copy attention, and must not bend the model for that.
        """
        c = self.config
        q = turns.turn(self.linear(low, f"{at}.wq_b.weight").unflatten(-1, (c.index_heads, c.index_head_dim)).float())
        weights = self.linear(x, f"{at}.weights_proj.weight").float() * (c.index_head_dim * c.index_heads) ** -0.5
        keys = self._compress(x, f"{at}.compressor", C4_RATIO, c.index_head_dim)
        if self.numerics.rows:
            # Stored keys are Hadamard-turned before FP8, and queries turn with them.
            q, keys = quantise.hadamard(q), quantise.index_rows(quantise.hadamard(keys))
        return q, weights, keys

    def _attend(
        self,
        q: Tensor,
        keys: Tensor,
        rows: Tensor | None,
        index: tuple[Tensor, Tensor, Tensor] | None,
        sink: Tensor,
        rule: _Rule,
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K], keys [B, T, K], rows [B, R, K] -> [B, T, H, K] float32, and the three sums of `_attend`."""
        tokens = q.shape[1]
        q, keys = (F.pad(t.to(self.numerics.dtype), (0, 0) * (t.dim() - 2) + (0, -tokens % WINDOW)) for t in (q, keys))
        rows = None if rows is None else rows.to(self.numerics.dtype)
        q, keys = q.unflatten(1, (-1, WINDOW)), keys.unflatten(1, (-1, WINDOW))
        # Every query's window lies in its own 128 tokens and the 128 before.
        keys = torch.cat([F.pad(keys[:, :-1], (0, 0, 0, 0, 1, 0)), keys], dim=2)
        chunk = self.numerics.query_chunk // WINDOW or q.shape[1]
        outs, sums = [], torch.zeros(3, device=q.device)
        for first in range(0, q.shape[1], chunk):
            last = min(first + chunk, q.shape[1])
            asked = None
            if index is not None:
                tail = slice(first * WINDOW, last * WINDOW)
                asked = index[0][:, tail], index[1][:, tail], index[2]
            parts = (q[:, first:last], keys[:, first:last], rows, asked, sink, first * WINDOW, tokens, rule)
            if chunk < q.shape[1]:
                out, seen = self._kept_small(_attend, *parts)
            else:
                out, seen = _attend(*parts)
            outs.append(out)
            sums = sums + seen
        return torch.cat(outs, dim=1)[:, :tokens], sums

    # Experts.

    def _experts(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]: the shared expert and the picked ones."""
        c, at = self.config, f"{self.model.at(layer)}.ffn"
        flat = x.flatten(0, 1)
        scores = F.softplus(flat @ self.plain(f"{at}.gate.weight").T).sqrt()
        table = self.model.kept.get(f"{at}.gate.tid2eid")
        if table is not None:
            picks = table[ids.flatten()]
        else:
            picks = (scores.detach() + self.model.kept[f"{at}.gate.bias"]).topk(c.experts_per_token).indices
        weights = scores.gather(1, picks)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        chosen = picks.flatten()
        counts = chosen.new_zeros(c.num_experts).scatter_add(0, chosen, torch.ones_like(chosen))  # bincount would wait
        self.observed.experts[layer] = counts
        order = chosen.argsort(stable=True)
        tokens, ends = order // c.experts_per_token, counts.cumsum(0).int()
        w1, w3, w2 = (self.weight(f"{at}.experts.{name}").transpose(1, 2) for name in ("w1", "w3", "w2"))
        asked = flat[tokens].to(self.numerics.dtype)
        inner = swiglu(F.grouped_mm(asked, w1, offs=ends), F.grouped_mm(asked, w3, offs=ends), c.swiglu_limit)
        answers = F.grouped_mm(inner, w2, offs=ends).float() * weights.flatten()[order, None]
        routed = torch.zeros_like(flat).index_add(0, tokens, answers)
        gate, up = (self.linear(x, f"{at}.shared_experts.{name}.weight") for name in ("w1", "w3"))
        shared = self.linear(swiglu(gate, up, c.swiglu_limit), f"{at}.shared_experts.w2.weight")
        return routed.view_as(x) + shared.float()


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits [..., from, to] -> doubly stochastic, of the same shape; the last of the rounds ends on columns.

    Computed with the tokens innermost: sums over four neighbours would leave most lanes idle.
    """
    comb = logits.flatten(0, -3).permute(1, 2, 0).contiguous().softmax(dim=1) + eps
    comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
    return comb.permute(2, 0, 1).contiguous().view(logits.shape)


def _mix_out(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y [B, T, D], streams [B, T, 4, D] -> [B, T, 4, D]; comb is summed over its first index."""
    return post[..., None] * y[..., None, :] + comb.transpose(-1, -2) @ streams


def _norm(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)


@dataclass(frozen=True, slots=True)
class _Turns:
    """Cosines and sines [T, pairs] of tokens at given positions."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, freqs: Tensor) -> _Turns:
        angle = positions.float()[:, None] * freqs  # one rounded product, as the engine rotates
        return cls(angle.cos(), angle.sin())

    def turn(self, x: Tensor, inverse: bool = False) -> Tensor:
        """x [B, T, ..., size]: its trailing channel pairs (2i, 2i + 1) rotated."""
        shape = (len(self.cos), *(1,) * (x.dim() - 3), self.cos.shape[1])
        cos, sin = self.cos.view(shape), self.sin.view(shape) * (-1 if inverse else 1)
        still, turning = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
        even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return torch.cat([still, turned.flatten(-2)], dim=-1)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which rows a query may read."""

    ratio: int
    topk: int
    sparse: bool
    observe: bool


def _attend(
    q: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    index: tuple[Tensor, Tensor, Tensor] | None,
    sink: Tensor,
    start: int,
    end: int,
    rule: _Rule,
) -> tuple[Tensor, Tensor]:
    """Attention of some blocks of 128 queries over their windows, rows and a sink: one softmax, keys are values.

    q [B, N, 128, H, K] from position `start` on, those from `end` on are padding; keys [B, N, 256, K] each block's own
    tokens and the 128 before; rows [B, R, K]; index queries [B, t, J heads, J], weights [B, t, J heads], keys [B, R, J]
    -> [B, N * 128, H, K] float32, and [KL sum, recalled mass, queries it was taken over]
    """
    batch, blocks, _, heads, size = q.shape
    positions = start + torch.arange(blocks * WINDOW, device=q.device).view(blocks, WINDOW)
    behind = torch.arange(2 * WINDOW, device=q.device) - WINDOW  # of the block's first token
    own = torch.arange(WINDOW, device=q.device)
    near = (behind <= own[:, None]) & (behind > own[:, None] - WINDOW)  # [128, 256]
    near = near & (positions[:, :1, None] + behind >= 0)  # [N, 128, 256]
    scale = size**-0.5
    stacked = q.flatten(2, 3)  # [B, N, 128 * H, K]
    window = ((stacked @ keys.transpose(-1, -2)).float() * scale).unflatten(2, (WINDOW, heads))
    window = window.masked_fill(~near[:, :, None, :], -torch.inf)
    sinks = sink.view(1, 1, 1, heads, 1).expand(batch, blocks, WINDOW, heads, 1)
    seen = torch.zeros(3, device=q.device)
    if rows is None or rows.shape[1] == 0:
        weights = torch.cat([window, sinks], dim=-1).softmax(-1)[..., :-1].to(q.dtype)
        return (weights.flatten(2, 3) @ keys).float().view(batch, blocks * WINDOW, heads, size), seen
    count = rows.shape[1]
    closed = torch.arange(count, device=q.device) < (positions[..., None] + 1) // rule.ratio  # [N, 128, R]
    closed = closed.expand(batch, -1, -1, -1)
    far = (stacked.flatten(1, 2) @ rows.transpose(-1, -2)).float() * scale
    far = far.view(batch, blocks, WINDOW, heads, count)
    allowed = closed
    if index is not None:
        scores = _scores(*index, blocks, closed)
        picked = _top(scores.detach(), closed, rule.topk)
        allowed = picked if rule.sparse else closed
    weights = torch.cat([window, far.masked_fill(~allowed[:, :, :, None, :], -torch.inf), sinks], dim=-1).softmax(-1)
    near_weights, far_weights, _ = weights.split([2 * WINDOW, count, 1], dim=-1)
    out = (near_weights.to(q.dtype).flatten(2, 3) @ keys).flatten(1, 2)
    out = out + far_weights.to(q.dtype).flatten(1, 3) @ rows
    if index is not None:
        real = positions < end
        seen = torch.cat([_divergence(far_weights.detach(), scores, allowed, real).view(1), seen[1:]])
        if rule.observe:
            with torch.no_grad():
                all_weights = torch.cat([window, far.masked_fill(~closed[:, :, :, None, :], -torch.inf), sinks], -1)
                mass = all_weights.softmax(-1)[..., 2 * WINDOW : -1].sum(3)
                asked = (closed.sum(-1) > rule.topk) & real
                kept = (mass * picked).sum(-1) / mass.sum(-1).clamp(min=1e-20)
                recalled = (kept * asked).sum(), asked.sum().float()
            seen = torch.stack([seen[0], *recalled])
    return out.float().view(batch, blocks * WINDOW, heads, size), seen


def _scores(q: Tensor, weights: Tensor, keys: Tensor, blocks: int, closed: Tensor) -> Tensor:
    """The indexer's score of every row for every query, -inf where the row is not closed yet: [B, N, 128, R]."""
    missing = blocks * WINDOW - q.shape[1]
    products = (q.flatten(1, 2) @ keys.transpose(-1, -2)).relu().unflatten(1, (q.shape[1], -1))
    scores = torch.einsum("bth,bthr->btr", weights, products)
    return F.pad(scores, (0, 0, 0, missing)).view_as(closed).masked_fill(~closed, -torch.inf)


def _top(scores: Tensor, closed: Tensor, k: int) -> Tensor:
    """[..., R] bool: the k best closed rows, or all of them; of equal scores the lower rows, as the engine chooses."""
    if scores.shape[-1] <= k:
        return closed
    last = scores.topk(k, dim=-1).values[..., -1:]
    above, equal = scores > last, scores == last
    room = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & closed


def _divergence(attention: Tensor, scores: Tensor, allowed: Tensor, real: Tensor) -> Tensor:
    """Sum over queries of KL(attention over the allowed rows, all heads together || softmax of the scores there).

    attention [B, N, 128, H, R], scores and allowed [B, N, 128, R], real [N, 128]
    """
    mass = attention.sum(3)
    target = mass / mass.sum(-1, keepdim=True).clamp(min=1e-20)
    # A query without rows has nothing to learn; finite numbers keep its gradient from becoming 0 * inf.
    some = allowed.any(-1) & real
    guess = scores.masked_fill(~allowed, -torch.inf).masked_fill(~some[..., None], 0.0).log_softmax(-1)
    terms = torch.where(target > 0, target * (target.clamp(min=1e-30).log() - guess), 0.0)
    return (terms.masked_fill(~allowed, 0.0).sum(-1) * some).sum()
