"""Random checkpoints: in the official layout, the same for the same seed, and alive enough to test an engine with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import deepseek_recipe
import pytest
import torch
from tokenizers import Tokenizer

from engine.model.publish import LEADING_TOKENS, TRAILING_TOKENS, quantise_fp8, quantise_mxfp4
from engine.model.tiny import write_tiny
from engine.model.weights import Checkpoint, dequantise_fp8, dequantise_mxfp4, load_checkpoint
from tests.engine.dense_forward import dense_forward
from tests.model.damage import INDEX, split
from wire.errors import ConfigError

SMALL = {
    "layers": (4,),
    "hidden": 64,
    "heads": 2,
    "experts": 4,
    "head_dim": 64,
    "rope_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "moe_intermediate": 32,
    "index_head_dim": 32,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    one, again, two = (write_tiny(tmp_path / name, seed=seed, **SMALL) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert contents(one) == contents(again)
    assert contents(one).keys() == contents(two).keys()
    changed = {name for name, content in contents(two).items() if content != contents(one)[name]}
    assert changed == {name for name in contents(one) if name.endswith(".safetensors")}


def test_a_tensor_has_the_values_of_its_name_whatever_the_layers_around_it(tmp_path: Path) -> None:
    short = load_checkpoint(write_tiny(tmp_path / "short", seed=1, **SMALL))
    long = load_checkpoint(write_tiny(tmp_path / "long", seed=1, **(SMALL | {"layers": (4, 128)})))
    assert all(torch.equal(tensor, long.tensors[name]) for name, tensor in short.tensors.items())


def test_the_files_are_those_of_an_official_release(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "new" / "model", seed=0, **SMALL)
    assert sorted(os.listdir(out)) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    index = json.loads((out / INDEX).read_text())
    headers = {name: split(out / name)[0] for name in os.listdir(out) if name.endswith(".safetensors")}
    assert {name: shard for shard, header in headers.items() for name in header if name != "__metadata__"} == index[
        "weight_map"
    ]
    assert index["metadata"]["total_size"] == sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for header in headers.values()
        for name, entry in header.items()
        if name != "__metadata__"
    )
    dtypes = {name: entry["dtype"] for header in headers.values() for name, entry in header.items() if "dtype" in entry}
    assert dtypes["layers.0.attn.wq_b.weight"] == "F8_E4M3"
    assert dtypes["layers.0.attn.wq_b.scale"] == "F8_E8M0"
    assert dtypes["layers.0.ffn.experts.3.w3.weight"] == "I8"
    assert dtypes["layers.0.ffn.experts.3.w3.scale"] == "F8_E8M0"
    assert dtypes["layers.0.ffn.gate.tid2eid"] == "I64"


@pytest.mark.parametrize("like", ["flash", "pro"])
def test_like_takes_the_pattern_of_the_model_and_its_constants(tmp_path: Path, like: str) -> None:
    geometry = {name: value for name, value in SMALL.items() if name != "layers"}
    config = load_checkpoint(write_tiny(tmp_path / "m", seed=0, like=like, **geometry)).config
    first = {"flash": (0, 0), "pro": (128, 128)}[like]
    assert config.compress_ratios == (*first, 4, 128, 4, 128, 4)
    assert (config.index_topk, config.routed_scaling_factor) == {"flash": (512, 1.5), "pro": (1024, 2.5)}[like]
    assert config.num_hash_layers == 3


def test_a_draft_layer_is_written_in_full(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "m", seed=0, mtp=True, **SMALL)
    names = json.loads((out / INDEX).read_text())["weight_map"].keys()
    config = json.loads((out / "config.json").read_text())
    assert {"mtp.0.e_proj.scale", "mtp.0.hc_head_fn", "mtp.0.ffn.experts.3.w2.weight", "mtp.0.norm.weight"} <= names
    assert (config["num_nextn_predict_layers"], config["compress_ratios"]) == (1, [4, 0])
    assert load_checkpoint(out).config.compress_ratios == (4,)


@pytest.mark.parametrize(
    ("geometry", "says"),
    [
        ({"hidden": 100}, "hidden_size=100 is not a multiple of 32"),
        ({"moe_intermediate": 40}, "moe_intermediate_size=40 is not a multiple of 32"),
        ({"vocab": 100}, "vocab=100 is smaller than the tokenizer's 271 tokens"),
        ({"layers": (0, 8)}, r"compress_ratios\[1\] is 8"),
        ({"layers": ()}, "num_hidden_layers is 0"),
        ({"heads": 3}, "o_groups is 2, which does not divide"),
        ({"like": "giant"}, "like='giant' is not a known model"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, geometry: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        write_tiny(tmp_path / "m", seed=0, **(SMALL | geometry))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "m", seed=0, **SMALL)
    before = contents(out)
    with pytest.raises(ConfigError, match="exists; choose a new directory"):
        write_tiny(out, seed=1, **SMALL)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["m"]


def test_quantising_keeps_within_half_a_step_and_uses_the_whole_range() -> None:
    weight = torch.randn(256, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 256)[:, None]
    codes, scale = quantise_fp8(weight)
    assert (tuple(codes.shape), tuple(scale.shape)) == ((256, 96), (2, 1))
    error = (dequantise_fp8(codes, scale).float() - weight).abs()
    largest = torch.stack([weight[:128].abs().max(), weight[128:].abs().max()]).repeat_interleave(128)
    # E4M3 keeps 3 mantissa bits; below its smallest normal number, 2^-6 of a scale of at most 2 largest / 448.
    assert (error <= torch.maximum(weight.abs() / 16, largest[:, None] * 2**-9 / 224)).all()
    assert torch.equal(
        dequantise_fp8(*quantise_fp8(dequantise_fp8(codes, scale).float())), dequantise_fp8(codes, scale)
    )

    weight = weight[:200]
    packed, scale = quantise_mxfp4(weight)
    assert (tuple(packed.shape), tuple(scale.shape)) == ((200, 48), (200, 3))
    groups = weight.view(200, 3, 32)
    error = (dequantise_mxfp4(packed, scale).float().view(200, 3, 32) - groups).abs()
    assert (error <= groups.abs().amax(2, keepdim=True) / 3).all()  # the widest step is from 4 to 6
    halves = packed.view(torch.uint8)
    assert set((halves & 15).flatten().tolist()) == set((halves >> 4).flatten().tolist()) == set(range(16))


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The geometry of the bundled model."""
    return load_checkpoint(write_tiny(tmp_path_factory.mktemp("standard") / "m", seed=0))


def test_a_random_model_behaves_like_a_model(standard: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 271, (300,), generator=generator)
    logits, _ = dense_forward(standard.config, standard.tensors, ids)
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
    assert 1.0 < entropy.mean() < 4.0  # the 320 tokens are neither equally likely nor decided; uniform is 5.8
    assert entropy.std() > 0.3
    assert len(logits.argmax(-1).unique()) > 40
    assert logits.abs().max() < 100

    # What came before matters: another context before the same token, and one early token far away.
    other = torch.randint(0, 271, (300,), generator=generator)
    other[-1] = ids[-1]
    elsewhere, _ = dense_forward(standard.config, standard.tensors, other)
    assert torch.corrcoef(torch.stack([logits[-1], elsewhere[-1]]))[0, 1] < 0.8
    nudged = ids.clone()
    nudged[10] = (nudged[10] + 7) % 271
    echo, _ = dense_forward(standard.config, standard.tensors, nudged)
    assert (echo - logits)[:10].abs().max() < 1e-4  # only rounding: nobody sees the future
    assert (echo - logits)[299].abs().max() > 0.01  # 289 tokens on, past the window


def test_a_random_router_has_favourites_but_leaves_nobody_out(standard: Checkpoint) -> None:
    x = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    score = torch.nn.functional.softplus(x @ standard.tensors["layers.3.ffn.gate.weight"].float().T).sqrt()
    picks = (score + standard.tensors["layers.3.ffn.gate.bias"]).topk(2).indices
    load = torch.bincount(picks.flatten(), minlength=16)
    assert load.min() > 0
    assert load.max() > 2 * load.min()
    table = standard.tensors["layers.0.ffn.gate.tid2eid"]
    assert (table[:, 0] != table[:, 1]).all()
    assert len(table.unique()) == 16


def test_the_vocabulary_is_padded_and_its_padding_decodes_to_nothing(standard: Checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(standard.tokenizer))
    assert standard.config.vocab_size == 320
    assert tokenizer.get_vocab_size() == len(LEADING_TOKENS) + 256 + len(TRAILING_TOKENS) == 271
    assert tokenizer.decode([*range(271, 320)], skip_special_tokens=False) == ""


def test_every_byte_is_a_token_and_every_text_comes_back(standard: Checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(standard.tokenizer))
    text = "Grüße, 世界! 👋\n\t'quoted' \x00\x7f"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [3 + byte for byte in text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [tokenizer.token_to_id(token) for token in LEADING_TOKENS] == [0, 1, 2]
    assert [tokenizer.token_to_id(token) for token in TRAILING_TOKENS] == list(range(259, 271))


USER, ASSISTANT, THINK, END_THINK, DSML = range(259, 264)


def encode(standard: Checkpoint, conversation: deepseek_recipe.Conversation) -> tuple[str, list[int]]:
    encoding = deepseek_recipe.DeepseekV4Encoding().with_tokenizer(
        deepseek_recipe.Tokenizer.from_file(str(standard.tokenizer))
    )
    return encoding.render_conversation(conversation).prompt, encoding.encode(conversation)


@pytest.mark.parametrize(("thinking", "last"), [(False, END_THINK), (True, THINK)])
def test_a_chat_renders_and_encodes_with_one_id_for_each_special_token(
    standard: Checkpoint, thinking: bool, last: int
) -> None:
    messages = [deepseek_recipe.SystemMessage("Be brief."), deepseek_recipe.UserMessage("<think> is text here")]
    prompt, ids = encode(standard, deepseek_recipe.Conversation(messages, thinking_mode=thinking))
    assert prompt.startswith(LEADING_TOKENS[0])
    assert ids[0] == 0
    assert ids[-2:] == [ASSISTANT, last]
    user = ids.index(USER)
    assert ids[user + 1 : -2] == [3 + byte for byte in b"<think> is text here"]
    assert ids[user - 9 : user] == [3 + byte for byte in b"Be brief."]


def test_tools_and_their_calls_use_the_markup_token(standard: Checkpoint) -> None:
    call = deepseek_recipe.ToolCall("call_0", "weather", '{"city": "Bonn"}')
    conversation = deepseek_recipe.Conversation(
        [
            deepseek_recipe.UserMessage("Weather?"),
            deepseek_recipe.AssistantMessage("", tool_calls=[call]),
            deepseek_recipe.ToolMessage("rain", "call_0"),
        ],
        thinking_mode=False,
        tools=[deepseek_recipe.ToolDefinition("weather", "Tells it.", {"type": "object"})],
    )
    prompt, ids = encode(standard, conversation)
    assert '<｜DSML｜invoke name="weather">' in prompt
    assert ids.count(DSML) >= 6  # two ends of the block, of the call and of its parameter
    assert Tokenizer.from_file(str(standard.tokenizer)).decode(ids, skip_special_tokens=False) == prompt


def test_the_spellings_are_those_the_renderer_uses() -> None:
    kinds = ("Bos", "Eos", "ThinkingStart", "ThinkingEnd", "User", "Assistant", "LatestReminder", "Dsml")
    spelled = {getattr(deepseek_recipe.SpecialToken, kind).default_str() for kind in kinds}
    assert spelled <= {*LEADING_TOKENS, *TRAILING_TOKENS}


def test_blocks_along_an_uneven_axis_have_one_scale() -> None:
    """Who divides the size by the number of scales, as transformers does, then finds the same weights."""
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)
    weight[150:] *= 64
    codes, scale = quantise_fp8(weight)
    assert scale.shape == (2, 2)
    assert torch.equal(scale[0].float(), scale[1].float()), "200 rows are no multiple of 128"
    assert scale[0, 0].float() < scale[0, 1].float(), "256 columns are"
    theirs = codes.float() * scale.float().repeat_interleave(100, 0).repeat_interleave(128, 1)
    assert torch.equal(theirs, dequantise_fp8(codes, scale).float())
