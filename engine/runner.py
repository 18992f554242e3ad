"""Runs steps: batch -> tensors -> forward -> tokens. Used by one thread, the engine's."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import Sampled, Segment, Sequence, StepMeta
from engine.cache.pools import KvPools, PoolSizes, plan_sizes
from engine.config import C4_RATIO, EngineConfig, KvLayout, ModelConfig
from engine.kernels.sample import sample
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.weights import load_checkpoint
from engine.sampler import Draws
from wire.errors import ConfigError
from wire.types import PAGE_TOKENS, SamplingParams


class Runner:
    """One loaded model and its pools."""

    def __init__(self, config: EngineConfig, model: DeepseekV4, pools: KvPools, fingerprint: str) -> None:
        self.config = config
        self.model_config = model.config
        self.model = model
        self.pools = pools
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, config: EngineConfig) -> Runner:
        """Read the checkpoint, set up the pools and check that rows come out the same in any batch.

        Raises CheckpointError for a checkpoint that cannot be served, ConfigError for settings that cannot run.
        """
        if config.device != "cpu":
            raise ConfigError(f"device={config.device!r} is not supported by this build. Use --device cpu.")
        if config.dtype != "float32":
            raise ConfigError(
                f"dtype={config.dtype!r} is for GPUs: on a CPU activations are float32, and matrices already stay in "
                "the checkpoint's precision. Use --dtype float32."
            )
        torch.set_num_threads(config.threads)
        checkpoint = load_checkpoint(config.model)
        model_config = checkpoint.config
        check_layout(model_config, config.kv_layout)
        if config.max_context > model_config.max_positions:
            raise ConfigError(
                f"max_context={config.max_context} exceeds the checkpoint's max_position_embeddings="
                f"{model_config.max_positions}. Lower --max-context."
            )
        sizes = plan_sizes(model_config, config)
        model = DeepseekV4(model_config, checkpoint.tensors)
        check_row_independence(model, config.kv_layout)
        pools = KvPools(model_config, config.kv_layout, sizes, checkpoint.fingerprint, config.device)
        return cls(config, model, pools, checkpoint.fingerprint)

    @property
    def max_context(self) -> int:
        """Tokens one request may hold, prompt and answer: the model's reach or the pool's, whichever is less."""
        asked = self.config.max_context or self.model_config.max_positions
        return min(asked, self.model_config.max_positions, self.pools.full.capacity * PAGE_TOKENS)

    def run(self, batch: list[Segment]) -> list[Sampled | None]:
        """Compute every segment; one result per segment, None where no token was asked for."""
        wanted, rows = [], []
        last = -1
        for segment in batch:
            last += len(segment.tokens)
            if segment.sample:
                wanted.append(last)
                rows.append(self.draws_of(segment.sequence).row(segment.start + len(segment.tokens), segment.index))
        logits = self.logits(batch, torch.tensor(wanted, dtype=torch.int64))
        drawn = iter(sample(logits.numpy(), rows))
        return [next(drawn) if segment.sample else None for segment in batch]

    def draws_of(self, sequence: Sequence) -> Draws:
        """The sequence's part of the sampler, made when it is first asked for."""
        if sequence.draws is None:
            sequence.draws = Draws(sequence, (self.model_config.eos_token_id,))
        return sequence.draws

    def logits(self, batch: list[Segment], wanted: Tensor) -> Tensor:
        """[S, V] float32 logits of the `wanted` [S] int64 token rows, counted over the whole batch."""
        token_ids = torch.tensor([token for segment in batch for token in segment.tokens], dtype=torch.int64)
        return self.model.forward(token_ids, StepMeta.of(batch), wanted, self.pools)


def check_layout(model: ModelConfig, layout: KvLayout) -> None:
    """Raises ConfigError when the packed layout cannot hold this model's rows."""
    if layout != "v4":
        return
    index_dim = model.index_head_dim if model.layers_of(C4_RATIO) else 128
    if (model.head_dim, model.rope_dim, index_dim) != (512, 64, 128):
        raise ConfigError(
            f"kv_layout=v4 packs rows of head_dim 512, rope 64 and index head 128; this model has {model.head_dim}, "
            f"{model.rope_dim} and {index_dim}. Use --kv-layout exact."
        )


CHECK_TOKENS = 140
"""Just over one C128 block and the window, so that every kind of row is written, closed and read."""


def check_row_independence(model: DeepseekV4, layout: KvLayout) -> None:
    """Compute one prompt whole, and cut up beside another sequence; the logits must agree bit for bit.

    Reuse, batching and the split into prefill and decode all rest on this. It is a property of this machine's kernels
    as much as of the code, so it is checked where it will be used. Raises ConfigError.
    """
    config = model.config
    pools = KvPools(config, layout, PoolSizes(full=4, swa=4, slots=4), "self-check", "cpu")
    prompt = [(7919 * i + 13) % config.vocab_size for i in range(CHECK_TOKENS)]
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0)

    def sequence(item: int) -> Sequence:
        return Sequence(request_id="", sampling=greedy, slot=item, pages=[item], swa_pages=[item])

    def step(*parts: tuple[Sequence, int, int]) -> Tensor:
        batch = [Segment(sequence=s, start=a, tokens=prompt[a:b], sample=True) for s, a, b in parts]
        tokens = torch.tensor([token for segment in batch for token in segment.tokens])
        last = torch.tensor([len(segment.tokens) for segment in batch]).cumsum(0) - 1
        return model.forward(tokens, StepMeta.of(batch), last, pools)

    whole, cut, other = sequence(1), sequence(2), sequence(3)
    expected = step((whole, 0, CHECK_TOKENS))[0]
    step((cut, 0, 5), (other, 0, 131))
    step((other, 131, 132), (cut, 5, 127))
    for end in range(127, CHECK_TOKENS - 1):
        step((cut, end, end + 1))
    got = step((cut, CHECK_TOKENS - 1, CHECK_TOKENS), (other, 132, 133))[0]
    if not torch.equal(expected, got):
        raise ConfigError(
            f"this machine's kernels give a row different bits in different batches (largest difference "
            f"{(expected - got).abs().max():.3g}), so prefill and decode would not agree. "
            "Rebuild the CPU library with `make install`, and report the CPU model if that does not help."
        )
