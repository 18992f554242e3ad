"""A run: batches in, steps taken, progress and figures out, checkpoints kept; it goes on where it was stopped.

A run directory holds tokenizer.json, metrics.csv, metrics.png where matplotlib is installed, and `step-*`.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from engine.config import C4_RATIO
from training.capture import Captured
from training.config import Stage, TrainConfig
from training.data import Batch, Batches, Texts
from training.group import Group
from training.initial import initial_model
from training.model import Numerics, Transformer
from training.optim import Optimisers, rate_factor
from training.state import load_state, save_state, states
from wire.errors import ConfigError, PenumbraError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """One line of metrics.csv. Losses are nats a token of the whole step, over all processes.

    draft_accept   share of tokens for which the draft layer and the model find the same token likeliest
    index_loss     divergence of the indexers from attention, a query and C4 layer
    index_recall   share of attention to C4 rows that the indexers' choice holds; nan where nothing is left out
    busiest        picks of the busiest expert of any scored layer over the mean
    """

    step: int
    tokens: int
    loss: float
    draft_loss: float
    draft_accept: float
    index_loss: float
    index_recall: float
    busiest: float
    gradient_norm: float
    rate: float
    tokens_per_s: float


class Trainer:
    """The model, its optimisers, and one step after another."""

    def __init__(self, config: TrainConfig, model: Transformer, group: Group) -> None:
        self.config, self.model, self.group = config, model, group
        self.optimisers = Optimisers(model.parameters, config.optimiser)
        self.step, self.tokens = 0, 0
        self._captured: dict[tuple[torch.Size, Numerics], Captured] = {}
        self._captured_stage: Stage | None = None

    def numerics(self, *, observe: bool = False) -> Numerics:
        """How the next step computes."""
        c, stage = self.config, self.config.stage_of(self.step)
        quantised = self.step >= c.quantised_from * c.steps and c.quantised_from < 1
        model = c.model
        return Numerics(
            dtype=DTYPES[c.dtype],
            quantised=quantised,
            # Pools of other geometries store rows as they are.
            rows=quantised and (model.head_dim, model.rope_dim, model.index_head_dim) == (512, 64, 128),
            sparse=stage.sparse,
            observe=observe,
            recompute=stage.recompute,
            query_chunk=stage.query_chunk,
        )

    def take(self, batch: Batch, *, observe: bool = False) -> Metrics:
        """One step over this process's share of the batch."""
        began = time.perf_counter()
        config, stage, device = self.config, self.config.stage_of(self.step), self.config.device
        ids, weights = batch.ids.to(device), batch.weights.to(device)
        tokens = stage.sequences * stage.sequence_tokens
        # Every loss is divided by what the whole step holds, so that shares of any size add up to one mean.
        told = self.group.add(torch.stack([weights[:, 1:-1].sum(), weights[:, 2:].sum()]).double()).clamp(min=1)
        c4_layers = len(self.model.config.layers_of(C4_RATIO))
        sums = torch.zeros(6, dtype=torch.float64, device=device)
        experts: dict[int, Tensor] = {}
        numerics = self.numerics(observe=observe)
        for part, of in _micro(ids, weights, stage.micro_sequences):
            seen, picks = self._pass(numerics, part, of, told, tokens * max(1, c4_layers))
            sums += seen
            for layer, counts in picks.items():
                experts[layer] = experts.get(layer, 0) + counts
        self.group.add_gradients(self.model.parameters.values())
        self.group.add(sums)
        for layer in sorted(experts):
            self.group.add(experts[layer])
        factor = rate_factor(self.step, config.steps, config.optimiser)
        norm = self.optimisers.step(factor, keep=config.capture)
        self.model.balance(experts, config.optimiser.balance_speed * factor)
        self.step += 1
        self.tokens += tokens
        return self._metrics(sums, told, tokens * max(1, c4_layers), experts, norm, factor, tokens, began)

    def _pass(
        self, numerics: Numerics, ids: Tensor, weights: Tensor, told: Tensor, queries: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One part of the step, forward and backward -> the sums [6] metrics are made of, and picks by layer."""

        def compute(ids: Tensor, weights: Tensor, told: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
            loss, seen, picks = self.losses(ids, weights, numerics, told, queries)
            loss.backward()
            return seen, picks

        if not self.config.capture:
            return compute(ids, weights, told)
        stage = self.config.stage_of(self.step)
        if stage is not self._captured_stage:
            self._captured.clear()  # memory of shapes that do not come again
            self._captured_stage = stage
        key = (ids.shape, numerics)
        if key not in self._captured:
            pool = next((graph.pool for graph in self._captured.values()), None)
            self._captured[key] = Captured(compute, (ids, weights, told), self.model.parameters.values(), pool)
        return self._captured[key](ids, weights, told)

    def losses(
        self, ids: Tensor, weights: Tensor, numerics: Numerics, told: Tensor, queries: int
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """One part of the step -> its share of the loss, the sums [6] metrics are made of, and picks by layer."""
        c, run = self.config, self.model.begin(numerics)
        streams = run.streams(ids[:, :-2])
        main, likeliest = run.cross_entropy(run.hidden(streams), ids[:, 1:-1], weights[:, 1:-1])
        total = main / told[0]
        draft, agreed = torch.zeros_like(main), torch.zeros_like(main)
        if self.model.config.draft_layer:
            drafted = run.draft_streams(streams, ids[:, 1:-1])
            draft, guessed = run.cross_entropy(run.hidden(drafted, "mtp.0."), ids[:, 2:], weights[:, 2:])
            agreed = ((guessed[:, :-1] == likeliest[:, 1:]) * weights[:, 2:-1]).sum()
            total = total + c.draft_weight * draft / told[1]
        observed = run.observed
        index = torch.stack(list(observed.index_loss.values()) or [torch.zeros_like(main)]).sum()
        total = total + c.index_weight * index / queries
        held = torch.stack([torch.stack(pair) for pair in observed.recall.values()] or [main.new_zeros(2)]).sum(0)
        return total, torch.stack([main, draft, agreed, index, *held]).detach().double(), observed.experts

    def _metrics(
        self,
        sums: Tensor,
        told: Tensor,
        queries: int,
        experts: dict[int, Tensor],
        norm: float,
        factor: float,
        tokens: int,
        began: float,
    ) -> Metrics:
        main, draft, agreed, index, held, asked = sums.tolist()
        scored = [counts for layer, counts in experts.items() if layer >= self.model.config.num_hash_layers]
        return Metrics(
            step=self.step,
            tokens=self.tokens,
            loss=main / told[0].item(),
            draft_loss=draft / told[1].item(),
            draft_accept=agreed / told[1].item(),
            index_loss=index / queries,
            index_recall=held / asked if asked else math.nan,
            busiest=max((counts.max() / counts.float().mean()).item() for counts in scored) if scored else math.nan,
            gradient_norm=norm,
            rate=factor,
            tokens_per_s=tokens / (time.perf_counter() - began),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on beside the config."""
        named = {f"parameter/{name}": t for name, t in self.model.parameters.items()}
        named |= {f"kept/{name}": t for name, t in self.model.kept.items()}
        return named | {f"optimiser/{name}": t for name, t in self.optimisers.tensors().items()}

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind != "optimiser":
                with torch.no_grad():
                    (self.model.parameters if kind == "parameter" else self.model.kept)[rest].copy_(tensor)
        self.optimisers.restore({n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("optimiser/")})
        self.step = step
        self.tokens = sum(stage.sequences * stage.sequence_tokens for stage in map(self.config.stage_of, range(step)))


def _micro(ids: Tensor, weights: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    size = size or max(1, len(ids))
    return list(zip(ids.split(size), weights.split(size), strict=True))


def train(
    config: TrainConfig,
    run: Path,
    *,
    texts: Texts,
    group: Group | None = None,
    until: int | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> Trainer:
    """Train from the run's last checkpoint, or from the beginning, to its end or to step `until`.

    Raises CheckpointError when the directory holds another run, ConfigError for a GPU that is not there, and
    PenumbraError when the loss is no number any more.
    """
    group = group or Group()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device is "cuda", but torch finds no GPU. Set device = "cpu", or install the CUDA build.')
    torch.set_num_threads(config.threads)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, initial_model(config.model.config(), config.seed, config.device), group)
    found = states(run)
    if found:
        step, tensors, _ = load_state(found[-1], config)
        trainer.restore(step, tensors)
    last = config.steps if until is None else min(until, config.steps)
    log = _Log(run / "metrics.csv", trainer.step) if group.first else None
    if group.first:
        (run / "tokenizer.json").write_text(texts.tokenizer_json, encoding="utf-8")
    batches = Batches(texts, config, group.rank, group.world).from_step(trainer.step)
    while trainer.step < last:
        logged = (trainer.step + 1) % config.log_steps == 0 or trainer.step + 1 == last
        metrics = trainer.take(next(batches), observe=logged)
        if not math.isfinite(metrics.loss):
            raise PenumbraError(
                f"the loss is {metrics.loss} at step {metrics.step}, and no later step would mend it. Lower the rates "
                f"under [optimiser] and go on from the checkpoint before it in {run}."
            )
        if log is not None:
            report(metrics)
            if logged:
                log.add(metrics)
            if trainer.step % config.save_steps == 0 or trainer.step == last:
                save_state(run, trainer.step, trainer.tensors(), config)
    return trainer


class _Log:
    """metrics.csv. Lines behind the step a run goes on from belong to steps that are taken again, and are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, names = path, [f.name for f in fields(Metrics)]
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, metrics: Metrics) -> None:
        with self.path.open("a", newline="") as file:
            row = {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(metrics).items()}
            csv.DictWriter(file, fieldnames=list(row)).writerow(row)
