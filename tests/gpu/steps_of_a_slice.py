"""Many captured decode steps of a slice of V4-Flash, made here from a seed."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from bench.step import captured, fill, flash, random_tensors, step
from engine.batch import StepMeta
from engine.cache.pools import KvPools, PoolSizes
from engine.kernels.device import use_cuda_products, use_early_launches
from engine.kernels.sample import How, draw
from engine.model.deepseek_v4 import DeepseekV4
from wire.types import SamplingParams

LAYERS, EXPERTS, REPLAYS = 5, 24, 20


def logits_and_tokens(
    model: DeepseekV4, ids: Tensor, meta: StepMeta, wanted: Tensor, pools: KvPools, how: Tensor
) -> tuple[Tensor, Tensor]:
    logits = model.forward(ids, meta, wanted, pools)
    return logits, draw(logits, how, True)


def digest(*, early: bool) -> str:
    """The SHA-256 of their logits and of tokens drawn; `early`: a kernel may begin while the one in front ends."""
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
    options = ({"temperature": 0}, {"temperature": 1}, {"top_k": 40}, {"top_k": 400, "top_p": 0.5})
    params = [SamplingParams(max_tokens=1, seed=n, **how) for n, how in enumerate(options)]
    for tokens, context in ((1, 4_096), (4, 4_100), (4, 65_537), (300, 5_000)):
        meta = step(pools, 1, tokens, context)
        ids = torch.arange(tokens, device="cuda") + 7
        wanted = torch.arange(max(0, tokens - 4), tokens, device="cuda")
        how = torch.from_numpy(How.of(params[: len(wanted)]).bits.view(np.int64)).cuda()

        graph, results = captured(logits_and_tokens, model, ids, meta, wanted, pools, how)
        for replay in range(REPLAYS):
            # Other tokens each time: what is read too early would else be what it was the time before, and right.
            ids.copy_((torch.arange(tokens, device="cuda") + 7 + 101 * replay) % config.vocab_size)
            graph.replay()
            for result in results:
                found.update(result.cpu().numpy().tobytes())
    return found.hexdigest()
