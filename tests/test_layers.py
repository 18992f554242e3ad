"""Which package may import which, and which ways of running foreign data as code no package may use.

Imports are read from the syntax tree, those inside functions too: a lazy import is still an arrow.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

OURS = (
    "bench", "chaos", "cli", "decode_worker", "deploy", "engine", "kvtransfer", "loadtest", "prefill_worker", "router",
    "sim", "training", "wire",
)  # fmt: skip

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "wire": ("wire",),
    "engine": ("engine", "wire.types", "wire.errors", "wire.grammar"),
    "kvtransfer": ("kvtransfer", "wire"),
    "prefill_worker": ("prefill_worker", "engine", "kvtransfer", "wire"),
    "decode_worker": ("decode_worker", "engine", "kvtransfer", "wire"),
    "router": ("router", "wire"),
    "loadtest": ("loadtest",),
    "sim": ("sim", "wire", "router", "prefill_worker", "decode_worker", "kvtransfer", "engine.cache"),
    "training": ("training", "engine.model", "engine.kernels", "engine.config", "wire.errors"),
    "cli": OURS,
    "deploy": OURS,
    "bench": OURS,
    "chaos": ("chaos", "bench.record", "deploy", "engine.model.tiny", "wire.errors"),
}
"""Our own packages, or modules of them, that each package may import. Nothing imports cli, deploy or bench but they."""

GPU_STACK = ("torch", "triton", "nixl", "nixl_cu12", "nixl_cu13", "transformers", "safetensors")
NEVER: dict[str, tuple[str, ...]] = {
    "wire": (*GPU_STACK, "numpy", "fastapi", "deepseek_recipe", "tokenizers"),
    "router": GPU_STACK,
    "engine": ("grpc", "grpc_health", "redis", "fastapi", "uvicorn", "nixl_cu12", "nixl_cu13"),
    "kvtransfer": ("transformers", "fastapi", "deepseek_recipe"),
    "loadtest": GPU_STACK,
}
"""Libraries a package must do without: the router's image has no GPU stack, the engine knows no network."""

ENGINE_ORDER = ("kernels", "cache", "model", "runner", "loop")
"""Inside the engine arrows point left: loop -> runner -> model, cache -> kernels."""

CODE_FROM_DATA = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "torch.load": "unpickles; read safetensors instead",
    "yaml.load": "may build any object; use yaml.safe_load",
    "yaml.unsafe_load": "builds any object; use yaml.safe_load",
    "yaml.full_load": "builds more than data; use yaml.safe_load",
}


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` counts as `a.b`, which is a module or inside one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def broken_arrows(package: str, path: Path, text: str) -> list[str]:
    """What is wrong with the imports of one file, each with its line."""
    module = module_name(path)
    allowed = MAY_IMPORT[package]
    found = []
    for line, name in imports(ast.parse(text), module):
        where = f"{path.relative_to(ROOT)}:{line}"
        if is_within(name, *OURS) and not is_within(name, *allowed):
            found.append(f"{where}: {package} must not import {name}; it may import {', '.join(allowed)}")
        if is_within(name, *NEVER.get(package, ())):
            found.append(f"{where}: {package} must not import {name}")
        if package == "engine" and (wrong := against_engine_order(module, name)):
            found.append(f"{where}: {wrong}")
    return found


def against_engine_order(module: str, name: str) -> str | None:
    importer, imported = (part(text) for text in (module, name))
    known = importer in ENGINE_ORDER and imported in ENGINE_ORDER
    if known and ENGINE_ORDER.index(imported) > ENGINE_ORDER.index(importer):
        return f"engine.{importer} must not import engine.{imported}, which stands on it"
    return None


def part(module: str) -> str:
    """The module's second word: what part of its package it is."""
    return [*module.split("."), ""][1]


def unsafe_calls(path: Path, text: str) -> list[str]:
    found = []
    tree = ast.parse(text)
    for line, name in imports(tree, module_name(path)):
        if is_within(name, *CODE_FROM_DATA):
            found.append(f"{path.relative_to(ROOT)}:{line}: {name} turns data into code")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called} {FORBIDDEN_CALLS[called]}")
            unpickles = any(
                word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
                for word in node.keywords
            )
            if unpickles:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called} with allow_pickle unpickles")
    return found


PACKAGES = [package for package in OURS if sources(package)]


def test_every_python_package_of_the_repository_has_an_import_rule():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - set(MAY_IMPORT) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package):
    found = [line for path in sources(package) for line in broken_arrows(package, path, path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_turns_data_into_code(package):
    found = [line for path in sources(package) for line in unsafe_calls(path, path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("package", "file", "text"),
    [
        ("router", "router/relay.py", "import torch"),
        ("router", "router/relay.py", "def f():\n    from engine.config import EngineConfig"),
        ("router", "router/relay.py", "from kvtransfer import plan"),
        ("wire", "wire/types.py", "import torch.nn"),
        ("wire", "wire/types.py", "from engine import batch"),
        ("engine", "engine/loop.py", "from wire import rpc"),
        ("engine", "engine/loop.py", "import grpc.aio"),
        ("engine", "engine/kernels/topk.py", "from engine.model import moe"),
        ("engine", "engine/cache/pools.py", "from ..runner import Runner"),
        ("kvtransfer", "kvtransfer/plan.py", "from engine.cache import pools"),
        ("prefill_worker", "prefill_worker/service.py", "import decode_worker.scheduler"),
        ("decode_worker", "decode_worker/service.py", "from deploy import cluster"),
    ],
)
def test_a_forbidden_import_is_found_and_its_line_named(package, file, text):
    (found,) = broken_arrows(package, ROOT / file, text)
    assert found.startswith(f"{file}:{text.count(chr(10)) + 1}: {package if package != 'engine' else ''}")


@pytest.mark.parametrize(
    ("package", "file", "text"),
    [
        ("engine", "engine/loop.py", "from engine.runner import Runner\nfrom wire.errors import ConfigError"),
        ("engine", "engine/model/attention.py", "from ..kernels import topk\nfrom engine.cache import pools"),
        ("prefill_worker", "prefill_worker/service.py", "import engine.loop, kvtransfer.owner, wire.rpc"),
        ("router", "router/http.py", "import fastapi\nfrom . import relay"),
    ],
)
def test_an_import_that_points_down_is_fine(package, file, text):
    assert broken_arrows(package, ROOT / file, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load('weights.bin')",
        "yaml.load(text, Loader)",
        "eval('1 + 1')",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_a_way_to_run_data_as_code_is_found(text):
    assert len(unsafe_calls(ROOT / "engine" / "anything.py", text)) == 1


def test_models_are_switched_to_evaluation_without_alarm():
    assert unsafe_calls(ROOT / "engine" / "anything.py", "model.eval()\nyaml.safe_load(text)") == []
