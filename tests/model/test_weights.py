"""The loader: what it returns is what the bytes mean, and what it refuses, it refuses by name."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model import weights
from engine.model.survey import Formats, tensor_table
from engine.model.weights import Checkpoint, dequantise_fp8, dequantise_mxfp4, load_checkpoint
from tests.model.damage import DAMAGES, FIRST, INDEX, SECOND, Damage, change_json, config, poke, split
from wire.errors import CheckpointError

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 128 else magnitude


def stored(model: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """(header entry, bytes) of a tensor, read without any library."""
    shard = json.loads((model / INDEX).read_text())["weight_map"][name]
    entries, data = split(model / shard)
    begin, end = entries[name]["data_offsets"]
    return entries[name], data[begin:end]


@pytest.fixture(scope="module")
def loaded(pristine: Path) -> Checkpoint:
    return load_checkpoint(pristine)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.wq_a",
        "layers.1.attn.wq_b",
        "layers.2.attn.wo_a",
        "layers.0.attn.wo_b",
        "layers.1.attn.indexer.wq_b",
        "layers.2.ffn.shared_experts.w2",
    ],
)
def test_an_fp8_weight_is_its_code_times_the_scale_of_its_block(pristine: Path, loaded: Checkpoint, name: str) -> None:
    entry, codes = stored(pristine, f"{name}.weight")
    scale_entry, scales = stored(pristine, f"{name}.scale")
    rows, columns = entry["shape"]
    assert scale_entry["shape"] == [math.ceil(rows / 128), math.ceil(columns / 128)]
    got = loaded.tensors[f"{name}.weight"]
    assert got.dtype == torch.bfloat16
    expected = [
        e4m3(codes[o * columns + i]) * 2.0 ** (scales[o // 128 * scale_entry["shape"][1] + i // 128] - 127)
        for o in range(rows)
        for i in range(columns)
    ]
    assert got.flatten().tolist() == expected


@pytest.mark.parametrize("matrix", ["w1", "w2", "w3"])
def test_an_mxfp4_weight_is_its_half_byte_times_the_scale_of_its_32(
    pristine: Path, loaded: Checkpoint, matrix: str
) -> None:
    for expert in range(4):
        entry, codes = stored(pristine, f"layers.1.ffn.experts.{expert}.{matrix}.weight")
        _, scales = stored(pristine, f"layers.1.ffn.experts.{expert}.{matrix}.scale")
        rows, columns = entry["shape"][0], entry["shape"][1] * 2
        expected = []
        for at in range(rows * columns):
            half = codes[at // 2] >> 4 if at % 2 else codes[at // 2] & 15
            value = -E2M1[half & 7] if half & 8 else E2M1[half]
            expected.append(value * 2.0 ** (scales[at // 32] - 127))
        got = loaded.tensors[f"layers.1.ffn.experts.{matrix}"][expert]
        assert tuple(got.shape) == (rows, columns)
        assert got.flatten().tolist() == expected


@pytest.mark.parametrize("name", ["embed.weight", "hc_head_fn", "layers.0.ffn.gate.tid2eid", "layers.2.ffn.gate.bias"])
def test_an_unquantised_tensor_keeps_its_bytes(pristine: Path, loaded: Checkpoint, name: str) -> None:
    entry, raw = stored(pristine, name)
    got = loaded.tensors[name]
    assert list(got.shape) == entry["shape"]
    assert str(got.dtype) == {"BF16": "torch.bfloat16", "F32": "torch.float32", "I64": "torch.int64"}[entry["dtype"]]
    assert got.contiguous().view(torch.uint8).flatten().tolist() == list(raw)


def test_the_tensors_are_the_official_names_without_scales_and_with_stacked_experts(loaded: Checkpoint) -> None:
    expected = {
        name for name in tensor_table(loaded.config) if not name.endswith(".scale") and ".experts." not in name
    } | {f"layers.{n}.ffn.experts.{w}" for n in range(3) for w in ("w1", "w2", "w3")}
    assert set(loaded.tensors) == expected
    assert tuple(loaded.tensors["layers.0.ffn.experts.w1"].shape) == (4, 32, 160)
    assert tuple(loaded.tensors["layers.0.ffn.experts.w2"].shape) == (4, 160, 32)
    assert loaded.tokenizer.name == "tokenizer.json"


def test_every_safe_fp8_scale_is_exact_for_every_code() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    for byte in (3, 4, 100, 127, 200, 246):
        scale = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        got = dequantise_fp8(codes[None, :128].view(torch.float8_e4m3fn), scale)
        assert got[0].tolist() == [e4m3(int(code)) * 2.0 ** (byte - 127) for code in codes[:128]]


def test_a_scale_outside_the_safe_range_passes_while_its_products_are_exact() -> None:
    zeros = torch.zeros(2, 32, dtype=torch.uint8)
    smallest = torch.zeros(1, 1, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert dequantise_fp8(zeros.view(torch.float8_e4m3fn), smallest).abs().max() == 0
    ones = torch.full((1, 16), 0x22, dtype=torch.uint8).view(torch.int8)  # E2M1 code 2 is 1.0
    largest = torch.tensor([[254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert dequantise_mxfp4(ones, largest).tolist() == [[2.0**127] * 32]


def test_every_mxfp4_byte_and_scale_means_two_values() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(16, 16)
    for byte in (0, 1, 127, 252):
        scale = torch.full((16, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        expected = []
        for code in range(256):
            for half in (code & 15, code >> 4):
                expected.append((-E2M1[half & 7] if half & 8 else E2M1[half]) * 2.0 ** (byte - 127))
        assert dequantise_mxfp4(packed, scale).flatten().tolist() == expected


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_checkpoint_is_refused_on_one_line_naming_file_and_tensor(model: Path, damage: Damage) -> None:
    damage.inflict(model)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(model)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 600
    for words in damage.says:
        assert words in message
    assert refused.value.exit_code == 78


def test_a_directory_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory"):
        load_checkpoint(tmp_path / "nowhere")


def test_the_first_of_several_faults_is_told_and_the_others_are_counted(model: Path) -> None:
    config(model_type="llama")(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"config.json: model_type is 'llama'.*\(1 more: see penumbra model inspect"
    ):
        load_checkpoint(model)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(pristine: Path, fresh: Callable[[str], Path]) -> None:
    assert load_checkpoint(fresh("one")).fingerprint == load_checkpoint(pristine).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda model: poke(model, "head.weight", b"\x01", at=4321),
        lambda model: poke(model, "layers.2.ffn.experts.3.w2.weight", b"\x01", at=11),
        config(rms_norm_eps=2e-6),
        change_json(INDEX, lambda data: data["weight_map"].update(dict.fromkeys(data["weight_map"], FIRST))),
    ],
    ids=["one byte of the head", "one byte of an expert", "config", "index"],
)
def test_other_weights_have_another_fingerprint(
    pristine: Path, model: Path, change: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    if "index" in request.node.callspec.id:
        merged = load_file(model / FIRST) | load_file(model / SECOND)
        save_file(merged, model / FIRST)
        (model / SECOND).unlink()
    change(model)
    assert load_checkpoint(model).fingerprint != load_checkpoint(pristine).fingerprint


def test_a_large_checkpoint_is_told_apart_by_samples_of_every_shard(
    pristine: Path, fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WHOLE_DIGEST_BYTES", 0)
    tuned = fresh("tuned")
    for shard in (FIRST, SECOND):
        path = tuned / shard
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size - 1)
            last = file.read(1)[0]
            file.seek(size - 1)
            file.write(bytes([last ^ 1]))
        assert load_checkpoint(tuned).fingerprint != load_checkpoint(pristine).fingerprint
        with path.open("r+b") as file:
            file.seek(size - 1)
            file.write(bytes([last]))
    assert load_checkpoint(tuned).fingerprint == load_checkpoint(pristine).fingerprint


def test_one_file_without_an_index_holds_the_same_model(model: Path, loaded: Checkpoint) -> None:
    save_file(load_file(model / FIRST) | load_file(model / SECOND), model / "model.safetensors")
    for name in (FIRST, SECOND, INDEX):
        (model / name).unlink()
    single = load_checkpoint(model)
    assert single.tensors.keys() == loaded.tensors.keys()
    assert all(torch.equal(single.tensors[name], loaded.tensors[name]) for name in loaded.tensors)


def test_fp8_experts_with_float_scales_load_as_float32(model: Path, loaded: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    plain = load_file(model / FIRST) | load_file(model / SECOND)
    for name, spec in tensor_table(loaded.config, Formats("fp8", "F32")).items():
        if spec.dtype == "F8_E4M3":
            tensors[name] = torch.randn(spec.shape, generator=generator).to(torch.float8_e4m3fn)
        elif name.endswith(".scale"):
            tensors[name] = torch.rand(spec.shape, generator=generator) / 300
        else:
            tensors[name] = plain[name]
    save_file(tensors, model / "model.safetensors")
    for name in (FIRST, SECOND, INDEX):
        (model / name).unlink()
    config(expert_dtype="fp8", quantization_config=None)(model)

    base = load_checkpoint(model).tensors
    expert, matrix = base["layers.2.ffn.experts.w2"][3], base["layers.2.attn.wo_b.weight"]
    assert (expert.dtype, matrix.dtype) == (torch.float32, torch.float32)
    for got, name in ((expert, "layers.2.ffn.experts.3.w2"), (matrix, "layers.2.attn.wo_b")):
        codes, scales = tensors[f"{name}.weight"].view(torch.uint8), tensors[f"{name}.scale"]
        for o, i in ((0, 0), (127, 31), (128, 5), (159, 0)):
            product = e4m3(int(codes[o, i])) * float(scales[o // 128, i // 128])
            assert float(got[o, i]) == struct.unpack("f", struct.pack("f", product))[0]


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_a_draft_layer_is_left_out_with_one_warning(
    model: Path, loaded: Checkpoint, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    names = [f"mtp.{n}.enorm.weight" for n in range(3 if kind == "dspark" else 1)]
    save_file({name: torch.ones(160) for name in names}, model / "draft.safetensors")
    change_json(INDEX, lambda data: data["weight_map"].update(dict.fromkeys(names, "draft.safetensors")))(model)
    extra: dict[str, Any] = {"dspark_block_size": 5} if kind == "dspark" else {"compress_ratios": [0, 4, 128, 0]}
    config(num_nextn_predict_layers=1, **extra)(model)
    with caplog.at_level(logging.WARNING, "penumbra.engine"):
        drafted = load_checkpoint(model)
    assert drafted.tensors.keys() == loaded.tensors.keys()
    assert drafted.config.compress_ratios == (0, 4, 128)
    assert [record.getMessage().endswith("decoding without a draft") for record in caplog.records] == [True]


def test_files_of_other_formats_are_named_in_one_warning_and_not_opened(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (model / "extra.pt").mkdir()
    with caplog.at_level(logging.WARNING, "penumbra.engine"):
        load_checkpoint(model)
    assert len(caplog.records) == 1
    assert "ignoring extra.pt, pytorch_model.bin" in caplog.records[0].getMessage()


def test_a_hugging_face_cache_may_link_to_its_own_blobs(fresh: Callable[[str], Path], tmp_path: Path) -> None:
    snapshots, blobs = tmp_path / "models--x" / "snapshots", tmp_path / "models--x" / "blobs"
    snapshots.mkdir(parents=True)
    cached = fresh("download").rename(snapshots / "0123abcd")
    blobs.mkdir()
    for number, path in enumerate(sorted(cached.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert load_checkpoint(cached).config.hidden_size == 160


def test_a_config_saved_again_by_transformers_describes_the_same_model(model: Path, loaded: Checkpoint) -> None:
    from transformers import DeepseekV4Config

    original = json.loads((model / "config.json").read_text())
    saved = json.loads(DeepseekV4Config(**original).to_json_string(use_diff=False))
    assert "compress_ratios" not in saved
    (model / "config.json").write_text(json.dumps(saved))
    again = load_checkpoint(model)
    assert again.config == loaded.config
    assert torch.equal(again.tensors["layers.1.ffn.experts.w2"], loaded.tensors["layers.1.ffn.experts.w2"])
