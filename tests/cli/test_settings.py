from __future__ import annotations

import tomllib

import pytest
import typer

from cli.settings import parse_bytes, read_secret
from wire.errors import ConfigError


@pytest.fixture
def dump(penumbra_here):
    """The effective values of a command, as `config dump` prints them: {key: (value, source)}."""

    def run(*arguments: str, **env: str) -> dict[str, tuple[object, str]]:
        result = penumbra_here("config", "dump", *arguments, **env)
        assert result.returncode == 0, result.stderr
        values = tomllib.loads(result.stdout)
        sources = {}
        for line in result.stdout.splitlines():
            left, _, source = line.rpartition("#")
            sources[left.strip("# ").split(" =")[0]] = source.strip()
        return {key: (values.get(key), source) for key, source in sources.items()}

    return run


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(dump, tmp_path):
    file = tmp_path / "penumbra.toml"
    file.write_text('port = 1001\nprefill = 3\nlog-level = "debug"\nthreads = 4\n')
    found = dump(
        *("up", "--config", str(file), "--port", "1003"),
        PENUMBRA_PORT="1002",
        PENUMBRA_PREFILL="2",
    )
    assert found["port"] == (1003, "flag")
    assert found["prefill"] == (2, "PENUMBRA_PREFILL")
    assert found["threads"] == (4, "file")
    assert found["log_level"] == ("debug", "file")
    assert found["decode"] == (1, "default")
    assert found["model"] == (None, "default")


def test_what_config_dump_prints_is_a_config_file_with_the_same_meaning(dump, penumbra_here, tmp_path):
    first = penumbra_here("config", "dump", "up", "--kv-memory", "2GiB", "--model", "/models/a b", "--detach")
    file = tmp_path / "again.toml"
    file.write_text(first.stdout)
    again = dump("up", "--config", str(file))
    assert again["kv_memory"] == (2 << 30, "file")
    assert again["model"] == ("/models/a b", "file")
    assert again["detach"] == (True, "file")


def test_yaml_says_the_same_as_toml(dump, tmp_path):
    file = tmp_path / "penumbra.yaml"
    file.write_text("kv-memory: 1GiB\nprefill: 2\nrouter:\n  port: 9000\n")
    assert dump("up", "--config", str(file))["prefill"] == (2, "file")
    assert dump("up", "--config", str(file))["kv_memory"] == (1 << 30, "file")


def test_a_table_named_after_a_command_is_for_that_command_alone(dump, tmp_path):
    file = tmp_path / "penumbra.toml"
    file.write_text('redis = "redis://host:1/0"\nmodel = "/m"\nport = 1\n[router]\nport = 2\n')
    assert dump("up", PENUMBRA_CONFIG=str(file))["port"] == (1, "file")
    assert dump("router", PENUMBRA_CONFIG=str(file))["port"] == (2, "file")


def test_a_key_of_another_command_is_allowed_at_the_top(dump, tmp_path):
    file = tmp_path / "penumbra.toml"
    file.write_text('grace_s = 3\nworker_id = "decode-7"\n')
    assert dump("up", "--config", str(file))["grace_s"] == (3.0, "file")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.toml", "prot = 1", "'prot' is no flag. Did you mean 'port'?"),
        ("a.toml", "[router]\nprefill = 1", "'prefill' in [router] is no flag."),
        ("a.toml", "port = ", "does not parse"),
        ("a.toml", "port = [1]", "'port' must be a single value, not [1]"),
        ("a.toml", 'port = "eighty"', "port: Input should be a valid integer"),
        ("a.toml", 'kv_memory = "many"', "kv_memory: 'many' is not a size"),
        ("a.yaml", "a: [", "does not parse"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "does not parse"),
        ("a.yaml", "- 1", "must hold keys and values, not list"),
        ("a.ini", "port = 1", "ends in .toml, .yaml or .yml"),
        ("a.toml", "port = \udcff", "does not parse"),
    ],
)
def test_a_bad_config_file_is_refused_in_one_line_with_exit_code_78(penumbra_here, tmp_path, name, text, complaint):
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = penumbra_here("config", "dump", "up", "--config", str(file))
    assert result.returncode == 78
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {file}")
    assert complaint in result.stderr


def test_a_config_file_that_is_not_there_is_refused_by_name(penumbra_here, tmp_path):
    result = penumbra_here("up", "--config", str(tmp_path / "none.toml"))
    assert result.returncode == 78
    assert result.stderr == f"error: Cannot read the config file {tmp_path}/none.toml: No such file or directory.\n"


def test_a_bad_value_in_the_environment_is_a_bad_configuration(penumbra_here):
    result = penumbra_here("up", PENUMBRA_KV_LAYOUT="v5")
    assert result.returncode == 78
    assert result.stderr.startswith("error: PENUMBRA_KV_LAYOUT: ")
    assert result.stderr.count("\n") == 1


def test_a_bad_value_on_the_command_line_is_a_matter_of_usage(penumbra_here):
    result = penumbra_here("up", "--port", "eighty")
    assert result.returncode == 2
    assert "Invalid value for '--port'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512MiB", 512 << 20),
        ("536870912", 536_870_912),
        ("1.5 GB", 1_500_000_000),
        ("2g", 2_000_000_000),
        ("8KiB", 8192),
    ],
)
def test_sizes_are_read_as_written(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 XB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(typer.BadParameter, match="is not a size"):
        parse_bytes(text)


def test_a_secret_is_read_from_the_file_behind_an_at_sign_and_never_dumped(dump, tmp_path):
    file = tmp_path / "url"
    file.write_text("redis://:swordfish@10.0.0.7:6379/0\n")
    assert read_secret(f"@{file}") == "redis://:swordfish@10.0.0.7:6379/0"
    assert read_secret("redis://10.0.0.7:6379/0") == "redis://10.0.0.7:6379/0"
    found = dump("router", "--model", "/models/m", PENUMBRA_REDIS=f"@{file}")
    assert found["redis"] == (f"@{file}", "PENUMBRA_REDIS")


def test_a_secret_that_is_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, complaint in (("absent", "No such file"), ("empty", "is empty")):
        with pytest.raises(ConfigError, match=complaint):
            read_secret(f"@{tmp_path / name}")
