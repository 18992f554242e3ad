"""`penumbra model inspect`: numbers that match the published ones, and every fault listed instead of raised."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from engine.config import ModelConfig
from engine.model.inspect import GPUS, USABLE, inspect, render
from engine.model.survey import TensorSpec, loaded_bytes, tensor_table
from engine.model.weights import load_checkpoint
from tests.model.damage import DAMAGES, Damage, config, join, write
from wire.errors import CheckpointError

FLASH: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "num_hash_layers": 3,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
}
PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}


@pytest.fixture(scope="module")
def full_size(pristine: Path) -> Callable[[dict[str, Any]], ModelConfig]:
    base = json.loads((pristine / "config.json").read_text())
    return lambda fields: ModelConfig.from_json(base | fields, source=Path("config.json"))


@pytest.mark.parametrize(
    ("fields", "tensors", "num_bytes", "parameters"),
    [
        (FLASH, 69_187, 159_609_485_896, 290_942_289_362),
        (PRO, 145_116, 864_704_792_696, 1_598_837_347_742),
    ],
    ids=["flash", "pro"],
)
def test_the_tensor_table_has_the_published_totals(
    full_size: Callable[[dict[str, Any]], ModelConfig],
    fields: dict[str, Any],
    tensors: int,
    num_bytes: int,
    parameters: int,
) -> None:
    table = tensor_table(full_size(fields), mtp=True)
    assert len(table) == tensors
    assert sum(spec.num_bytes for spec in table.values()) == num_bytes
    assert (
        sum(spec.num_weights for name, spec in table.items() if spec.dtype != "I64" and not name.endswith(".scale"))
        == parameters
    )


@pytest.fixture(scope="module")
def flash(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of Flash's headers over 160 GB of holes: it takes no disk, and reading its data would take minutes."""
    out = tmp_path_factory.mktemp("full") / "flash"
    out.mkdir()
    shutil.copy(pristine / "tokenizer.json", out)
    data = json.loads((pristine / "config.json").read_text()) | FLASH
    (out / "config.json").write_text(json.dumps(data))
    table = list(tensor_table(ModelConfig.from_json(data, source=out), mtp=True).items())
    count, placed = 46, {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part: list[tuple[str, TensorSpec]] = table[number * len(table) // count : (number + 1) * len(table) // count]
        entries, at = {}, 0
        for tensor, spec in part:
            placed[tensor] = name
            entries[tensor] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.num_bytes]}
            at += spec.num_bytes
        header = json.dumps(entries).encode()
        join(out / name, header, b"")
        os.truncate(out / name, 8 + len(header) + at)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return out


def test_a_full_size_model_is_described_from_its_headers(flash: Path) -> None:
    found = inspect(flash, context=900_000)
    assert found.problems == []
    assert (found.num_shards, found.num_tensors, found.weight_bytes) == (46, 69_187, 159_609_485_896)
    assert {dtype: count for dtype, (count, _) in found.dtypes.items()} == {
        "BF16": 433,
        "F32": 417,
        "F8_E4M3": 375,
        "F8_E8M0": 34_167,
        "I8": 33_792,
        "I64": 3,
    }
    assert {part: f"{size / 1e9:.3f}" for part, size in found.parts.items() if part != "norms"} == {
        "routed experts": "147.170",
        "attention": "4.599",
        "draft layers": "3.594",
        "shared experts": "1.082",
        "head": "1.059",
        "embedding": "1.059",
        "compressors and indexers": "0.801",
        "hyper-connections": "0.136",
        "gates": "0.090",
        "hash routing tables": "0.019",
    }
    assert sum(found.parts.values()) == found.weight_bytes
    assert found.parameters + found.draft_parameters == 290_942_289_362
    assert (f"{found.parameters / 1e9:.2f}", f"{found.active_parameters / 1e9:.2f}") == ("284.33", "13.27")

    # Pages of 256 tokens: 21 C4 layers of 37,440 + 8,448 bytes, 20 C128 layers of 1,728.
    assert found.kv["v4"].token_bytes == 3899.25
    assert found.kv["exact"].token_bytes == 21 * (512 + 128) + 20 * 16
    # Three window pages (43 layers, and 21 pairs of C4 rings of 16 rows), and 20 C128 rings of 256 rows.
    assert found.kv["v4"].fixed_bytes == 3 * (43 * 149_760 + 21 * 16 * (8_192 + 2_048)) + 20 * 256 * 4_096
    sequence = math.ceil(900_000 / 256) * 256 * 3899.25 + found.kv["v4"].fixed_bytes
    assert found.kv["v4"].sequence_bytes(900_000) == sequence

    # 156 GB of weights: beyond one H200, and beyond two H100 with their 72 usable GB each.
    assert [fit.gpus for fit in found.fits] == [4, 2, 1]
    weights = found.weight_bytes - found.draft_bytes
    for fit, memory in zip(found.fits, GPUS.values(), strict=True):
        assert fit.gpus is not None
        assert fit.sequences == int((memory * USABLE - weights / fit.gpus) // sequence)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(flash: Path) -> None:
    found = inspect(flash)
    # Experts, attention and shared experts become bfloat16: four times and twice their bytes.
    assert 560e9 < found.loaded_bytes < 580e9
    if psutil.virtual_memory().available > found.loaded_bytes:
        pytest.skip("this machine could hold it")
    with pytest.raises(
        CheckpointError, match=r"flash: takes 56\d\.\d GB of memory once dequantised, but .* GB are free"
    ):
        load_checkpoint(flash)


def test_the_small_model_takes_the_memory_that_inspect_says(pristine: Path) -> None:
    checkpoint = load_checkpoint(pristine)
    held = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert inspect(pristine).loaded_bytes == held == loaded_bytes(tensor_table(checkpoint.config))


def test_a_geometry_of_its_own_has_only_the_exact_layout(pristine: Path) -> None:
    found = inspect(pristine, context=1000)
    assert list(found.kv) == ["exact"]
    assert found.kv["exact"].token_bytes == (72 + 32) * 4 / 4 + 72 * 4 / 128


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.header], ids=lambda damage: damage.name)
def test_a_fault_in_the_headers_is_listed_and_not_raised(model: Path, damage: Damage) -> None:
    damage.inflict(model)
    problems = inspect(model).problems
    assert any(all(words in problem for words in damage.says) for problem in problems), problems


def test_damage_to_values_does_not_show_without_reading_them(model: Path) -> None:
    for damage in DAMAGES:
        if not damage.header:
            damage.inflict(model)
    assert inspect(model).problems == []


def test_every_fault_is_listed_at_once(model: Path) -> None:
    config(sliding_window=64)(model)
    write("tokenizer.json", b"")(model)
    write("model-00002-of-00002.safetensors", b"1234")(model)
    said = [problem.removeprefix(f"{model}/") for problem in inspect(model).problems]
    assert [problem.split(":")[0] for problem in said] == [
        "config.json",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
    ]


def shown(directory: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(inspect(directory, context=900_000)))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_terminal_shows_what_matters(flash: Path) -> None:
    text = shown(flash)
    for words in ("43: 2 plain, 21 C4, 20 C128", "159,609,485,896", "3,899.25", "H200 141 GB", "147,169,738,752"):
        assert words in text
    assert "draft layers, 3.59 GB, are not counted below" in text


def test_the_terminal_shows_problems_of_an_empty_directory(tmp_path: Path) -> None:
    text = " ".join(shown(tmp_path).split())
    assert "this checkpoint cannot be served" in text
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert name in text
