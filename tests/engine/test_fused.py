"""The forward pass in one C++ call against the composed one, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.batch import Segment, Sequence, StepMeta
from engine.config import KvLayout
from engine.kernels import native
from engine.model.deepseek_v4 import DeepseekV4
from engine.window import num_pages
from tests.engine.geometries import PATTERNS, random_tensors, tiny_config
from tests.engine.paged import GREEDY, Paged

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="the C++ kernels are not built here: python setup.py build_ext --inplace"
)


def fused_and_composed(seed: int, pattern: str, layout: KvLayout) -> list[Paged]:
    """The same model twice: as it runs, and composed kernel by kernel."""
    config = tiny_config(
        seed, pattern, head_dim=512, rope_dim=64, index_head_dim=128, index_topk=24, hidden_size=64, q_lora_rank=32
    )
    models = [DeepseekV4(config, random_tensors(config, seed)) for _ in range(2)]
    fused, composed = (Paged(model, layout, pages=50, slots=5) for model in models)
    assert fused.model.fused is not None
    composed.model.fused = None
    return [fused, composed]


def append(paged: Paged, sequence: Sequence, tokens: Tensor, wanted: Tensor) -> Tensor:
    end = sequence.length + len(tokens)
    sequence.pages += paged.pools.full.allocate(num_pages(end) - len(sequence.pages))
    paged.window.cover(sequence, sequence.length, end)
    segment = Segment(sequence=sequence, start=sequence.length, tokens=tokens.tolist(), sample=False)
    sequence.length = end
    return paged.model.forward(tokens, StepMeta.of([segment]), wanted, paged.pools)


def check_pools(one: Paged, other: Paged) -> None:
    for part in one.pools.classes:
        # Item 0 is a sink: what lies there means nothing. Nothing here reaches an item beyond the first dozen.
        items = list(range(1, min(12, part.regions[0].num_items)))
        assert torch.equal(one.pools.copy_out(part.name, items), other.pools.copy_out(part.name, items)), part.name


@pytest.mark.parametrize("layout", ["v4", "exact"])
@pytest.mark.parametrize(("seed", "pattern"), list(enumerate(PATTERNS)))
def test_one_call_gives_the_bits_of_the_composed_layers(seed: int, pattern: str, layout: KvLayout) -> None:
    """Logits, and every byte the steps leave in the pools: rows, rings and all."""
    pair = fused_and_composed(seed, pattern, layout)
    vocab = pair[0].model.config.vocab_size
    prompt = torch.randint(vocab, (300,), generator=torch.Generator().manual_seed(seed))
    sequences = [[paged.sequence() for _ in range(3)] for paged in pair]
    for lengths in ((130, 1, 7), (1, 1, 1), (100, 190, 3), (1, 5, 1)):
        parts = prompt.split([*lengths, 300 - sum(lengths)])[:3]
        got, want = (
            torch.cat(paged.step(*zip(own, parts, strict=True)))
            for paged, own in zip(pair, sequences, strict=True)
        )  # fmt: skip
        assert torch.equal(got, want)
    check_pools(*pair)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_nobody_wants_change_neither_logits_nor_pools(pattern: str) -> None:
    """The last layer attends for wanted rows alone; what it leaves for later tokens is complete all the same."""
    pair = fused_and_composed(7, pattern, "v4")
    vocab = pair[0].model.config.vocab_size
    prompt = torch.randint(vocab, (300,), generator=torch.Generator().manual_seed(7))
    sequences = [paged.sequence() for paged in pair]
    for part, rows in zip(prompt.split([100, 150, 49, 1]), ([4, 99], [], [48], [0]), strict=True):
        wanted = torch.tensor(rows, dtype=torch.int64)
        got, want = (append(paged, own, part, wanted) for paged, own in zip(pair, sequences, strict=True))
        assert got.shape == (len(rows), vocab)
        assert torch.equal(got, want)
    check_pools(*pair)


def test_the_streams_behind_the_last_layer_are_those_of_the_composed_layers() -> None:
    pair = fused_and_composed(3, "all", "v4")
    tokens = torch.arange(20)
    got, want = (
        paged.model.streams(
            tokens, StepMeta.of([Segment(sequence=own, start=0, tokens=tokens.tolist(), sample=False)]), paged.pools
        )
        for paged, own in (
            (paged, Sequence(request_id="", sampling=GREEDY, slot=1, pages=[1], swa_pages=[1])) for paged in pair
        )
    )
    assert torch.equal(got, want)


def test_a_broken_routing_table_is_refused() -> None:
    fused, _ = fused_and_composed(1, "flash", "v4")
    hashed = next(layer.moe for layer in fused.model.layers if layer.moe.table is not None)
    hashed.table[:] = 99  # type: ignore[index]
    with pytest.raises(ValueError, match="routed to an expert that does not exist"):
        append(fused, fused.sequence(), torch.tensor([1, 2]), torch.tensor([1]))
