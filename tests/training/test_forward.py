"""The trainer's forward pass against the engine's dense judge: the draft layer, and rows as the pools keep them."""

from __future__ import annotations

import torch

from tests.engine.dense_forward import Stored, dense_draft, dense_forward
from tests.engine.geometries import random_tensors, tiny_config
from tests.engine.speculation import drafting_model
from tests.training.test_gradients import of
from training.model import Numerics


def test_the_draft_layer_guesses_what_the_served_one_guesses() -> None:
    config, tensors = drafting_model(41, "all", hidden_size=64, moe_intermediate_size=32)
    ids = torch.randint(config.vocab_size, (1, 301), generator=torch.Generator().manual_seed(41))
    run = of(config, tensors).begin(Numerics())
    with torch.no_grad():
        streams = run.streams(ids[:, :-1])
        drafted = run.draft_streams(streams, ids[:, 1:])
        got = run.logits(run.hidden(drafted, "mtp.0."))[0]
    want, want_streams = dense_draft(config, tensors, streams[0], ids[0, 1:])
    assert (drafted[0] - want_streams).abs().max() < 1e-4
    assert (got - want).abs().max() < 1e-4
    assert run.observed.experts[config.num_layers].sum() == 300 * config.experts_per_token


def test_rows_are_attended_to_as_the_pools_keep_them() -> None:
    """Of one layer only: above it a key that rounds to its other neighbour would turn more keys over."""
    sizes = {"head_dim": 512, "rope_dim": 64, "index_head_dim": 128, "hidden_size": 64, "moe_intermediate_size": 32}
    config = tiny_config(42, "c4", compress_ratios=(4,), index_topk=16, **sizes)
    tensors = random_tensors(config, 42)
    ids = torch.randint(config.vocab_size, (300,), generator=torch.Generator().manual_seed(42))
    want, _ = dense_forward(config, tensors, ids, Stored())
    model, errors = of(config, tensors), []
    for rows in (True, False):
        run = model.begin(Numerics(rows=rows))
        with torch.no_grad():
            got = run.logits(run.hidden(run.streams(ids[None])))[0]
        # Of two values or rows as near, another may be taken: all but one token in fifty count.
        errors.append((got - want).abs().amax(-1).sort().values[: 49 * len(ids) // 50].max().item())
    assert errors[0] < 2e-3
    assert errors[1] > 10 * errors[0], "unrounded rows are told apart"
