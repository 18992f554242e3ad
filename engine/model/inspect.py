"""What a checkpoint is and what it takes to run it, from its headers alone: `penumbra model inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.cache.pools import item_bytes
from engine.config import C4_RATIO, C128_RATIO, KvLayout, ModelConfig
from engine.model.survey import Formats, loaded_bytes, survey
from wire.types import PAGE_TOKENS, PageClass

GPUS = {"H100 80 GB": 80e9, "H200 141 GB": 141e9, "B200 180 GB": 180e9}
"""Bytes of memory, as sold."""
USABLE = 0.9
"""Part of a GPU's memory for weights and KV; the rest is for activations, graphs and communication buffers."""
MOST_GPUS = 16

_PARTS = (  # the first that occurs in a tensor's name says where it belongs
    (".ffn.experts.", "routed experts"),
    (".ffn.shared_experts.", "shared experts"),
    (".ffn.gate.tid2eid", "hash routing tables"),
    (".ffn.gate.", "gates"),
    (".attn.compressor.", "compressors and indexers"),
    (".attn.indexer.", "compressors and indexers"),
    (".attn.", "attention"),
    ("hc_", "hyper-connections"),
    ("embed.", "embedding"),
    ("head.", "head"),
    ("norm.", "norms"),
)


@dataclass(frozen=True, slots=True)
class KvCost:
    """Memory of cached tokens in one layout, page padding included."""

    token_bytes: float  # a token of context: its share of compressed rows
    fixed_bytes: int  # a running sequence whatever its length: three window pages, and its C128 rings

    def sequence_bytes(self, tokens: int) -> int:
        return round(-(-tokens // PAGE_TOKENS) * PAGE_TOKENS * self.token_bytes) + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """How many GPUs of a kind hold the weights and one sequence, and how many sequences those then hold.

    Weights are spread evenly; KV is on every GPU, because there is only one KV head to split.
    """

    gpu: str
    gpus: int | None  # None: not even MOST_GPUS
    sequences: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found. With `problems`, the numbers describe what could be read."""

    directory: Path
    problems: list[str]
    ignored: list[str]
    config: ModelConfig | None
    formats: Formats
    num_shards: int
    num_tensors: int
    weight_bytes: int  # on disk, draft layers included
    draft_bytes: int
    loaded_bytes: int  # once dequantised for a CPU
    parameters: int  # draft layers left out, as everywhere below; scales and routing tables are not parameters
    draft_parameters: int
    active_parameters: int  # used for one token, the embedding table left out
    dtypes: dict[str, tuple[int, int]]  # safetensors dtype -> tensors, bytes
    parts: dict[str, int]  # part of the model -> bytes
    kv: dict[KvLayout, KvCost] = field(default_factory=dict)  # layouts this geometry can use
    context: int = 0  # tokens the fits are for
    fits: tuple[Fit, ...] = ()


def inspect(directory: Path, *, context: int | None = None) -> Inspection:
    """Describe a checkpoint; `context` tokens is the sequence length to fit, by default all the model allows.

    Reads headers only. Never raises for a broken checkpoint: what is wrong is in `problems`.
    """
    found = survey(directory)
    specs = {name: found.spec(name) for name in found.where}
    drafts = set(found.draft)
    main = {name: spec for name, spec in specs.items() if name not in drafts}
    dtypes: Counter[str] = Counter(spec.dtype for spec in specs.values())
    dtype_bytes: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name, spec in specs.items():
        part = "draft layers" if name in drafts else _part(name)
        dtype_bytes[spec.dtype] += spec.num_bytes
        parts[part] += spec.num_bytes
        if not name.endswith(".scale") and spec.dtype != "I64":
            parameters[part] += spec.num_weights
    weight_bytes, draft_bytes = sum(parts.values()), parts["draft layers"]
    draft_parameters = parameters.pop("draft layers", 0)
    total = sum(parameters.values())
    active = 0
    kv: dict[KvLayout, KvCost] = {}
    fits: tuple[Fit, ...] = ()
    config = found.config
    if config is not None:
        context = context or config.max_positions
        idle = parameters["routed experts"] * (config.num_experts - config.experts_per_token) // config.num_experts
        active = total - idle - parameters["embedding"]
        kv = kv_costs(config)
        if kv and not found.problems:
            fits = _fits(weight_bytes - draft_bytes, next(iter(kv.values())).sequence_bytes(context))
    return Inspection(
        directory=directory,
        problems=found.problems,
        ignored=found.ignored,
        config=config,
        formats=found.formats,
        num_shards=len(found.shards),
        num_tensors=len(specs),
        weight_bytes=weight_bytes,
        draft_bytes=draft_bytes,
        loaded_bytes=loaded_bytes(main),
        parameters=total,
        draft_parameters=draft_parameters,
        active_parameters=active,
        dtypes={dtype: (count, dtype_bytes[dtype]) for dtype, count in dtypes.most_common()},
        parts=dict(parts.most_common()),
        kv=kv,
        context=context or 0,
        fits=fits,
    )


def _part(name: str) -> str:
    return next((part for piece, part in _PARTS if piece in name), "unknown")


def kv_costs(config: ModelConfig) -> dict[KvLayout, KvCost]:
    """Costs by layout, v4 first. A geometry other than the production one has no v4 bytes."""
    costs: dict[KvLayout, KvCost] = {}
    for layout in get_args(KvLayout):
        try:
            size = item_bytes(config, layout)
        except ValueError:
            continue
        costs[layout] = KvCost(
            token_bytes=size[PageClass.FULL] / PAGE_TOKENS,
            fixed_bytes=3 * size[PageClass.SWA] + 2 * size[PageClass.STATE],
        )
    return costs


def _fits(weights: int, sequence: int) -> tuple[Fit, ...]:
    fits = []
    for gpu, memory in GPUS.items():
        fit = Fit(gpu, None, 0)
        gpus = 1
        while gpus <= MOST_GPUS and fit.gpus is None:
            left = memory * USABLE - weights / gpus
            if left >= sequence:
                fit = Fit(gpu, gpus, int(left // sequence))
            gpus *= 2
        fits.append(fit)
    return tuple(fits)


def render(found: Inspection) -> RenderableType:
    """For a terminal: problems first, then what the model is and what it takes."""
    blocks: list[RenderableType] = []
    if found.problems:
        blocks.append(Text(f"{len(found.problems)} problem(s): this checkpoint cannot be served", style="bold red"))
        blocks += [Text(f"  {problem}", style="red") for problem in found.problems]
    else:
        blocks.append(Text("complete: every tensor is there, with the shape config.json asks for", style="green"))
    if found.ignored:
        blocks.append(Text(f"never opened: {', '.join(found.ignored)}", style="yellow"))
    if found.draft_bytes:
        blocks.append(Text(f"draft layers, {_size(found.draft_bytes)}, are not counted below", style="yellow"))
    if found.config is not None:
        blocks.append(_facts_table(found, found.config))
    if found.num_tensors:
        sizes = Table("part", "bytes", "share", title="weights on disk", title_justify="left")
        for part, size in found.parts.items():
            sizes.add_row(part, f"{size:,}", f"{size / found.weight_bytes:.1%}")
        sizes.add_section()
        for dtype, (count, size) in found.dtypes.items():
            sizes.add_row(f"{dtype}, {count:,} tensors", f"{size:,}", f"{size / found.weight_bytes:.1%}")
        blocks.append(sizes)
    if found.kv:
        costs = Table("KV layout", "bytes a token", "fixed, a sequence", f"a sequence of {found.context:,} tokens")
        for layout, cost in found.kv.items():
            whole = cost.sequence_bytes(found.context)
            costs.add_row(layout, f"{cost.token_bytes:,.2f}", f"{cost.fixed_bytes:,}", _size(whole))
        blocks.append(costs)
    if found.fits:
        fits = Table("GPU", "GPUs needed", f"sequences of {found.context:,} tokens", "KV layout")
        for fit in found.fits:
            needed = f"more than {MOST_GPUS}" if fit.gpus is None else str(fit.gpus)
            fits.add_row(fit.gpu, needed, f"{fit.sequences:,}", next(iter(found.kv)))
        blocks.append(fits)
    return Group(*blocks)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _facts_table(found: Inspection, config: ModelConfig) -> Table:
    facts = Table(show_header=False, title=str(found.directory), title_justify="left")
    plain, c4, c128 = (len(config.layers_of(ratio)) for ratio in (0, C4_RATIO, C128_RATIO))
    facts.add_row(
        "layers", f"{config.num_layers}: {plain} plain, {c4} C4, {c128} C128; {config.num_hash_layers} hash-routed"
    )
    facts.add_row("hidden, vocabulary", f"{config.hidden_size:,}, {config.vocab_size:,}")
    facts.add_row(
        "heads", f"{config.num_heads} of {config.head_dim} ({config.rope_dim} rope), {config.o_groups} groups"
    )
    facts.add_row("indexer", f"{config.index_heads} heads of {config.index_head_dim}, top {config.index_topk}")
    facts.add_row(
        "experts", f"{config.experts_per_token} of {config.num_experts}, {found.formats.experts}, and 1 shared"
    )
    facts.add_row("context", f"{config.max_positions:,} tokens")
    facts.add_row("parameters", f"{found.parameters:,}, {found.active_parameters:,} active a token")
    facts.add_row("draft parameters", f"{found.draft_parameters:,}")
    facts.add_row("files", f"{found.num_tensors:,} tensors in {found.num_shards} shards, {found.weight_bytes:,} bytes")
    facts.add_row("memory on a CPU", _size(found.loaded_bytes))
    return facts
