"""Many captured decode steps of a slice of V4-Flash, made here from a seed."""

from __future__ import annotations

import hashlib

import torch

from bench.step import fill, flash, random_tensors, step
from engine.cache.pools import KvPools, PoolSizes
from engine.kernels.device import use_cuda_products, use_early_launches
from engine.model.deepseek_v4 import DeepseekV4

LAYERS, EXPERTS, REPLAYS = 5, 24, 20


def digest(*, early: bool) -> str:
    """The SHA-256 of their logits; `early`: a kernel may begin while the one in front ends."""
    torch.manual_seed(0)
    use_cuda_products(True)
    use_early_launches(early)
    config = flash(LAYERS, EXPERTS)
    model = DeepseekV4(config, random_tensors(config))  # type: ignore[arg-type]
    pools = KvPools(config, "v4", PoolSizes(full=300, swa=8, slots=4), "slice", "cuda")
    for kind in (pools.window, pools.c4, pools.index, pools.c128):
        for pool in kind.values():
            fill(pool)
    found = hashlib.sha256()
    for tokens, context in ((1, 4_096), (4, 4_100), (4, 65_537)):
        meta = step(pools, 1, tokens, context)
        ids, wanted = torch.arange(tokens, device="cuda") + 7, torch.arange(tokens, device="cuda")
        for _ in range(2):
            model.forward(ids, meta, wanted, pools)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model.forward(ids, meta, wanted, pools)
        for replay in range(REPLAYS):
            # Other tokens each time: what is read too early would else be what it was the time before, and right.
            ids.copy_((torch.arange(tokens, device="cuda") + 7 + 101 * replay) % config.vocab_size)
            graph.replay()
            found.update(logits.cpu().numpy().tobytes())
    return found.hexdigest()
