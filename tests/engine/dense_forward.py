"""DeepSeek-V4 over a whole prompt at once, densely, with nothing cached: an independent judge of the paged engine.

Written from the published mathematics, sharing no code with `engine/`. In the packed layout keys are rounded before
anybody attends to them; `Stored` is that rounding, and the only difference between the layouts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from engine.config import ModelConfig


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.float()


def _frequencies(c: ModelConfig, ratio: int) -> Tensor:
    i = torch.arange(0, c.rope_dim, 2).float() / c.rope_dim
    if ratio == 0:
        return 1.0 / (c.rope_theta**i)
    f = 1.0 / (c.compress_rope_theta**i)

    def corner(turns: float) -> float:
        span = math.log(c.rope_original_positions / (turns * 2 * math.pi))
        return c.rope_dim * span / (2 * math.log(c.compress_rope_theta))

    low = max(math.floor(corner(c.rope_beta_fast)), 0)
    high = min(math.ceil(corner(c.rope_beta_slow)), c.rope_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(c.rope_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return f / c.rope_factor * ramp + f * (1 - ramp)


def _rope(x: Tensor, positions: Tensor, freqs: Tensor, sign: float = 1.0) -> Tensor:
    """x [T, ..., D]; rotates interleaved pairs of the trailing channels."""
    n = 2 * len(freqs)
    angle = positions.float()[:, None] * freqs
    angle = angle.view(len(positions), *(1,) * (x.dim() - 2), len(freqs))
    cos, sin = angle.cos(), angle.sin() * sign
    a, b = x[..., -n::2], x[..., -n + 1 :: 2]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-n], turned], -1)


def _power_of_two_scale(amax: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-4).double() / 448))).float()


def _e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def stored_latent(x: Tensor) -> Tensor:
    """What a latent row reads back as: e4m3 in groups of 64 below the rope channels, bfloat16 rope."""
    nope = x[:, :448].reshape(len(x), 7, 64)
    scale = _power_of_two_scale(nope.abs().amax(-1, keepdim=True))
    return torch.cat([_e4m3(nope, scale).reshape(len(x), 448), x[:, 448:].bfloat16().float()], -1)


def stored_index(x: Tensor) -> Tensor:
    return _e4m3(x, _power_of_two_scale(x.abs().amax(-1, keepdim=True)))


def _hadamard(x: Tensor) -> Tensor:
    n = x.shape[-1]
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return x @ h * n**-0.5


def _compress(c: ModelConfig, x: Tensor, w, ratio: int, dim: int, freqs: Tensor) -> Tensor:
    """Every closed block of the prompt, [T // ratio, dim]."""
    n = len(x) // ratio
    u = (x @ w("wkv.weight").float().T)[: n * ratio].view(n, ratio, -1)
    g = (x @ w("wgate.weight").float().T)[: n * ratio].view(n, ratio, -1) + w("ape").float()
    if ratio == 4:
        before_u = torch.cat([torch.zeros(1, 4, dim), u[:-1, :, :dim]])[:n]
        before_g = torch.cat([torch.full((1, 4, dim), -math.inf), g[:-1, :, :dim]])[:n]
        u, g = torch.cat([before_u, u[..., dim:]], 1), torch.cat([before_g, g[..., dim:]], 1)
    e = _norm((u * g.softmax(1)).sum(1), w("norm.weight"), c.rms_norm_eps)
    return _rope(e, torch.arange(n) * ratio, freqs)


class Stored:
    """What attention reads of each key, and which C4 rows it reads: here, what the packed layout would keep."""

    def latent(self, layer: int, pool: str, keys: Tensor) -> Tensor:
        """keys [rows, D] of one layer's `pool` ("window" or "compressed") -> what is attended to."""
        return stored_latent(keys)

    def index(self, layer: int, keys: Tensor) -> Tensor:
        return stored_index(keys)

    def choose(self, layer: int, scores: Tensor, chosen: Tensor) -> Tensor:
        """scores [T, rows] with -inf where not visible, chosen [T, rows] bool: the best of them -> those to read."""
        return chosen


def _attention(c: ModelConfig, layer: int, w, x: Tensor, stored: Stored | None, picks: dict[int, Tensor]) -> Tensor:
    T, ratio, pos = len(x), c.compress_ratios[layer], torch.arange(len(x))
    freqs = _frequencies(c, ratio)
    low = _norm(x @ w("attn.wq_a.weight").float().T, w("attn.q_norm.weight"), c.rms_norm_eps)
    q = (low @ w("attn.wq_b.weight").float().T).view(T, c.num_heads, c.head_dim)
    q = _rope(_norm(q, None, c.rms_norm_eps), pos, freqs)
    kv = _rope(_norm(x @ w("attn.wkv.weight").float().T, w("attn.kv_norm.weight"), c.rms_norm_eps), pos, freqs)
    kv = stored.latent(layer, "window", kv) if stored else kv
    keys, visible = kv, (pos[None] <= pos[:, None]) & (pos[None] > pos[:, None] - 128)
    if ratio:
        e = _compress(c, x, lambda n: w("attn.compressor." + n), ratio, c.head_dim, freqs)
        e = stored.latent(layer, "compressed", e) if stored else e
        closed = torch.arange(len(e))[None] < (pos[:, None] + 1) // ratio
        if ratio == 4:
            ik = _compress(c, x, lambda n: w("attn.indexer.compressor." + n), 4, c.index_head_dim, freqs)
            iq = (low @ w("attn.indexer.wq_b.weight").float().T).view(T, c.index_heads, c.index_head_dim)
            iq = _rope(iq, pos, freqs)
            if stored:
                iq, ik = _hadamard(iq), stored.index(layer, _hadamard(ik))
            weights = x @ w("attn.indexer.weights_proj.weight").float().T * (c.index_head_dim * c.index_heads) ** -0.5
            scores = torch.cat(
                [
                    ((a @ ik.T).relu() * b[..., None]).sum(1)
                    for a, b in zip(iq.split(128), weights.split(128), strict=True)
                ]
            )
            scores = scores.masked_fill(~closed, -math.inf)
            k = min(c.index_topk, len(e))
            chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
            closed &= torch.zeros_like(closed).scatter(1, chosen, True)
            if stored:
                closed = stored.choose(layer, scores, closed)
            picks[layer] = closed
        keys, visible = torch.cat([keys, e]), torch.cat([visible, closed], 1)
    out = []
    for a, mask in zip(q.split(128), visible.split(128), strict=True):
        logits = (torch.einsum("thd,sd->ths", a, keys) * c.head_dim**-0.5).masked_fill(~mask[:, None], -math.inf)
        sink = w("attn.attn_sink").float().view(1, -1, 1).expand(len(a), -1, 1)
        out.append(torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ keys)
    o = _rope(torch.cat(out), pos, freqs, -1.0)
    wo_a = w("attn.wo_a.weight").float().view(c.o_groups, c.o_lora_rank, -1)
    z = torch.einsum("tgi,goi->tgo", o.reshape(T, c.o_groups, -1), wo_a).flatten(1)
    return z @ w("attn.wo_b.weight").float().T


def _swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    gate, up = (x @ w1.float().T).clamp(max=limit), (x @ w3.float().T).clamp(-limit, limit)
    return (gate * torch.sigmoid(gate) * up) @ w2.float().T


def _moe(c: ModelConfig, layer: int, w, x: Tensor, ids: Tensor) -> Tensor:
    s = torch.nn.functional.softplus(x @ w("ffn.gate.weight").float().T).sqrt()
    if layer < c.num_hash_layers:
        picks = w("ffn.gate.tid2eid")[ids]
    else:
        picks = (s + w("ffn.gate.bias")).topk(c.experts_per_token).indices
    weights = s.gather(1, picks)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
    y = _swiglu(x, *(w(f"ffn.shared_experts.{n}.weight") for n in ("w1", "w3", "w2")), c.swiglu_limit)
    for e in range(c.num_experts):
        share = (weights * (picks == e)).sum(-1)
        rows = share.nonzero()[:, 0]
        expert = (w(f"ffn.experts.{n}")[e] for n in ("w1", "w3", "w2"))
        y[rows] += share[rows, None] * _swiglu(x[rows], *expert, c.swiglu_limit)
    return y


def _site(c: ModelConfig, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor):
    T, n = len(streams), c.hc_mult
    flat = _norm(streams.reshape(T, -1), None, c.rms_norm_eps)
    mix = flat @ fn.T
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(T, n, n).softmax(-1) + c.hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + c.hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    return (pre[..., None] * streams).sum(1), post, comb


@torch.inference_mode()
def dense_forward(
    c: ModelConfig, tensors: dict[str, Tensor], ids: Tensor, stored: Stored | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """ids [T] -> (logits [T, V], picks: layer -> [T, C4 rows] bool, the rows each query selected).

    Without `stored` keys are attended to as they are.
    """
    streams = tensors["embed.weight"].float()[ids][:, None].repeat(1, c.hc_mult, 1)
    picks: dict[int, Tensor] = {}
    for n in range(c.num_layers):

        def w(name: str, n: int = n) -> Tensor:
            return tensors[f"layers.{n}.{name}"]

        streams = _block(c, n, w, streams, ids, stored, picks)
    return _read_out(c, tensors, "", streams), picks


def _block(c: ModelConfig, n: int, w, streams: Tensor, ids: Tensor, stored: Stored | None, picks: dict[int, Tensor]):
    for site, norm in (("attn", "attn_norm"), ("ffn", "ffn_norm")):
        x, post, comb = _site(c, streams, *(w(f"hc_{site}_{p}") for p in ("fn", "base", "scale")))
        x = _norm(x, w(f"{norm}.weight"), c.rms_norm_eps)
        y = _attention(c, n, w, x, stored, picks) if site == "attn" else _moe(c, n, w, x, ids)
        streams = post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)
    return streams


def _read_out(c: ModelConfig, tensors: dict[str, Tensor], prefix: str, streams: Tensor) -> Tensor:
    fn, base, scale = (tensors[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
    flat = _norm(streams.reshape(len(streams), -1), None, c.rms_norm_eps)
    a = torch.sigmoid(flat @ fn.T * scale + base) + c.hc_eps
    h = _norm((a[..., None] * streams).sum(1), tensors[f"{prefix}norm.weight"], c.rms_norm_eps)
    return h @ tensors["head.weight"].float().T


@torch.inference_mode()
def dense_draft(c: ModelConfig, tensors: dict[str, Tensor], before: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """The draft layer over slots 0..T-1: before [T, 4, D] streams, following [T] each slot's next token.

    -> logits [T, V] of the token after `following`, and the layer's own streams [T, 4, D].
    """
    e = _norm(tensors["embed.weight"].float()[following], tensors["mtp.0.enorm.weight"], c.rms_norm_eps)
    h = _norm(before, tensors["mtp.0.hnorm.weight"], c.rms_norm_eps)
    e_proj, h_proj = (tensors[f"mtp.0.{name}.weight"].float() for name in ("e_proj", "h_proj"))
    streams = (e @ e_proj.T)[:, None] + h @ h_proj.T
    plain = replace(c, compress_ratios=(*c.compress_ratios, 0))
    streams = _block(plain, c.num_layers, lambda name: tensors[f"mtp.0.{name}"], streams, following, None, {})
    return _read_out(c, tensors, "mtp.0.", streams), streams
