"""What a checkpoint directory holds, read from its headers alone: no tensor data, so 800 GB take seconds.

A DeepSeek-V4 checkpoint has exactly one right list of tensors, and `tensor_table` writes it down from the config.
`survey` compares it with what the directory offers and lists everything that differs. The loader refuses a
checkpoint with any such problem; `penumbra model inspect` shows them all.

Everything read here is hostile until checked: JSON is bounded and strict, files are regular and inside the
directory, offsets are within the file. Only safetensors and JSON are ever opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from engine.config import C4_RATIO, ModelConfig
from wire.errors import CheckpointError, ConfigError

FP8_BLOCK = 128
"""FP8 weights carry one scale per block of 128 x 128."""
FP4_BLOCK = 32
"""MXFP4 weights carry one scale per 32 neighbouring inputs."""

_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    name: bits
    for bits, names in {
        8: "BOOL I8 U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64 C64",
    }.items()
    for name in names.split()
}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_JSON_BYTES = 64 << 20  # the index of V4-Pro takes 11 MB, its tokenizer 8 MB
_MAX_INT = 1 << 63
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")  # of tensors and files: safe in a path, a log line and a message
_FOREIGN_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}


class TensorSpec(NamedTuple):
    """A tensor as stored: safetensors dtype name, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BITS[self.dtype] // 8

    @property
    def num_weights(self) -> int:
        """Values the tensor stands for: an I8 byte holds two MXFP4 weights."""
        return math.prod(self.shape) * (2 if self.dtype == "I8" else 1)

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


class Formats(NamedTuple):
    """How a checkpoint stores what it quantises. "-Base" checkpoints have FP8 experts and float32 scales."""

    experts: Literal["fp4", "fp8"] = "fp4"
    scale: Literal["F8_E8M0", "F32"] = "F8_E8M0"


@dataclass(frozen=True, slots=True)
class Header:
    """One shard's header, checked: every tensor lies inside the file, none overlap, nothing is left over."""

    path: Path  # links resolved
    size: int  # bytes of the file
    digest: bytes  # of the header's own bytes
    tensors: dict[str, TensorSpec]


@dataclass(slots=True)
class Survey:
    """A checkpoint as its headers describe it. `problems` empty means the loader may read it."""

    directory: Path
    problems: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    formats: Formats = field(default_factory=Formats)
    shards: dict[str, Header] = field(default_factory=dict)  # by file name
    where: dict[str, str] = field(default_factory=dict)  # tensor -> file name
    draft: list[str] = field(default_factory=list)  # tensors of MTP or block-draft layers
    ignored: list[str] = field(default_factory=list)  # files that are never opened
    tokenizer: Path | None = None
    identity: bytes = b""  # digest of config, index, and each shard's header and size

    def spec(self, name: str) -> TensorSpec:
        return self.shards[self.where[name]].tensors[name]


def tensor_table(config: ModelConfig, formats: Formats = Formats(), *, mtp: bool = False) -> dict[str, TensorSpec]:  # noqa: B008
    """Every tensor of a checkpoint in the official layout, by official name; with `mtp`, the draft layer's too.

    A quantised `X.weight` is followed at once by its `X.scale`. Raises ConfigError for a geometry the formats
    cannot store.
    """
    c = config
    table: dict[str, TensorSpec] = {}

    def put(name: str, dtype: str, *shape: int) -> None:
        table[name] = TensorSpec(dtype, shape)

    def fp8(name: str, out: int, inputs: int) -> None:
        put(f"{name}.weight", "F8_E4M3", out, inputs)
        put(f"{name}.scale", formats.scale, -(-out // FP8_BLOCK), -(-inputs // FP8_BLOCK))

    def expert(name: str, out: int, inputs: int) -> None:
        if formats.experts == "fp8":
            return fp8(name, out, inputs)
        put(f"{name}.weight", "I8", out, inputs // 2)
        put(f"{name}.scale", "F8_E8M0", out, inputs // FP4_BLOCK)

    def compressor(name: str, ratio: int, dim: int) -> None:
        width = dim * (2 if ratio == C4_RATIO else 1)
        put(f"{name}.wkv.weight", "BF16", width, c.hidden_size)
        put(f"{name}.wgate.weight", "BF16", width, c.hidden_size)
        put(f"{name}.ape", "F32", ratio, width)
        put(f"{name}.norm.weight", "BF16", dim)

    def hyper(name: str, rows: int, scales: int) -> None:
        put(f"{name}_fn", "F32", rows, c.hc_mult * c.hidden_size)
        put(f"{name}_base", "F32", rows)
        put(f"{name}_scale", "F32", scales)

    def block(at: str, ratio: int, hashed: bool) -> None:
        hyper(f"{at}.hc_attn", c.hc_mult * (c.hc_mult + 2), 3)
        hyper(f"{at}.hc_ffn", c.hc_mult * (c.hc_mult + 2), 3)
        put(f"{at}.attn_norm.weight", "BF16", c.hidden_size)
        put(f"{at}.ffn_norm.weight", "BF16", c.hidden_size)
        fp8(f"{at}.attn.wq_a", c.q_lora_rank, c.hidden_size)
        put(f"{at}.attn.q_norm.weight", "BF16", c.q_lora_rank)
        fp8(f"{at}.attn.wq_b", c.num_heads * c.head_dim, c.q_lora_rank)
        fp8(f"{at}.attn.wkv", c.head_dim, c.hidden_size)
        put(f"{at}.attn.kv_norm.weight", "BF16", c.head_dim)
        put(f"{at}.attn.attn_sink", "F32", c.num_heads)
        fp8(f"{at}.attn.wo_a", c.o_groups * c.o_lora_rank, c.num_heads // c.o_groups * c.head_dim)
        fp8(f"{at}.attn.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        if ratio:
            compressor(f"{at}.attn.compressor", ratio, c.head_dim)
        if ratio == C4_RATIO:
            fp8(f"{at}.attn.indexer.wq_b", c.index_heads * c.index_head_dim, c.q_lora_rank)
            put(f"{at}.attn.indexer.weights_proj.weight", "BF16", c.index_heads, c.hidden_size)
            compressor(f"{at}.attn.indexer.compressor", ratio, c.index_head_dim)
        put(f"{at}.ffn.gate.weight", "BF16", c.num_experts, c.hidden_size)
        if hashed:
            put(f"{at}.ffn.gate.tid2eid", "I64", c.vocab_size, c.experts_per_token)
        else:
            put(f"{at}.ffn.gate.bias", "F32", c.num_experts)
        for n in range(c.num_experts):
            expert(f"{at}.ffn.experts.{n}.w1", c.moe_intermediate_size, c.hidden_size)
            expert(f"{at}.ffn.experts.{n}.w2", c.hidden_size, c.moe_intermediate_size)
            expert(f"{at}.ffn.experts.{n}.w3", c.moe_intermediate_size, c.hidden_size)
        fp8(f"{at}.ffn.shared_experts.w1", c.moe_intermediate_size, c.hidden_size)
        fp8(f"{at}.ffn.shared_experts.w2", c.hidden_size, c.moe_intermediate_size)
        fp8(f"{at}.ffn.shared_experts.w3", c.moe_intermediate_size, c.hidden_size)

    if formats.experts == "fp4":
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(c, name) % FP4_BLOCK:
                raise ConfigError(
                    f"{name}={getattr(c, name)} is not a multiple of {FP4_BLOCK}. MXFP4 experts share one scale "
                    f"among {FP4_BLOCK} inputs; choose a multiple of {FP4_BLOCK}."
                )
    put("embed.weight", "BF16", c.vocab_size, c.hidden_size)
    for n, ratio in enumerate(c.compress_ratios):
        block(f"layers.{n}", ratio, hashed=n < c.num_hash_layers)
    put("norm.weight", "BF16", c.hidden_size)
    hyper("hc_head", c.hc_mult, 1)
    put("head.weight", "BF16", c.vocab_size, c.hidden_size)
    if mtp:
        block("mtp.0", 0, hashed=False)
        fp8("mtp.0.e_proj", c.hidden_size, c.hidden_size)
        fp8("mtp.0.h_proj", c.hidden_size, c.hidden_size)
        for name in ("enorm", "hnorm", "norm"):
            put(f"mtp.0.{name}.weight", "BF16", c.hidden_size)
        hyper("mtp.0.hc_head", c.hc_mult, 1)
    return table


def loaded_bytes(table: dict[str, TensorSpec]) -> int:
    """Memory the loader's tensors take: quantised weights become bfloat16, or float32 where scales are float32."""
    total = 0
    for name, spec in table.items():
        if name.endswith(".scale"):
            continue
        scale = table.get(name.removesuffix(".weight") + ".scale")
        if scale is None:
            total += spec.num_bytes
        else:
            total += spec.num_weights * (4 if scale.dtype == "F32" else 2)
    return total


def survey(directory: Path) -> Survey:
    """Read config, index, headers and tokenizer of a checkpoint, and compare them with what they must be.

    Never raises for what is in the directory: every fault is one line in `problems`, the gravest first.
    """
    found = Survey(directory)
    if not directory.is_dir():
        found.problems.append(f"{directory}: no such directory; expected one with config.json and *.safetensors.")
        return found
    identity = hashlib.sha256(b"penumbra checkpoint 1")

    raw_config: dict[str, Any] = {}
    index: dict[str, str] = {}
    with _collecting(found.problems):
        raw, raw_config = _read_json(directory, "config.json")
        identity.update(hashlib.sha256(raw).digest())
        found.config = ModelConfig.from_json(raw_config, source=directory / "config.json")
    with _collecting(found.problems):
        index = _weight_map(directory)
        identity.update(repr(sorted(index.items())).encode())
        for shard in sorted(set(index.values())):
            with _collecting(found.problems):
                header = found.shards[shard] = read_header(_inside(directory, shard))
                identity.update(f"{shard} {header.size} ".encode() + header.digest)
        _place_tensors(found, index)
    with _collecting(found.problems):
        found.tokenizer = _check_tokenizer(directory, found.config)
    if found.config is not None and found.shards:
        with _collecting(found.problems):
            _compare(found, raw_config, complete=set(index.values()) == set(found.shards))
    found.ignored = sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.suffix in _FOREIGN_SUFFIXES or (entry.suffix == ".safetensors" and entry.name not in found.shards)
    )
    found.identity = identity.digest()
    return found


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems.append(str(error))


def _inside(directory: Path, name: str) -> Path:
    """The file's real path. A link may not lead out of the directory, or a checkpoint could name any file here."""
    path = directory / name
    real, root = path.resolve(), directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # a Hugging Face cache: the files are links into the model's own blobs
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{path}: leads outside the checkpoint, to {real}. Put the file itself into {directory}.")
    return real


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """A read-only descriptor of a regular file; never follows a link, never waits on a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing. Download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        yield fd
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    finally:
        os.close(fd)


def _read(fd: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count and (part := os.read(fd, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no name twice, no NaN, bounded depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for n, name in enumerate(names) if name in names[:n])
            raise ValueError(f"the name {reprlib.repr(twice)} appears twice")
        return result

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 (byte {error.start}). Download it again.") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}. Download it again.") from None
    except RecursionError:
        raise CheckpointError(f"{where}: is nested too deeply to be what it should be.") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: is a {type(parsed).__name__}; expected a JSON object.")
    return parsed


def _read_json(directory: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    path = _inside(directory, name)
    with _open(path) as fd:
        size = os.fstat(fd).st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size:,} bytes; expected at most {_MAX_JSON_BYTES:,}.")
        raw = _read(fd, size)
    if not raw:
        raise CheckpointError(f"{path}: is empty (0 bytes). Download it again.")
    return raw, _parse(raw, str(path))


def read_header(path: Path) -> Header:
    """Read and check a safetensors file's header. Raises CheckpointError naming the file and the tensor."""
    with _open(path) as fd:
        size = os.fstat(fd).st_size
        if size < 8:
            raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file. Download it again.")
        length = int.from_bytes(_read(fd, 8), "little")
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: its first 8 bytes give a header of {length:,} bytes; at most {_MAX_HEADER_BYTES:,} are "
                "allowed. This is not a safetensors file."
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: has {size:,} bytes, fewer than its header of {length:,}. It is truncated; download it again."
            )
        raw = _read(fd, length)
    if raw[:1] != b"{":
        raise CheckpointError(f"{path}: its header does not begin with '{{'. This is not a safetensors file.")
    tensors: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in _parse(raw, f"{path}: header").items():
        if name == "__metadata__":
            continue
        begin, end, tensors[name] = _header_entry(path, name, entry)
        spans.append((begin, end, name))
    at, held = 0, size - 8 - length
    spans.sort()
    for _, end, name in spans:
        if end > held:
            raise CheckpointError(
                f"{path}: tensor {name} ends at data byte {end:,}, but the file holds {held:,}. "
                "It is truncated; download it again."
            )
    for begin, end, name in spans:
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name} begins at data byte {begin:,} and {fault}; expected {at:,}.")
        at = end
    if at != held:
        raise CheckpointError(f"{path}: has {held - at:,} bytes behind its last tensor, which no tensor owns.")
    return Header(path, size, hashlib.sha256(raw).digest(), tensors)


def _header_entry(path: Path, name: str, entry: object) -> tuple[int, int, TensorSpec]:
    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {reprlib.repr(name)}{why}")

    if not _NAME.fullmatch(name):
        refuse(": its name is not made of letters, digits, dots, dashes and underscores.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(": its header entry must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        refuse(f" has the unknown dtype {reprlib.repr(dtype)}.")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < _MAX_INT for n in shape):
        refuse(f" has the shape {reprlib.repr(shape)}; expected a list of positive integers.")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < _MAX_INT for n in offsets)
    ):
        refuse(f" has the data_offsets {reprlib.repr(offsets)}; expected [begin, end].")
    spec = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.num_bytes:
        refuse(
            f": {reprlib.repr(shape)} {dtype} takes {spec.num_bytes:,} bytes, but its data_offsets "
            f"[{begin}, {end}] hold {end - begin:,}."
        )
    return begin, end, spec


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> shard file name; a lone model.safetensors is its own index."""
    name = "model.safetensors.index.json"
    if not (directory / name).exists():
        if (directory / "model.safetensors").exists():
            header = read_header(_inside(directory, "model.safetensors"))
            return dict.fromkeys(header.tensors, "model.safetensors")
        raise CheckpointError(f"{directory / name}: is missing, and so is model.safetensors. Download the weights.")
    _, index = _read_json(directory, name)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{directory / name}: has no weight_map; expected tensor names with their files.")
    for tensor, shard in placed.items():
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and _NAME.fullmatch(shard)):
            raise CheckpointError(
                f"{directory / name}: puts tensor {reprlib.repr(tensor)} into {reprlib.repr(shard)}; expected the "
                "name of a .safetensors file in the same directory."
            )
    return placed


def _place_tensors(found: Survey, index: dict[str, str]) -> None:
    """Fill `where`, and require index and headers to agree about every tensor."""
    for shard, header in found.shards.items():
        for name in header.tensors:
            other = found.where.setdefault(name, shard)
            if other != shard:
                found.problems.append(f"{header.path}: tensor {name} is also in {other}; expected it in one file.")
    astray = [name for name in index if index[name] in found.shards and found.where.get(name) != index[name]]
    if astray:
        path, name = found.shards[index[astray[0]]].path, reprlib.repr(astray[0])
        found.problems.append(f"{path}: tensor {name} is missing, and the index says it is here{_more(astray)}.")
    unlisted = [name for name in found.where if name not in index]
    if unlisted:
        path = found.shards[found.where[unlisted[0]]].path
        found.problems.append(f"{path}: tensor {unlisted[0]} is not in the index{_more(unlisted)}.")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _is_draft(name: str) -> bool:
    return name.startswith("mtp.") or "dspark" in name


def _compare(found: Survey, raw_config: dict[str, Any], *, complete: bool) -> None:
    """Hold the tensors on disk against the table of the config; unless `complete`, some shard could not be read."""
    assert found.config is not None
    source = found.directory / "config.json"
    found.formats = _formats(found, raw_config, source)
    found.draft = [name for name in found.where if _is_draft(name)]
    try:
        table = tensor_table(found.config, found.formats)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    missing = [name for name in table if name not in found.where]
    if missing and complete:
        found.problems.append(
            f"{found.directory}: tensor {missing[0]} is missing; expected {table[missing[0]]}{_more(missing)}."
        )
    draft = set(found.draft)
    extra = [name for name in found.where if name not in table and name not in draft]
    if extra:
        path = found.shards[found.where[extra[0]]].path
        found.problems.append(
            f"{path}: tensor {reprlib.repr(extra[0])} has no place in this model{_more(extra)}. Does config.json "
            "belong to these weights?"
        )
    wrong = [name for name, spec in table.items() if name in found.where and found.spec(name) != spec]
    if wrong:
        name = wrong[0]
        found.problems.append(
            f"{found.shards[found.where[name]].path}: tensor {name} is {found.spec(name)}; by config.json it must be "
            f"{table[name]}{_more(wrong)}."
        )


def _formats(found: Survey, raw_config: dict[str, Any], source: Path) -> Formats:
    """Which quantisation the tensors themselves show. What config.json says of it must not contradict them."""
    probe, scale = "layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wq_a.scale"
    experts: Literal["fp4", "fp8"] = "fp8" if probe in found.where and found.spec(probe).dtype == "F8_E4M3" else "fp4"
    scales: Literal["F8_E8M0", "F32"] = (
        "F32" if scale in found.where and found.spec(scale).dtype == "F32" else "F8_E8M0"
    )
    quantisation = raw_config.get("quantization_config") or {}
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{source}: quantization_config is {reprlib.repr(quantisation)}; expected an object.")
    stated = {
        "expert_dtype": raw_config.get("expert_dtype", quantisation.get("expert_dtype")),
        **{name: quantisation.get(name) for name in ("quant_method", "fmt", "scale_fmt", "weight_block_size")},
    }
    shown: dict[str, Any] = {
        "expert_dtype": experts,
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0" if scales == "F8_E8M0" else None,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    for name, value in stated.items():
        if value is not None and shown[name] is not None and value != shown[name]:
            raise CheckpointError(
                f"{source}: {name} is {reprlib.repr(value)}, but the tensors are {shown[name]!r}. "
                "Does config.json belong to these weights?"
            )
    return Formats(experts, scales)


def _check_tokenizer(directory: Path, config: ModelConfig | None) -> Path:
    """tokenizer.json must parse, and name no token the embedding does not have."""
    from tokenizers import Tokenizer  # a Rust library that only this check needs here

    if (directory / "tokenizer_config.json").exists():
        _, settings = _read_json(directory, "tokenizer_config.json")
        if "auto_map" in settings:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: auto_map names Python code to run, and no code from a "
                "checkpoint is run; remove it."
            )
    path = directory / "tokenizer.json"
    raw, stated = _read_json(directory, path.name)
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path}: is not a tokenizer: {reprlib.repr(str(error))}. Download it again.") from None
    if config is not None:
        last, highest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if highest >= config.vocab_size:
            raise CheckpointError(
                f"{path}: token {last!r} has id {highest}, but vocab_size in config.json is {config.vocab_size}."
            )
    for token in stated.get("added_tokens") or []:
        # The library numbers added tokens by itself and does not tell when the file disagrees.
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"{path}: token {token['content']!r} is given id {token['id']}, but its place in the vocabulary is "
                f"{tokenizer.token_to_id(token['content'])}."
            )
    return path
