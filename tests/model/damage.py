"""Ways to break a checkpoint, and what must be said about each.

A row names the files and tensors its message must contain. `header` rows show without reading tensor data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
WQ_A = "layers.0.attn.wq_a"
EXPERT = "layers.1.ffn.experts.2.w1"


@dataclass(frozen=True)
class Damage:
    name: str
    inflict: Callable[[Path], None]
    says: tuple[str, ...]
    header: bool = True


# Tools.


def change_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        data = json.loads((model / name).read_text())
        change(data)
        (model / name).write_text(json.dumps(data))

    return inflict


def config(**fields: Any) -> Callable[[Path], None]:
    return change_json("config.json", lambda data: data.update(fields))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict[str, Any]], None], shard: str = FIRST) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        entries, data = split(model / shard)
        change(entries)
        join(model / shard, json.dumps(entries).encode(), data)

    return inflict


def raw_header(content: bytes) -> Callable[[Path], None]:
    return lambda model: join(model / FIRST, content, b"")


def length(count: int) -> Callable[[Path], None]:
    """Overwrite the 8 bytes that give the header's length."""

    def inflict(model: Path) -> None:
        raw = (model / FIRST).read_bytes()
        (model / FIRST).write_bytes(count.to_bytes(8, "little") + raw[8:])

    return inflict


def entry(tensor: str, **fields: Any) -> Callable[[Path], None]:
    return header(lambda entries: entries[tensor].update(fields))


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size + num_bytes)


def poke(model: Path, tensor: str, content: bytes, at: int = 0) -> None:
    """Overwrite bytes of a tensor's data, wherever it lies."""
    shard = model / json.loads((model / INDEX).read_text())["weight_map"][tensor]
    entries, data = split(shard)
    begin = entries[tensor]["data_offsets"][0] + at
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size - len(data) + begin)
        file.write(content)


def poking(tensor: str, content: bytes, at: int = 0) -> Callable[[Path], None]:
    return lambda model: poke(model, tensor, content, at)


def last_tensor(path: Path) -> str:
    entries, _ = split(path)
    entries.pop("__metadata__", None)
    return max(entries, key=lambda name: entries[name]["data_offsets"][1])


def change_tensors(shard: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        tensors = load_file(model / shard)
        change(tensors)
        save_file(tensors, model / shard)

    return inflict


def change_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    return change_json(INDEX, lambda data: change(data["weight_map"]))


def all_of(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        for step in steps:
            step(model)

    return inflict


def link_out(name: str) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        outside = model.parent / "elsewhere"
        (model / name).rename(outside)
        (model / name).symlink_to(outside)

    return inflict


def replace_by(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return inflict


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def inflict(model: Path) -> None:
        (model / name).write_bytes(b"")
        os.truncate(model / name, size)

    return inflict


def in_two_shards(model: Path) -> None:
    # Another tensor of the second shard gives up its name, so that nothing else is wrong.
    tensor = load_file(model / FIRST)["embed.weight"]
    change_tensors(SECOND, lambda tensors: tensors.update({"embed.weight": tensor}))(model)


def shift(tensor: str, by: int) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        begin, end = entries[tensor]["data_offsets"]
        entries[tensor]["data_offsets"] = [begin + by, end + by]

    return change


def zero_sized(entries: dict[str, Any]) -> None:
    entries["nothing"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def nan_constant(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"factor": 16', '"factor": NaN'))


def twice(model: Path) -> None:
    entries, data = split(model / FIRST)
    text = json.dumps(entries)
    join(model / FIRST, (text[:-1] + ', "embed.weight": ' + json.dumps(entries["embed.weight"]) + "}").encode(), data)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

DAMAGES = [
    # config.json
    Damage("config missing", remove("config.json"), ("config.json", "is missing")),
    Damage("config of 0 bytes", write("config.json", b""), ("config.json", "empty (0 bytes)")),
    Damage("config not JSON", write("config.json", b"{oops"), ("config.json", "not valid JSON")),
    Damage("config not UTF-8", write("config.json", b'{"a": "\xff"}'), ("config.json", "not UTF-8 (byte 7)")),
    Damage("config a list", write("config.json", b"[1]"), ("config.json", "is a list; expected a JSON object")),
    Damage("config nested", write("config.json", DEEP), ("config.json", "nested too deeply")),
    Damage("config says twice", write("config.json", b'{"a": 1, "a": 2}'), ("config.json", "'a' appears twice")),
    Damage("config with NaN", nan_constant, ("config.json", "NaN is not a JSON number")),
    Damage("config of 65 MiB", sparse("config.json", 65 << 20), ("config.json", "68,157,440 bytes; expected at most")),
    Damage("config a link out", link_out("config.json"), ("config.json", "leads outside the checkpoint")),
    Damage("remote code", config(auto_map={"AutoModel": "evil.Model"}), ("config.json", "auto_map", "Python code")),
    Damage(
        "hidden size of another model",
        config(hidden_size=192),
        (FIRST, "tensor embed.weight is BF16 [320, 160]", "must be BF16 [320, 192]"),
    ),
    Damage("vocabulary of another model", config(vocab_size=384), ("tensor embed.weight", "must be BF16 [384, 160]")),
    Damage("hidden size no block of 32", config(hidden_size=100), ("config.json", "hidden_size=100", "multiple of 32")),
    Damage("experts said to be FP8", config(expert_dtype="fp8"), ("config.json", "expert_dtype is 'fp8'", "are 'fp4'")),
    Damage(
        "other FP8 blocks",
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ("config.json", "weight_block_size is [32, 32]", "[128, 128]"),
    ),
    Damage(
        "more layers than weights",
        config(num_hidden_layers=4, compress_ratios=[0, 4, 128, 0]),
        ("tensor layers.3.hc_attn_fn is missing", "expected F32 [24, 640]"),
    ),
    Damage(
        "fewer layers than weights",
        config(num_hidden_layers=2, compress_ratios=[0, 4]),
        (SECOND, "tensor 'layers.2.", "has no place in this model"),
    ),
    # Index
    Damage("index missing", remove(INDEX), (INDEX, "is missing, and so is model.safetensors")),
    Damage("index garbage", write(INDEX, b"\x80\x04"), (INDEX, "not UTF-8")),
    Damage("index without map", write(INDEX, b'{"weight_map": {}}'), (INDEX, "has no weight_map")),
    Damage(
        "index climbs",
        change_index(lambda m: m.update({"embed.weight": "../x.safetensors"})),
        (INDEX, "'embed.weight'", "'../x.safetensors'", "same directory"),
    ),
    Damage(
        "index absolute",
        change_index(lambda m: m.update({"embed.weight": "/etc/x.safetensors"})),
        (INDEX, "'embed.weight'", "same directory"),
    ),
    Damage(
        "index names a pickle",
        change_index(lambda m: m.update({"embed.weight": "model.bin"})),
        (INDEX, "'embed.weight'", "'model.bin'", "expected the name of a .safetensors file"),
    ),
    Damage(
        "index names a number",
        change_json(INDEX, lambda d: d["weight_map"].update({"embed.weight": 3})),
        (INDEX, "'embed.weight'", "into 3"),
    ),
    Damage(
        "tensor not in the index",
        change_index(lambda m: m.pop("norm.weight")),
        (SECOND, "tensor norm.weight is not in the index"),
    ),
    Damage(
        "index wrong about a tensor",
        change_index(lambda m: m.update({"embed.weight": SECOND})),
        (SECOND, "tensor 'embed.weight' is missing, and the index says it is here"),
    ),
    # Shards
    Damage("shard missing", remove(SECOND), (SECOND, "is missing")),
    Damage("shard a link out", link_out(FIRST), (FIRST, "leads outside the checkpoint", "elsewhere")),
    Damage("shard a dangling link", replace_by(FIRST, lambda p: p.symlink_to("nowhere")), ("nowhere", "is missing")),
    Damage("shard a directory", replace_by(FIRST, Path.mkdir), (FIRST, "is not a regular file")),
    Damage("shard a pipe", replace_by(FIRST, os.mkfifo), (FIRST, "is not a regular file")),
    Damage("shard of 0 bytes", write(FIRST, b""), (FIRST, "has 0 bytes")),
    Damage("shard of 4 bytes", write(FIRST, b"\x01\0\0\0"), (FIRST, "has 4 bytes")),
    Damage("header of 2^63", length(1 << 63), (FIRST, "9,223,372,036,854,775,808", "not a safetensors file")),
    Damage("header over the limit", length(100_000_001), (FIRST, "at most 100,000,000")),
    Damage("header past the end", length(90_000_000), (FIRST, "fewer than its header of 90,000,000", "truncated")),
    Damage("header not an object", raw_header(b"[1, 2]  "), (FIRST, "does not begin with '{'")),
    Damage("header garbage", raw_header(b'{"a": oops}'), (FIRST, "header", "not valid JSON")),
    Damage("header not UTF-8", raw_header(b'{"\xff\xfe": 1}'), (FIRST, "header", "not UTF-8")),
    Damage("header nested", raw_header(DEEP), (FIRST, "nested too deeply")),
    Damage("header names a tensor twice", twice, (FIRST, "'embed.weight' appears twice")),
    Damage(
        "entry not an object",
        header(lambda e: e.update({"embed.weight": 5})),
        (FIRST, "tensor 'embed.weight'", "exactly dtype, shape and data_offsets"),
    ),
    Damage(
        "offset negative", entry("embed.weight", data_offsets=[-2, 102398]), (FIRST, "embed.weight", "[-2, 102398]")
    ),
    Damage("offsets reversed", entry("embed.weight", data_offsets=[102400, 0]), (FIRST, "embed.weight", "[102400, 0]")),
    Damage(
        "offsets beyond the file", header(shift("embed.weight", 1 << 40)), (FIRST, "embed.weight", "ends at data byte")
    ),
    Damage("offsets overlap", header(shift("layers.0.attn_norm.weight", -8)), (FIRST, "overlaps the tensor before it")),
    Damage("offsets leave a hole", header(lambda e: e.pop("layers.0.attn_norm.weight")), (FIRST, "leaves a hole")),
    Damage("tensor of no size", header(zero_sized), (FIRST, "'nothing'", "shape [0]", "positive integers")),
    Damage(
        "shape against bytes",
        entry("embed.weight", shape=[320, 161]),
        (FIRST, "embed.weight", "takes 103,040 bytes", "hold 102,400"),
    ),
    Damage("shape overflows", entry("embed.weight", shape=[1 << 62, 1 << 62]), (FIRST, "embed.weight", "takes")),
    Damage("shape of floats", entry("embed.weight", shape=[320.0, 160]), (FIRST, "embed.weight", "[320.0, 160]")),
    Damage(
        "shape of 4,000 digits",
        entry("embed.weight", shape=[10**4000, 10**4000]),
        (FIRST, "embed.weight", "expected a list of positive integers"),
    ),
    Damage(
        "tensor named to break a log line",
        header(lambda e: e.update({"x\nready": e.pop("embed.weight")})),
        (FIRST, r"'x\nready'", "its name is not made of letters"),
    ),
    Damage(
        "shard named by half a character",
        change_index(lambda m: m.update({"embed.weight": "\ud800.safetensors"})),
        (INDEX, "'embed.weight'", r"\ud800"),
    ),
    Damage("dtype unknown", entry("embed.weight", dtype="Q4_K"), (FIRST, "embed.weight", "unknown dtype 'Q4_K'")),
    Damage(
        "dtype another",
        entry("embed.weight", dtype="F16"),
        (FIRST, "tensor embed.weight is F16 [320, 160]", "must be BF16 [320, 160]"),
    ),
    Damage(
        "shape transposed",
        entry("embed.weight", shape=[160, 320]),
        (FIRST, "tensor embed.weight is BF16 [160, 320]", "must be BF16 [320, 160]"),
    ),
    Damage("shard truncated", lambda model: cut(model / FIRST, -1), (FIRST, "truncated; download it again")),
    Damage("shard too long", lambda model: cut(model / FIRST, 5), (FIRST, "5 bytes behind its last tensor")),
    Damage("tensor in two shards", in_two_shards, (SECOND, "tensor embed.weight is also in " + FIRST)),
    Damage(
        "tensor missing",
        all_of(change_tensors(SECOND, lambda t: t.pop("norm.weight")), change_index(lambda m: m.pop("norm.weight"))),
        ("tensor norm.weight is missing", "expected BF16 [160]"),
    ),
    Damage(
        "tensor extra",
        all_of(
            change_tensors(FIRST, lambda t: t.update(lora=t["embed.weight"].clone())),
            change_index(lambda m: m.update(lora=FIRST)),
        ),
        (FIRST, "tensor 'lora' has no place in this model"),
    ),
    # Tokenizer
    Damage("tokenizer missing", remove("tokenizer.json"), ("tokenizer.json", "is missing")),
    Damage("tokenizer not JSON", write("tokenizer.json", b"<html>"), ("tokenizer.json", "not valid JSON")),
    Damage("tokenizer another thing", write("tokenizer.json", b'{"model": 1}'), ("tokenizer.json", "not a tokenizer")),
    Damage("tokenizer of 1 GB", sparse("tokenizer.json", 1 << 30), ("tokenizer.json", "expected at most")),
    Damage(
        "tokenizer too large for the vocabulary",
        change_json("tokenizer.json", lambda d: d["model"]["vocab"].update(zz=320)),
        ("tokenizer.json", "'zz' has id 320", "vocab_size in config.json is 320"),
    ),
    Damage(
        "tokenizer that numbers a token wrongly",
        change_json("tokenizer.json", lambda d: d["added_tokens"][-1].update(id=300)),
        ("tokenizer.json", "'<｜read_url｜>' is given id 300", "270"),
    ),
    Damage(
        "tokenizer with code",
        change_json("tokenizer_config.json", lambda d: d.update(auto_map={"AutoTokenizer": "evil.T"})),
        ("tokenizer_config.json", "auto_map"),
    ),
    # Values
    Damage("NaN scale of FP8", poking(f"{WQ_A}.scale", b"\xff"), (FIRST, f"{WQ_A}.scale", "byte 255"), header=False),
    Damage(
        "NaN scale of MXFP4", poking(f"{EXPERT}.scale", b"\xff", at=9), (f"{EXPERT}.scale", "byte 255"), header=False
    ),
    Damage(
        "scale too large for FP8",
        poking(f"{WQ_A}.scale", b"\xfe"),
        (f"{WQ_A}.scale", "bfloat16 is exact"),
        header=False,
    ),
    Damage(
        "scale too small for FP8",
        poking(f"{WQ_A}.scale", b"\x00"),
        (f"{WQ_A}.scale", "bfloat16 is exact"),
        header=False,
    ),
    Damage(
        "scale too large for MXFP4",
        poking(f"{EXPERT}.scale", b"\xfe" * 32 * 5),
        (f"{EXPERT}.scale", "bfloat16 is exact"),
        header=False,
    ),
    Damage(
        "NaN in FP8", poking(f"{WQ_A}.weight", b"\x7f", at=77), (FIRST, f"{WQ_A}.weight", "holds NaN"), header=False
    ),
    Damage(
        "negative NaN in FP8", poking(f"{WQ_A}.weight", b"\xff", at=6), (f"{WQ_A}.weight", "holds NaN"), header=False
    ),
    Damage(
        "infinity in BF16", poking("norm.weight", b"\x80\x7f", at=4), (SECOND, "norm.weight", "infinity"), header=False
    ),
    Damage(
        "NaN in F32",
        poking("layers.0.attn.attn_sink", b"\x00\x00\xc0\x7f"),
        ("layers.0.attn.attn_sink", "NaN"),
        header=False,
    ),
    Damage(
        "expert past the last",
        poking("layers.0.ffn.gate.tid2eid", (4).to_bytes(8, "little"), at=80),
        (FIRST, "layers.0.ffn.gate.tid2eid", "outside 0 to 3"),
        header=False,
    ),
    Damage(
        "expert negative", poking("layers.0.ffn.gate.tid2eid", b"\xff" * 8), ("tid2eid", "outside 0 to 3"), header=False
    ),
]
