"""Where a value comes from: a flag, else `PENUMBRA_<FLAG>`, else the config file, else the default.

One rule for every flag of every command. The config file is TOML or YAML; a key is a flag's name, with `-` or `_`,
at the top for every command that has the flag or in a table named after one command:

    redis = "redis://10.0.0.7:6379/0"
    kv_memory = "8GiB"

    [router]
    port = 8000
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from wire.errors import ConfigError

PREFIX = "PENUMBRA_"
SOURCES = {"COMMANDLINE": "flag", "DEFAULT_MAP": "file", "DEFAULT": "default"}

BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?")
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def flag(name: str, help: str, **more: Any) -> Any:
    """A typer option `--name` that also reads `PENUMBRA_NAME`, and behind it the variable `or_variable` where others
    have given what it sets a name; `more` goes to typer.Option.
    """
    declarations = (f"--{name}/--no-{name}",) if more.pop("switch", False) else (f"--{name}",)
    variables = [variable(name), *([more.pop("or_variable")] if "or_variable" in more else [])]
    return typer.Option(*declarations, envvar=variables, help=help, show_envvar=False, **more)


def config_flag() -> Any:
    """`--config FILE`, read before every other flag of its command."""
    return flag("config", "TOML or YAML file with a key for each flag.", is_eager=True, callback=_use_file)


def variable(name: str) -> str:
    """The environment variable of a flag."""
    return PREFIX + name.replace("-", "_").upper()


def parse_bytes(text: str) -> int:
    """'512MiB' and '512MB' and '536870912' -> bytes. Without the `i`, units are powers of 1000."""
    found = BYTES.fullmatch(text.strip())
    if not found:
        raise typer.BadParameter(f"'{text}' is not a size; write bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** POWERS[unit.lower()])


def integers(name: str, text: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name} is '{text}'; write whole numbers with commas between them: {example}.") from error


def read_secret(word: str) -> str:
    """The word itself, or what the file behind `@` holds: a password then shows in no process list and no dump.

    Raises ConfigError for a file that can not be read or holds nothing.
    """
    if not word.startswith("@"):
        return word
    try:
        text = Path(word[1:]).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {word[1:]}: {getattr(error, 'strerror', None) or error}.") from error
    if not text:
        raise ConfigError(f"{word[1:]} is empty; it should hold the value itself.")
    return text


def _use_file(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        context.default_map = dict(read_file(path, context))
    return path


def read_file(path: Path, context: typer.Context) -> Mapping[str, Any]:
    """The values `path` holds for the command of `context`. Raises ConfigError naming the file and the key."""
    data = _parse(path)
    commands = _flags_of_commands(context.find_root().command)
    own = context.info_name or ""
    known = set().union(*commands.values())
    values: dict[str, Any] = {}
    for key, value in _keys(data):
        if key in commands and isinstance(value, dict):
            for inner, inner_value in _keys(value):
                _check_key(path, inner, commands[key], table=key)
                if key == own:
                    values[inner] = inner_value
        else:
            _check_key(path, key, known, table=None)
            values.setdefault(key, value)
    for key, value in values.items():
        if isinstance(value, dict | list) or value is None:
            raise ConfigError(f"{path}: '{key}' must be a single value, not {json.dumps(value, default=str)}.")
    return {key: _as_word(value) for key, value in values.items() if key in commands.get(own, known)}


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror}.") from error
    try:
        if path.suffix == ".toml":
            data: object = tomllib.loads(raw.decode())
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                data = yaml.safe_load(raw.decode())
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
        else:
            raise ConfigError(f"{path}: a config file ends in .toml, .yaml or .yml, so that its grammar is known.")
    except ValueError as error:  # covers broken TOML and text that is not UTF-8
        raise ConfigError(f"{path} does not parse: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must hold keys and values, not {type(data).__name__}.")
    return data


def _keys(data: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        yield str(key).replace("-", "_"), value


def _check_key(path: Path, key: str, known: set[str], *, table: str | None) -> None:
    if key in known:
        return
    where = f"'{key}' in [{table}]" if table else f"'{key}'"
    # Among those that are close, one with the very same letters: the commonest slip is two of them exchanged.
    close = sorted(difflib.get_close_matches(key, known), key=lambda name: sorted(name) != sorted(key))
    hint = f"Did you mean '{close[0]}'?" if close else f"It may hold {', '.join(sorted(known))}."
    raise ConfigError(f"{path}: {where} is no flag. {hint}")


def _flags_of_commands(root: Any) -> dict[str, set[str]]:
    """Command -> the names of its flags that have an environment variable, which are the ones a file may set."""
    return {
        name: {p.name for p in command.params if p.envvar and p.name != "config"}
        for name, command in root.commands.items()
        if not hasattr(command, "commands")
    }


def _as_word(value: Any) -> Any:
    """What a user would have typed, so that a flag's own parser reads it and says what is wrong with it."""
    return value if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """A flag's value and where it came from: 'flag', 'file', 'default' or the environment variable."""

    name: str
    value: Any
    source: str


def effective(context: typer.Context) -> list[Effective]:
    """Every flag of a parsed command, in the order `--help` lists them."""
    found = []
    for parameter in context.command.params:
        name = parameter.name
        if name is None or not parameter.envvar or name == "config":
            continue
        source = context.get_parameter_source(name)
        kind = source.name if source is not None else "DEFAULT"
        label = SOURCES.get(kind, kind.lower())
        if kind == "ENVIRONMENT":
            label = next(known for known in _variables(parameter.envvar) if os.environ.get(known))
        found.append(Effective(name=name, value=context.params.get(name), source=label))
    return found


def _variables(declared: str | Sequence[str]) -> Sequence[str]:
    return [declared] if isinstance(declared, str) else declared


def dump(values: list[Effective]) -> str:
    """The values as TOML that `--config` reads back; a flag that is unset is a comment."""
    lines = []
    for item in values:
        if item.value is None:
            text = f"# {item.name} ="
        else:
            text = f"{item.name} = {_toml(item.value)}"
        lines.append(f"{text:<48} # {item.source}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
