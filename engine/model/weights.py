"""A checkpoint's tensors, in memory and dequantised. Stops with one clear line on any surprise.

What the file holds          what comes out
FP8 E4M3, UE8M0 scales       bfloat16, exactly: a power of two moves only the exponent
MXFP4 (int8), UE8M0 scales   bfloat16, exactly
FP8 E4M3, float32 scales     float32 (the "-Base" checkpoints)
BF16, F32, I64               as they are

Shapes: O outputs, I inputs, E experts, D hidden.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.experts import Fp4Stack
from engine.kernels.linear import Fp8Weight
from engine.model.survey import FP4_BLOCK, FP8_BLOCK, Survey, TensorSpec, loaded_bytes, survey, tensor_table
from wire.errors import CheckpointError

log = logging.getLogger("penumbra.engine")

WHOLE_DIGEST_BYTES = 256 << 20
"""Up to this size the fingerprint covers every byte of the weights; above it, samples (see `_fingerprint`)."""
_STRIPS, _STRIP_BYTES = 64, 4096
MAX_FP4_SCALE = 128
"""Largest UE8M0 code of an FP4 group that GPU kernels take: they fold 2^126 into the scale. Weights are far below 1."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model, ready to be laid out for a device.

    tensors      by official name, without the `.scale` siblings, which are already multiplied in. Routed experts
                 are stacked: `layers.{n}.ffn.experts.w1` and `.w3` [E, I, D], `.w2` [E, D, I]. Nobody else holds
                 them: a consumer may pop what it has copied. With `mtp.0.*` if the draft layer was asked for. Loaded
                 `quantised`, matrices in FP8 and FP4 are an `Fp8Weight` and an `Fp4Stack`, as a GPU multiplies them.
    fingerprint  hex; two workers with the same one hold the same weights and may exchange pages
    """

    config: ModelConfig
    tensors: dict[str, Any]
    fingerprint: str
    tokenizer: Path


def load_checkpoint(directory: Path, *, draft: bool = False, quantised: bool = False) -> Checkpoint:
    """Read a checkpoint in the official layout.

    With `draft`, the draft layer `mtp.0` too. One that is incomplete, and block drafters, which are another model, are
    left out with one warning. Files of other formats are never opened.
    Raises CheckpointError, on one line naming file and tensor, for anything that is missing, superfluous, of
    another shape or type, out of range or not finite; and when the tensors would not fit into memory.
    """
    found = survey(directory)
    if found.problems:
        others = len(found.problems) - 1
        more = f" ({others} more: see penumbra model inspect {directory})" if others else ""
        raise CheckpointError(found.problems[0] + more)
    assert found.config is not None
    assert found.tokenizer is not None
    config = replace(found.config, draft_layer=has_draft_layer(found))
    table = tensor_table(config, found.formats, mtp=draft and config.draft_layer)
    _require_memory(directory, table)
    if found.ignored:
        log.warning("%s: ignoring %s: only the safetensors of the index are read", directory, ", ".join(found.ignored))
    if found.draft and not config.draft_layer:
        log.warning(
            "%s: ignoring %d tensors of a draft layer that is not a whole mtp.0 (%s, ...): decoding without a draft",
            directory,
            len(found.draft),
            found.draft[0],
        )
    fingerprint = _fingerprint(found)
    with ExitStack() as files:
        reader = _Reader(found, files)
        tensors = _read_all(reader, config, table, quantised)
    return Checkpoint(config, tensors, fingerprint, found.tokenizer)


def has_draft_layer(found: Survey) -> bool:
    """Whether the checkpoint holds `mtp.0`, whole and of the right shapes, and no other drafter."""
    assert found.config is not None
    main, both = (tensor_table(found.config, found.formats, mtp=mtp) for mtp in (False, True))
    layer = {name: spec for name, spec in both.items() if name not in main}
    return layer.keys() == set(found.draft) and all(found.spec(name) == spec for name, spec in layer.items())


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [O, I] float8_e4m3fn, scale [ceil(O/128), ceil(I/128)] float8_e8m0fnu or float32 -> [O, I].

    bfloat16 for power-of-two scales, float32 otherwise. The caller has made sure that no scale is NaN.
    Raises OverflowError when a product is not a bfloat16 number.
    """
    rows, columns = weight.shape
    dtype = torch.float32 if scale.dtype == torch.float32 else torch.bfloat16
    out = torch.empty(rows, columns, dtype=dtype)
    wide = scale.float().to(dtype).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    for n, start in enumerate(range(0, rows, FP8_BLOCK)):
        stop = min(start + FP8_BLOCK, rows)
        torch.mul(weight[start:stop].to(dtype), wide[n], out=out[start:stop])
    if dtype == torch.bfloat16:
        # 448 x 2^119 is the largest E4M3 multiple bfloat16 holds, 2^-9 x 2^-124 its smallest. Inside, all is exact.
        codes = scale.view(torch.uint8)
        if int(codes.min()) < 127 - 124 or int(codes.max()) > 127 + 119:
            fine = scale.double().repeat_interleave(FP8_BLOCK, dim=0)[:rows]
            _require_exact(out, weight.double() * fine.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns])
    return out


def keep_fp8(weight: Tensor, scale: Tensor) -> Fp8Weight:
    """The same weight, not multiplied out."""
    return Fp8Weight(weight.view(torch.uint8).clone(), scale.float())


def dequantise_mxfp4(packed: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """packed [O, I/2] int8, scale [O, I/32] float8_e8m0fnu -> [O, I] bfloat16, into `out` when given.

    A byte holds two E2M1 codes, the even input in its low half. The caller has made sure that no scale is NaN.
    Raises OverflowError when a product is not a bfloat16 number.
    """
    rows, groups = scale.shape
    if out is None:
        out = torch.empty(rows, groups * FP4_BLOCK, dtype=torch.bfloat16)
    # One gathered int32 is two bfloat16 values: four times faster than looking up each half byte.
    pairs = _e2m1_pairs().index_select(0, packed.reshape(-1).view(torch.uint8).int()).view(torch.bfloat16)
    shape = (rows, groups, FP4_BLOCK)
    torch.mul(pairs.view(shape), scale.float().bfloat16()[:, :, None], out=out.view(shape))
    # 6 x 2^125 is the largest E2M1 multiple bfloat16 holds. Downwards 0.5 x 2^-127 is still one of its numbers.
    if int(scale.view(torch.uint8).max()) > 127 + 125:
        fine = scale.double()[:, :, None] * pairs.view(shape).double()
        _require_exact(out, fine.view(rows, -1))
    return out


@functools.cache
def _e2m1_pairs() -> Tensor:
    """[256] int32: the two values of each byte as bfloat16, the low half first in memory."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int32).flatten()


def _require_exact(out: Tensor, exact: Tensor) -> None:
    if not torch.equal(out.double(), exact):
        raise OverflowError


class _Reader:
    """The shards, mapped. A tensor handed out is a copy: the file may change under a mapping."""

    def __init__(self, found: Survey, files: ExitStack) -> None:
        self.found = found
        self.files: dict[str, Any] = {}
        for shard, header in found.shards.items():
            try:
                self.files[shard] = files.enter_context(safe_open(header.path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{header.path}: cannot be read: {error}. Download it again.") from None

    def refuse(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.found.shards[self.found.where[name]].path}: tensor {name} {why}.")

    def mapped(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self.files[self.found.where[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self.refuse(name, f"cannot be read: {error}") from None
        if tuple(tensor.shape) != self.found.spec(name).shape:
            raise self.refuse(name, "changed on disk while it was read; load again once nobody writes there")
        return tensor

    def plain(self, name: str) -> Tensor:
        tensor = self.mapped(name).clone()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise self.refuse(name, "holds NaN or infinity; the file is damaged, download it again")
        return tensor

    def scaled(self, name: str, combine: Callable[[Tensor, Tensor], Any]) -> Any:
        """`name`.weight and `name`.scale, multiplied or held together by `combine`."""
        weight, scale = self.mapped(f"{name}.weight"), self.mapped(f"{name}.scale")
        if scale.dtype == torch.float32:
            if not torch.isfinite(scale).all():
                raise self.refuse(f"{name}.scale", "holds NaN or infinity; the file is damaged, download it again")
        elif (scale.view(torch.uint8) == 255).any():
            raise self.refuse(f"{name}.scale", "holds byte 255, which is NaN; the file is damaged, download it again")
        if weight.dtype == torch.float8_e4m3fn and ((weight.view(torch.uint8) & 0x7F) == 0x7F).any():
            raise self.refuse(f"{name}.weight", "holds NaN; the file is damaged, download it again")
        try:
            result = combine(weight, scale)
        except OverflowError:
            raise self.refuse(f"{name}.scale", "leaves the range in which bfloat16 is exact") from None
        if isinstance(result, Tensor) and result.dtype == torch.float32 and not torch.isfinite(result).all():
            raise self.refuse(f"{name}.scale", "makes weights overflow float32")
        return result


def _read_all(reader: _Reader, config: ModelConfig, table: dict[str, TensorSpec], quantised: bool) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, spec in table.items():
        base = name.removesuffix(".weight")
        if name.endswith(".scale") or ".ffn.experts." in name:
            continue
        if f"{base}.scale" in table and base != name:
            # A scale covers 128 outputs. Where it would cover two groups, there is nothing to keep together.
            whole = not base.endswith(".wo_a") or config.o_lora_rank % FP8_BLOCK == 0
            tensors[name] = reader.scaled(base, keep_fp8 if quantised and whole else dequantise_fp8)
        else:
            tensors[name] = reader.plain(name)
        if spec.dtype == "I64" and not ((tensors[name] >= 0) & (tensors[name] < config.num_experts)).all():
            raise reader.refuse(name, f"names an expert outside 0 to {config.num_experts - 1}")
    blocks = [f"layers.{layer}" for layer in range(config.num_layers)]
    for block in blocks + ["mtp.0"] * ("mtp.0.norm.weight" in table):
        for matrix in ("w1", "w2", "w3"):
            at = f"{block}.ffn.experts"
            stack = _stack_fp4 if quantised and reader.found.formats.experts == "fp4" else _stack_experts
            tensors[f"{at}.{matrix}"] = stack(reader, at, matrix, config)
    return tensors


def _stack_fp4(reader: _Reader, at: str, matrix: str, config: ModelConfig) -> Fp4Stack:
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    outputs, inputs = (hidden, inner) if matrix == "w2" else (inner, hidden)
    codes = torch.empty(config.num_experts, outputs, inputs // 2, dtype=torch.uint8)
    scales = torch.empty(config.num_experts, outputs, inputs // FP4_BLOCK, dtype=torch.uint8)
    for expert in range(config.num_experts):
        packed, scale = reader.scaled(f"{at}.{expert}.{matrix}", lambda weight, scale: (weight, scale))
        codes[expert], scales[expert] = packed.view(torch.uint8), scale.view(torch.uint8)
        if int(scales[expert].max()) > MAX_FP4_SCALE:
            raise reader.refuse(
                f"{at}.{expert}.{matrix}.scale", "holds a power of two above 2, which GPU kernels refuse"
            )
    return Fp4Stack(codes, scales)


def _stack_experts(reader: _Reader, at: str, matrix: str, config: ModelConfig) -> Tensor:
    """-> [E, O, I]; each expert is dequantised straight into its place."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    shape = (config.num_experts, hidden, inner) if matrix == "w2" else (config.num_experts, inner, hidden)
    whole = reader.found.formats.scale == "F32"
    stack = torch.empty(shape, dtype=torch.float32 if whole else torch.bfloat16)
    for expert in range(config.num_experts):
        name = f"{at}.{expert}.{matrix}"
        if reader.found.formats.experts == "fp4":
            reader.scaled(name, functools.partial(dequantise_mxfp4, out=stack[expert]))
        else:
            stack[expert] = reader.scaled(name, dequantise_fp8)
    return stack


def _require_memory(directory: Path, table: dict[str, TensorSpec]) -> None:
    """Refuse before the kernel's out-of-memory killer would, half an hour later and without a word."""
    needed = loaded_bytes(table)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"{directory}: takes {needed / 1e9:,.1f} GB of memory once dequantised, but {free / 1e9:,.1f} GB are free. "
            "Use a machine with more memory or a smaller model."
        )


def _fingerprint(found: Survey) -> str:
    """Config, index, headers and sizes, plus the data: all of it when small, else 64 strips of 4 KiB per shard.

    The strips tell fine-tunes of one model apart, whose headers are equal; they cannot find a single flipped bit.
    """
    digest = hashlib.sha256(found.identity)
    whole = sum(header.size for header in found.shards.values()) < WHOLE_DIGEST_BYTES
    for shard in sorted(found.shards):
        header = found.shards[shard]
        try:
            with header.path.open("rb") as file:
                if whole:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for strip in range(_STRIPS):
                    file.seek(strip * max(0, header.size - _STRIP_BYTES) // (_STRIPS - 1))
                    digest.update(file.read(_STRIP_BYTES))
        except OSError as error:
            raise CheckpointError(f"{header.path}: cannot be read: {error.strerror}.") from None
    return digest.hexdigest()
