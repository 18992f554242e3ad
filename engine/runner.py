"""Runs steps: batch -> tensors -> forward -> tokens. Used by one thread, the engine's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import Chain, Drawn, Sampled, Segment, Sequence, StepMeta, Tables
from engine.cache.pools import KvPools, PoolSizes, plan_sizes
from engine.config import C4_RATIO, EngineConfig, KvLayout, ModelConfig
from engine.constraint import Grammars
from engine.kernels.device import backends, require, use_cuda_products
from engine.kernels.sample import ANYHOW, DRAWN, UNSURE, How, sample_rows, score
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.mtp import DraftLayer
from engine.model.weights import load_checkpoint
from engine.sampler import Draws
from engine.steps import GraphStep, SingleStep, Step, StepGraphs, token_ids
from wire.errors import ConfigError
from wire.types import PAGE_TOKENS, SamplingParams

SCORED_ROWS = 64
"""Rows of logits made at once where a prompt's log probabilities are asked for: 32 MiB of a vocabulary of 129,280."""


WARM_UP_TOKENS = (1, 2, 4, 12, 40, 200, 300)
"""Steps of one token, of a few, of up to 16, 64, 255 and more run different kernels on a GPU."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A step that is ready to run: as much of it as could be known while the one before was running."""

    batch: list[Segment]
    tables: Tables


class Runner:
    """One loaded model and its pools."""

    def __init__(
        self,
        config: EngineConfig,
        model: DeepseekV4,
        pools: KvPools,
        fingerprint: str,
        draft: DraftLayer | None = None,
    ) -> None:
        self.config = config
        self.model_config = model.config
        self.model = model
        self.pools = pools
        self.fingerprint = fingerprint
        self.grammars = Grammars(config.model, model.config.vocab_size, (model.config.eos_token_id,))
        self.draft = draft
        self.graphs = StepGraphs(model, draft, pools) if config.device == "cuda" and config.graphs else None
        self._chain = Chain(model.config.eos_token_id)

    @classmethod
    def load(cls, config: EngineConfig) -> Runner:
        """Read the checkpoint, set up the pools and check that rows come out the same in any batch.

        Raises CheckpointError for a checkpoint that cannot be served, ConfigError for settings that cannot run.
        """
        if config.device == "cuda":
            require(config.device)
            use_cuda_products(config.kernels == "cuda")
            backends.choose(config.backends, torch.cuda.get_device_capability())
        elif config.backends not in (backends.AUTO, backends.OWN):
            raise ConfigError(
                f"backends={config.backends!r} is for GPUs: on a CPU there are our own kernels alone. Leave it out."
            )
        elif config.dtype == "bfloat16":
            raise ConfigError(
                f"dtype={config.dtype!r} is for GPUs: on a CPU activations are float32, and matrices already stay in "
                "the checkpoint's precision. Use --dtype float32."
            )
        torch.set_num_threads(config.threads)
        checkpoint = load_checkpoint(config.model, draft=config.draft, quantised=config.half)
        model_config = checkpoint.config
        check_layout(model_config, config.kv_layout)
        if config.max_context > model_config.max_positions:
            raise ConfigError(
                f"max_context={config.max_context} exceeds the checkpoint's max_position_embeddings="
                f"{model_config.max_positions}. Lower --max-context."
            )
        sizes = plan_sizes(model_config, config)
        if config.device == "cuda":
            move(checkpoint.tensors, config.device, half=config.half)
        model = DeepseekV4(model_config, checkpoint.tensors)
        draft = DraftLayer(model, checkpoint.tensors) if config.draft and model_config.draft_layer else None
        check_row_independence(model, config.kv_layout, config.device)
        pools = KvPools(model_config, config.kv_layout, sizes, checkpoint.fingerprint, config.device)
        runner = cls(config, model, pools, checkpoint.fingerprint, draft)
        if config.device == "cuda":
            runner.warm_up()
        return runner

    def warm_up(self) -> None:
        """Run steps of every kind of size, at the beginning and at the end of the longest context, so that no request
        waits for kernels to be compiled. A page stands for all of a context's: what it holds, nobody looks at.
        """
        greedy, guesses, pools = SamplingParams(max_tokens=1, seed=0, temperature=0), 2, self.pools
        slot, page, swa_page = (pool.allocate(1) for pool in (pools.slots, pools.full, pools.swa))
        width = -(-self.max_context // PAGE_TOKENS)
        sequence = Sequence(
            request_id="warm-up", sampling=greedy, slot=slot[0], pages=page * width, swa_pages=swa_page * width
        )
        for tokens in (n for n in WARM_UP_TOKENS if n + guesses <= self.max_context):
            for start in {0, max(0, self.max_context - tokens - guesses)}:
                for _ in range(1 if self.graphs is None else 2):  # a graph is captured the second time
                    self.step(
                        [Segment(sequence=sequence, start=start, tokens=[3] * tokens, sample=True, guesses=guesses)]
                    )
        for pool, taken in ((pools.slots, slot), (pools.full, page), (pools.swa, swa_page)):
            pool.release(taken)

    @property
    def max_context(self) -> int:
        """Tokens one request may hold, prompt and answer: the model's reach or the pool's, whichever is less."""
        asked = self.config.max_context or self.model_config.max_positions
        return min(asked, self.model_config.max_positions, self.pools.full.capacity * PAGE_TOKENS)

    def run(self, batch: list[Segment]) -> list[Sampled | None]:
        """Compute every segment; one result per segment, None where no token was asked for. No drafts."""
        return [drawn.tokens[0] if drawn.tokens else None for drawn in self.step(batch)]

    def step(self, batch: list[Segment]) -> list[Drawn]:
        """Prepare and execute."""
        return self.execute(self.prepare(batch))

    def prepare(self, batch: list[Segment]) -> Plan:
        """Everything about a step that does not depend on the step before it. May run while that one does, on another
        thread: it reads the sequences, and touches neither the pools nor the model.
        """
        for segment in batch:
            if segment.sample or segment.following:
                self._draws_of(segment.sequence)
        return Plan(batch, Tables.of(batch))

    def execute(self, plan: Plan) -> list[Drawn]:
        """Compute every segment, verify the drafts in them, and guess on where asked to. Plans are executed in the
        order they were made; a segment that turns out to have no token to compute draws nothing.

        A draft is kept if it is what is drawn at its place, with the noise and the options of that place: so tokens
        come out as without drafts, only several at a time.
        """
        bound = self._chain.bind(plan.batch)
        going = [b for b, segment in enumerate(bound) if segment is not None]
        results = [Drawn()] * len(bound)
        if going:
            batch = [segment for segment in bound if segment is not None]
            for b, drawn in zip(going, self._compute(batch, plan.tables.only(going)), strict=True):
                results[b] = drawn
        self._chain.drawn(bound, results)
        if self.config.device == "cuda":
            torch.cuda.current_stream().synchronize()  # a step that draws nothing is over with its last kernel, too
        return results

    def _compute(self, batch: list[Segment], tables: Tables) -> list[Drawn]:
        step = self.graphs.step(batch, tables) if self.graphs is not None else None
        if step is not None and self._plain(batch) and step.takes():
            return self._at_once(step, batch)
        return self._by_turns(step or SingleStep(self.model, self.draft, self.pools, batch, tables), batch, tables)

    def _plain(self, batch: list[Segment]) -> bool:
        return all(self._draws_of(s.sequence).is_plain(s.index) for s in batch if s.sample)

    def _at_once(self, step: GraphStep, batch: list[Segment]) -> list[Drawn]:
        """For draws of which all is known before."""
        came = step.drawn(How.all_of([self._draws_of(s.sequence).how if s.sample else ANYHOW for s in batch]))
        results = []
        end = 0
        for segment, guesses in zip(batch, came.guesses, strict=True):
            end += len(segment.tokens)
            tokens: list[Sampled] = []
            drafts = segment.tokens[len(segment.tokens) - segment.drafts :]
            first = end - segment.drafts - 1
            for i in range(segment.drafts + 1) if segment.sample else ():
                token, state = came.drawn[first + i]
                if state == UNSURE:
                    place = segment.start + len(segment.tokens) - segment.drafts + i
                    row = self._draws_of(segment.sequence).row(place, segment.index + i)
                    tokens += sample_rows(step.row(first + i), [row])
                else:
                    tokens.append(Sampled(token_id=token, logprob=0.0, ok=state == DRAWN))
                # The step has gone no further.
                if state != DRAWN or i == segment.drafts or token != drafts[i]:
                    break
            results.append(Drawn(tuple(tokens), tuple(guesses), segment.drafts))
        return results

    def _by_turns(self, step: Step, batch: list[Segment], tables: Tables) -> list[Drawn]:
        """The step and the host, which draws, wait for each other."""
        wanted, rows = [], []
        end = 0
        for segment in batch:
            end += len(segment.tokens)
            if segment.sample:
                committed = len(segment.tokens) - segment.drafts
                for i in range(segment.drafts + 1):
                    wanted.append(end - segment.drafts - 1 + i)
                    place, drafts = segment.start + committed + i, segment.tokens[committed : committed + i]
                    rows.append(self._draws_of(segment.sequence).row(place, segment.index + i, drafts))
        logits = step.logits(wanted)
        if any(segment.following for segment in batch):
            self._score(batch, step.streams())
        drawn = iter(sample_rows(logits, rows))
        tokens: list[tuple[Sampled, ...]] = [
            _agreed(s, [next(drawn) for _ in range(s.drafts + 1)]) if s.sample else () for s in batch
        ]
        for segment, agreed in zip(batch, tokens, strict=True):
            if segment.sample:
                self._draws_of(segment.sequence).push([sampled.token_id for sampled in agreed if sampled.ok])
        for b, segment in enumerate(batch):
            if segment.sample and segment.index == 0 and segment.sequence.sampling.prompt_logprobs is not None:
                first, *others = tokens[b]
                tokens[b] = (replace(first, prompt=self._draws_of(segment.sequence).prompt_scores()), *others)
        guesses: list[tuple[int, ...]] = [()] * len(batch)
        if self.draft is not None:
            guesses = self._guess(step, batch, tokens, tables)
        return [Drawn(t, g, s.drafts) for s, t, g in zip(batch, tokens, guesses, strict=True)]

    def _score(self, batch: list[Segment], streams: Tensor) -> None:
        """Log probabilities of prompts' tokens, a few rows of logits at a time; streams [T, 4, D] of the whole step."""
        first = 0
        for segment in batch:
            draws, width = self._draws_of(segment.sequence), segment.sequence.sampling.prompt_logprobs or 0
            for at in range(0, len(segment.following), SCORED_ROWS):
                following = segment.following[at : at + SCORED_ROWS]
                logits = self.model.read_out(streams[first + at : first + at + len(following)])
                draws.scored(score(logits.cpu().numpy(), following, width))
            first += len(segment.tokens)

    @torch.inference_mode()
    def _guess(
        self, step: Step, batch: list[Segment], tokens: list[tuple[Sampled, ...]], tables: Tables
    ) -> list[tuple[int, ...]]:
        """Let the draft layer see what was computed, then guess from there."""
        kept = [len(s.tokens) - s.drafts + max(len(t) - 1, 0) for s, t in zip(batch, tokens, strict=True)]
        step.remember(kept)
        answers = [[sampled.token_id for sampled in t] for t in tokens]
        going = [b for b, t in enumerate(tokens) if t and t[-1].ok]
        swa_pages = tables.swa_pages.numpy()
        depth = 0
        while True:
            pages = [(segment.start + kept[b] + depth) // PAGE_TOKENS for b, segment in enumerate(batch)]
            mapped = [page < swa_pages.shape[1] and swa_pages[b, page] for b, page in enumerate(pages)]
            going = [b for b in going if depth < batch[b].guesses and mapped[b]]
            if not going:
                break
            logits = step.guess(going, [answers[b][-1] for b in going], depth)
            rows = []
            for b in going:
                place, drafts = batch[b].start + kept[b] + depth + 1, answers[b][len(tokens[b]) :]
                index = batch[b].index + len(answers[b])
                rows.append(self._draws_of(batch[b].sequence).row(place, index, drafts))
            # Drawn like the token itself, by the same noise: two alike distributions then mostly draw alike.
            drawn = sample_rows(logits, rows)
            drew = {b: sampled.token_id for b, sampled in zip(going, drawn, strict=True) if sampled.ok}
            for b, token in drew.items():
                answers[b].append(token)
            going = list(drew)
            depth += 1
        return [tuple(a[len(t) :]) for a, t in zip(answers, tokens, strict=True)]

    def _draws_of(self, sequence: Sequence) -> Draws:
        """The sequence's part of the sampler, made when it is first asked for."""
        if sequence.draws is None:
            sequence.draws = Draws(sequence, (self.model_config.eos_token_id,), self.grammars)
        return sequence.draws

    def logits(self, batch: list[Segment], wanted: Tensor) -> Tensor:
        """[S, V] float32 logits of the `wanted` [S] int64 token rows, counted over the whole batch."""
        return self.model.forward(token_ids(batch), StepMeta.of(batch), wanted, self.pools)


def _agreed(segment: Segment, drawn: list[Sampled]) -> tuple[Sampled, ...]:
    """`drawn` at the place of each draft and behind the last one -> up to the first that is not what the draft says."""
    drafts = segment.tokens[len(segment.tokens) - segment.drafts :]
    n = 0
    while n < len(drafts) and drawn[n].ok and drawn[n].token_id == drafts[n]:
        n += 1
    return tuple(drawn[: n + 1])


def move(tensors: dict[str, Any], device: str, *, half: bool) -> None:
    """A checkpoint's tensors to the device, in place; without `half`, in fp32 whatever they are."""
    for name, tensor in tensors.items():
        moved = tensor.to(device)
        if not half and torch.is_floating_point(moved):
            moved = moved.float()
        tensors[name] = moved


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


GPU_TOLERANCE = 0.3
"""How far apart (relative to their norm) logits of one prompt may be when it is cut up differently on a GPU: what a
random model makes of roundings is under half of it, what a wrong address makes is above 1."""
CHECK_TOKENS = 140
"""Just over one C128 block and the window, so that every kind of row is written, closed and read."""


def check_row_independence(model: DeepseekV4, layout: KvLayout, device: str = "cpu") -> None:
    """Compute one prompt whole, and cut up beside another sequence; the logits must agree, on a CPU bit for bit.

    Reuse, batching and the split into prefill and decode all rest on this. It is a property of this machine's kernels
    as much as of the code, so it is checked where it will be used. A GPU adds in an order that depends on the number of
    tokens, and a sum that differs in its last bit may store a row's neighbour in e4m3. Raises ConfigError.
    """
    config = model.config
    pools = KvPools(config, layout, PoolSizes(full=4, swa=4, slots=4), "self-check", device)
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
    if device == "cpu" and not torch.equal(expected, got):
        raise ConfigError(
            f"this machine's kernels give a row different bits in different batches (largest difference "
            f"{(expected - got).abs().max():.3g}), so prefill and decode would not agree. "
            "Rebuild the CPU library with `make install`, and report the CPU model if that does not help."
        )
    apart = float((expected - got).norm() / expected.norm())
    if not apart <= GPU_TOLERANCE:
        raise ConfigError(
            f"this GPU's kernels give a row other values in other batches ({apart:.3g} apart, at most "
            f"{GPU_TOLERANCE}), so prefill and decode would not agree. Check the versions of torch and triton "
            "against the `gpu` extra."
        )
