"""How many workers of each kind a load needs, what fits on given GPUs, and what to expect: `penumbra plan`.

Memory is arithmetic on the model's shape and the page layout. Times come from two sources, and every figure says which:
`measured`, a row of bench/results with its commit; `datasheet`, the work divided by what the GPU's maker states, and
then by the share of that which our kernels reach (`Share`). Everything here is pure but `measured_steps`.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.config import C4_RATIO, C128_RATIO, FLASH, PRO, WINDOW, ModelConfig
from engine.model.inspect import GPUS, MOST_GPUS, USABLE, KvCost, kv_costs
from engine.model.survey import tensor_table
from wire.errors import ConfigError

Basis = Literal["measured", "datasheet", "arithmetic"]

MODELS: Mapping[str, ModelConfig] = {"flash": FLASH, "pro": PRO}
GPUS_OF_A_WORKER = 1
"""What a worker of this version uses. Plans with more say what such a worker would do, and that there is none."""
PREFILL_SHARE = 0.4
"""Of the maker's peak that a prefill is taken to reach: nobody has measured one of the whole model here."""
MOST_REQUESTS = 64
"""At once in one worker: what --max-requests is without a word."""
BUSY = 0.8
"""Part of its time a prefill worker may be busy: above it the queue, not the prompt, makes the time to first token."""
EASED = 1.25
"""Where a prompt alone takes longer than its limit, the plan goes by so many times what it takes."""
LATENT_ROW_BYTES, INDEX_ROW_BYTES = 584, 132
"""Of a v4 page: what attention and the indexer read of one row."""
STEPS_FILE = Path(__file__).parent.parent / "bench" / "results" / "step.csv"
SIZES = tuple(2**power for power in range(MOST_GPUS.bit_length()))
"""Of a worker, in GPUs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """As its maker states it, dense."""

    name: str
    memory_bytes: float
    bytes_s: float
    fp8_flops: float
    bf16_flops: float


SHEETS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", GPUS["H100 80 GB"], 3.35e12, 1979e12, 989e12),
        Gpu("H200", GPUS["H200 141 GB"], 4.8e12, 1979e12, 989e12),
        Gpu("B200", GPUS["B200 180 GB"], 8.0e12, 4500e12, 2250e12),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be served. `cached` is the part of a prompt that a prefix cache has already."""

    context: int  # tokens of a prompt
    answer: int  # tokens of an answer
    per_s: float  # requests
    ttft_s: float
    tpot_s: float
    cached: float = 0.0

    def __post_init__(self) -> None:
        if self.context < 1 or self.answer < 1 or min(self.per_s, self.ttft_s, self.tpot_s) <= 0:
            raise ConfigError("A load has prompts, answers, a rate and two latencies, all of them above 0.")
        if not 0 <= self.cached < 1:
            raise ConfigError(f"--cached {self.cached:g} is not a part of a prompt from 0 to below 1.")


@dataclass(frozen=True, slots=True)
class Step:
    """A measured decode step of Flash on one H200."""

    batch: int
    context: int
    seconds: float
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers of one kind, each on `gpus` GPUs. Bytes are those of one GPU; KV is whole on every GPU of a worker."""

    role: str
    workers: int
    gpus: int
    weight_bytes: int
    request_bytes: int  # pages of one request
    requests: int  # that find room at once in one worker
    running: int  # of them at this load
    seconds: float  # a prompt, or a step
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    gpu: str
    gpus: int
    load: Load
    fits: bool
    needed_gpus: int | None  # None: no number of GPUs does it
    per_s: float  # requests per second that the given GPUs carry within the latencies; 0 when not even one
    pools: tuple[Pool, ...]
    ttft_s: float
    tpot_s: float
    token_bytes: float  # KV, v4 pages
    moved_bytes: int  # from prefill to decode worker for one request
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """'8xH200' -> (8, H200). Raises ConfigError."""
    count, cross, name = text.partition("x")
    gpu = SHEETS.get(name.upper())
    if not cross or not count.isdecimal() or int(count) < 1 or gpu is None:
        raise ConfigError(f"--gpus {text}: write a count and a kind, such as 8xH200; known are {', '.join(SHEETS)}.")
    return int(count), gpu


def parse_tokens(text: str) -> int:
    """'900k' -> 900,000, '1m' -> 1,000,000. Raises ConfigError."""
    number, factor = text.strip().lower(), 1
    if number[-1:] in ("k", "m"):
        number, factor = number[:-1], {"k": 1_000, "m": 1_000_000}[number[-1]]
    try:
        tokens = round(float(number) * factor)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise ConfigError(f"'{text}' is not a number of tokens; write one like 900000, 900k or 1m.")
    return tokens


def parse_seconds(text: str) -> float:
    """'30s' -> 30, '20ms' -> 0.02. Raises ConfigError."""
    number, factor = text.strip().lower(), 1.0
    for unit, worth in (("ms", 1e-3), ("s", 1.0)):
        if number.endswith(unit):
            number, factor = number[: -len(unit)], worth
            break
    try:
        seconds = float(number) * factor
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"'{text}' is not a time above 0; write one like 30s or 20ms.")
    return seconds


# Work.


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a prompt, by the precision they are done in: products and index scores in FP8, attention in bf16."""

    fp8: float
    bf16: float

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.fp8 - other.fp8, self.bf16 - other.bf16)


def prompt_flops(config: ModelConfig, tokens: int) -> Flops:
    """To compute `tokens` from the first on, 2 for each multiply-add; the head is left out, which runs once."""
    c = config
    d, heads = c.hidden_size, c.num_heads * c.head_dim
    attention = d * c.q_lora_rank + c.q_lora_rank * heads + d * c.head_dim + heads * c.o_lora_rank
    attention += c.o_groups * c.o_lora_rank * d
    experts = (c.experts_per_token + 1) * 3 * d * c.moe_intermediate_size + d * c.num_experts
    mixing = 2 * (2 + c.hc_mult) * c.hc_mult * c.hc_mult * d
    # A compressor has two products (rows and gates), of twice the width where neighbouring blocks overlap (C4).
    c128 = 2 * d * c.head_dim
    c4 = 2 * d * 2 * (c.head_dim + c.index_head_dim)
    c4 += c.q_lora_rank * c.index_heads * c.index_head_dim + d * c.index_heads
    layers4, layers128 = len(c.layers_of(C4_RATIO)), len(c.layers_of(C128_RATIO))
    linear = 2 * (c.num_layers * (attention + experts + mixing) + layers4 * c4 + layers128 * c128) * tokens
    index = layers4 * 2 * c.index_heads * c.index_head_dim * tokens**2 / (2 * C4_RATIO)
    # Keys each token attends to, summed: its window, up to top-k of every 4th, and every 128th.
    full = c.index_topk * C4_RATIO  # from here on top-k is less than all
    selected = tokens**2 / (2 * C4_RATIO) if tokens < full else c.index_topk * (tokens - full / 2)
    keys = c.num_layers * WINDOW * tokens + layers4 * selected + layers128 * tokens**2 / (2 * C128_RATIO)
    return Flops(fp8=linear + index, bf16=4 * heads * keys)


def prompt_s(config: ModelConfig, gpu: Gpu, gpus: int, load: Load) -> float:
    """Seconds to compute what no cache has of a prompt, the work spread evenly over a worker's GPUs."""
    work = prompt_flops(config, load.context) - prompt_flops(config, int(load.context * load.cached))
    return (work.fp8 / gpu.fp8_flops + work.bf16 / gpu.bf16_flops) / PREFILL_SHARE / gpus


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a checkpoint, the draft layer left out."""

    all: int
    routed: int  # experts
    embedding: int

    @classmethod
    @functools.cache
    def of(cls, config: ModelConfig) -> Weights:
        table = tensor_table(config)
        return cls(
            all=sum(spec.num_bytes for spec in table.values()),
            routed=sum(spec.num_bytes for name, spec in table.items() if ".ffn.experts." in name),
            embedding=table["embed.weight"].num_bytes,
        )


def step_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """What one decode step reads: weights, of the experts those that `batch` tokens choose by chance, and KV rows."""
    weights = Weights.of(config)
    others = weights.all - weights.routed - weights.embedding
    chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** batch
    row, index_row = LATENT_ROW_BYTES, INDEX_ROW_BYTES
    layers4, layers128 = len(config.layers_of(C4_RATIO)), len(config.layers_of(C128_RATIO))
    kv = config.num_layers * WINDOW * row + layers128 * context / C128_RATIO * row
    kv += layers4 * (context / C4_RATIO * index_row + min(config.index_topk, context / C4_RATIO) * row)
    return others + weights.routed * chosen + batch * kv


class Steps:
    """How long a decode step takes, from what was measured of Flash on one H200."""

    def __init__(self, measured: Sequence[Step]) -> None:
        """Raises ConfigError without a row of one sequence."""
        alone = {step.context: step for step in measured if step.batch == 1}
        if not alone:
            raise ConfigError("There is no measured decode step to plan from; run penumbra bench step on a GPU.")
        self._alone = sorted((context, step.seconds) for context, step in alone.items())
        shortest = self._alone[0][0]
        self._batches = sorted((step.batch, step.seconds) for step in measured if step.context == shortest)
        self.commit = alone[shortest].commit
        sheet = SHEETS["H200"]
        self.share = step_bytes(FLASH, 1, shortest) / sheet.bytes_s / self._alone[0][1]
        """Of its bandwidth floor that the step of one sequence reaches: what datasheet figures are divided by."""

    def seconds(self, config: ModelConfig, gpu: Gpu, batch: int, context: int) -> tuple[float, Basis]:
        """A step of `batch` sequences of `context` tokens.

        Measured: between rows, a straight line; every sequence adds what its context adds to one alone. Datasheet: the
        bytes read. A worker's GPUs count as one in both, as what spreading a step saves is not measured.
        """
        if config == FLASH and gpu.name == "H200":
            depth = _line(self._alone, context) - self._alone[0][1]
            return _line(self._batches, batch) + batch * max(depth, 0.0), "measured"
        return step_bytes(config, batch, context) / gpu.bytes_s / self.share, "datasheet"


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines through sorted points, the first and the last one going on; one point is a level."""
    if len(points) == 1:
        return points[0][1]
    after = next((i for i in range(1, len(points) - 1) if points[i][0] >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


# Sizes of pools.


def plan(model: str, gpu: Gpu, gpus: int, load: Load, steps: Steps) -> Plan:
    """The fewest GPUs that carry the load, and what those given carry. Raises ConfigError for an unknown model."""
    config = MODELS.get(model)
    if config is None:
        raise ConfigError(f"--model {model}: known are {', '.join(MODELS)}.")
    if load.context + load.answer > config.max_positions:
        raise ConfigError(
            f"A prompt of {load.context:,} and an answer of {load.answer:,} tokens are more than the "
            f"{config.max_positions:,} that the model has positions for."
        )
    problems, eased = _Sizer(config, gpu, load, steps).ease()
    sizer = _Sizer(config, gpu, eased, steps)
    pools = sizer.pools(load.per_s)
    needed = sum(map(_gpus_of, pools)) if pools else None
    fits = not problems and needed is not None and needed <= gpus
    carried = sizer.carried(gpus)
    advice = []
    if needed is not None and needed > gpus:
        problems.append(
            f"{load.per_s:g} requests a second need {needed} GPUs; {gpus} carry {carried:.3g} a second."
            if carried
            else f"{load.per_s:g} requests a second need {needed} GPUs; {gpus} are too few for one worker of each kind."
        )
    if not fits:
        advice = list(_advice(config, gpu, gpus, load, steps))
    cost = kv_costs(config)["v4"]
    prompt, step = pools if pools else (None, None)
    return Plan(
        model=model,
        gpu=gpu.name,
        gpus=gpus,
        load=load,
        fits=fits,
        needed_gpus=needed,
        per_s=load.per_s if fits else carried,
        pools=pools,
        ttft_s=sizer.ttft_s(prompt, step.seconds, load.per_s) if prompt and step else math.inf,
        tpot_s=step.seconds if step else math.inf,
        token_bytes=cost.token_bytes,
        moved_bytes=cost.sequence_bytes(load.context),
        problems=tuple(problems),
        advice=tuple(advice),
        notes=tuple(sizer.notes(pools)),
    )


class _Sizer:
    def __init__(self, config: ModelConfig, gpu: Gpu, load: Load, steps: Steps) -> None:
        self._config, self._gpu, self._load, self._steps = config, gpu, load, steps
        self._weights = Weights.of(config).all
        self._cost: KvCost = kv_costs(config)["v4"]
        self._request_bytes = self._cost.sequence_bytes(load.context + load.answer)

    def _room(self, gpus: int) -> int:
        """Requests that find room beside the weights in a worker of so many GPUs; below 0: not even the weights do."""
        return math.floor((self._gpu.memory_bytes * USABLE - self._weights / gpus) / self._request_bytes)

    def _sizes(self) -> list[int]:
        return [gpus for gpus in SIZES if self._room(gpus) >= 1]

    def _step(self, batch: int) -> tuple[float, Basis]:
        return self._steps.seconds(self._config, self._gpu, batch, self._load.context + self._load.answer)

    def _prompt_s(self, gpus: int) -> float:
        return prompt_s(self._config, self._gpu, gpus, self._load)

    def ttft_s(self, pool: Pool, step_s: float, per_s: float) -> float:
        """Waiting for a prefill worker, the prompt, and the decode worker's first step.

        Prompts of one length that come at random wait like those before one counter as many times as fast as there are
        workers: busy / (2 (1 - busy)) of its time for one.
        """
        busy = per_s * pool.seconds / pool.workers
        return pool.seconds + pool.seconds / pool.workers * busy / (2 * (1 - busy)) + step_s

    def pools(self, per_s: float) -> tuple[Pool, ...]:
        """(prefill, decode) with the fewest GPUs, or none when no number of them keeps the latencies."""
        decode = min((p for g in self._sizes() if (p := self._decode(g, per_s))), key=_gpus_of, default=None)
        if decode is None:
            return ()
        found = (self._prefill(g, per_s, decode.seconds) for g in self._sizes())
        prefill = min((p for p in found if p), key=_gpus_of, default=None)
        return (prefill, decode) if prefill else ()

    def _prefill(self, gpus: int, per_s: float, step_s: float) -> Pool | None:
        seconds = self._prompt_s(gpus)
        patience = self._load.ttft_s - seconds - step_s
        if patience <= 0:
            return None
        # The fewest workers whose queue (`ttft_s`) is no longer than that: a quadratic in their number.
        asked = per_s * seconds
        enough = (asked + math.sqrt(asked**2 + 2 * asked * seconds / patience)) / 2
        return Pool(
            role="prefill",
            workers=max(1, math.ceil(enough), math.ceil(asked / BUSY)),
            gpus=gpus,
            weight_bytes=math.ceil(self._weights / gpus),
            request_bytes=self._request_bytes,
            requests=self._room(gpus),
            running=1,
            seconds=seconds,
            basis="datasheet",
            source=f"{PREFILL_SHARE:.0%} of the peak its maker states",
        )

    def _decode(self, gpus: int, per_s: float) -> Pool | None:
        batches = range(1, min(self._room(gpus), MOST_REQUESTS) + 1)
        steps = {batch: self._step(batch) for batch in batches}
        kept = {batch: seconds for batch, (seconds, _) in steps.items() if seconds <= self._load.tpot_s}
        if not kept:
            return None
        rates = {batch: batch / (self._load.answer * seconds) for batch, seconds in kept.items()}
        workers = max(1, math.ceil(per_s / max(rates.values())))
        running = next(batch for batch, rate in rates.items() if workers * rate >= per_s)
        seconds, basis = steps[running]
        return Pool(
            role="decode",
            workers=workers,
            gpus=gpus,
            weight_bytes=math.ceil(self._weights / gpus),
            request_bytes=self._request_bytes,
            requests=self._room(gpus),
            running=running,
            seconds=seconds,
            basis=basis,
            source=f"bench/results/step.csv at {self._steps.commit}"
            if basis == "measured"
            else f"its memory's speed, of which an H200 reaches {self._steps.share:.0%} at {self._steps.commit}",
        )

    def carried(self, gpus: int) -> float:
        """The most requests per second that so many GPUs carry within the latencies; 0 for none."""
        low, high = 0.0, 1e-3
        while (pools := self.pools(high)) and sum(map(_gpus_of, pools)) <= gpus and high < 1e6:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            pools = self.pools(middle)
            if pools and sum(map(_gpus_of, pools)) <= gpus:
                low = middle
            else:
                high = middle
        return low if low > 1e-6 else 0.0

    def ease(self) -> tuple[list[str], Load]:
        """What no number of workers mends, and the load with latencies that some number keeps."""
        load, sizes = self._load, self._sizes()
        if not sizes:
            return [
                f"The weights and one request take {self._weights / 1e9:.0f} and {self._request_bytes / 1e9:.2f} GB: "
                f"more than {MOST_GPUS} {self._gpu.name} hold."
            ], load
        found = []
        step, _ = self._step(1)
        if step > load.tpot_s:
            found.append(
                f"One request alone takes {step * 1e3:.1f} ms a token at this depth, more than "
                f"{load.tpot_s * 1e3:g} ms; the table goes by {step * 1e3:.1f} ms."
            )
            load = replace(load, tpot_s=step)
        prompt = self._prompt_s(sizes[-1])
        if prompt + step >= load.ttft_s:
            reachable = math.ceil(EASED * (prompt + step))
            found.append(
                f"A prompt takes {prompt:.1f} s on a worker of {sizes[-1]} GPUs, longer than {load.ttft_s:g} s; the "
                f"table goes by {reachable} s."
            )
            load = replace(load, ttft_s=float(reachable))
        return found, load

    def notes(self, pools: Sequence[Pool]) -> list[str]:
        found = [
            "Weights and a prompt's work are spread evenly over a worker's GPUs, the draft layer is left out, and "
            f"{1 - USABLE:.0%} of the memory is kept for activations. A step takes as long as on one GPU.",
            "Pages travel while the prompt is computed; only the last chunk's are waited for.",
        ]
        if any(pool.gpus > GPUS_OF_A_WORKER for pool in pools):
            found.insert(
                0,
                f"A worker of this version runs on {GPUS_OF_A_WORKER} GPU and does not spread a model over several: "
                "where the table says more, the figures are those of a worker that is still to be built.",
            )
        return found


def _gpus_of(pool: Pool) -> int:
    return pool.workers * pool.gpus


def _advice(config: ModelConfig, gpu: Gpu, gpus: int, load: Load, steps: Steps) -> list[str]:
    """Changes to the load, each alone, with which the given GPUs do."""

    def carried(changed: Load) -> bool:
        pools = _Sizer(config, gpu, changed, steps).pools(changed.per_s)
        return bool(pools) and sum(map(_gpus_of, pools)) <= gpus

    found = []
    if cached := next(
        (c for c in (0.5, 0.75, 0.9, 0.95, 0.99) if c > load.cached and carried(replace(load, cached=c))), 0
    ):
        found.append(f"Prompts of which the prefix cache has {cached:.0%}: conversations that go on, shared documents.")
    contexts = [load.context * part // 100 for part in range(95, 0, -5)]
    if context := next((c for c in contexts if c and carried(replace(load, context=c))), 0):
        found.append(f"Prompts of {context:,} tokens instead of {load.context:,}.")
    for name, field in (("time to first token", "ttft_s"), ("time per token", "tpot_s")):
        if factor := next(
            (f for f in (1.5, 2, 3, 5, 10) if carried(replace(load, **{field: f * getattr(load, field)}))), 0
        ):
            wanted = factor * getattr(load, field)
            found.append(f"A {name} of {wanted:g} s.")
    for kind in SHEETS.values():
        if kind != gpu:
            pools = _Sizer(config, kind, load, steps).pools(load.per_s)
            if pools and (needed := sum(map(_gpus_of, pools))):
                found.append(f"{needed} {kind.name}.")
    return found


def measured_steps(path: Path = STEPS_FILE) -> list[Step]:
    """The newest row of each size in bench/results/step.csv: whole-model steps of one token a sequence on an H200.

    Raises ConfigError where there is none.
    """
    found: dict[tuple[int, int], Step] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["device"] == "NVIDIA H200" and row["tokens"] == "1" and row["layers"] == str(FLASH.num_layers):
                    size = int(row["batch"]), int(row["context"])
                    found[size] = Step(*size, float(row["step_ms"]) / 1e3, row["commit"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"The measured decode steps can not be read from {path}: {error}.") from error
    return list(found.values())
