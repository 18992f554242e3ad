"""The images' recipes. No container engine is needed: what a RUN line installs goes into a plain directory."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from deploy.images.requirements import LEFT_OUT, ROOT, name_of, requirements
from deploy.images.sbom import install, write_sbom

IMAGES = ROOT / "deploy" / "images"
BASE_MB = 130
"""python:3.11-slim-bookworm unpacked, as its layers are listed; not installed by us."""

INSTALL_S = 3600
"""An image's packages are fetched anew, up to 1.5 GB of them; pip's own words say how far it was."""


def recipe(image: str) -> str:
    return (IMAGES / f"{image}.Dockerfile").read_text()


@pytest.mark.parametrize("image", LEFT_OUT)
def test_the_linter_has_nothing_against_a_recipe(image: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--config", str(IMAGES / "hadolint.yaml"), str(IMAGES / f"{image}.Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", LEFT_OUT)
def test_an_image_is_built_in_two_stages_and_runs_as_nobody(image: str) -> None:
    lines = recipe(image).splitlines()
    bases = [line for line in lines if line.startswith("FROM ")]
    assert len(bases) == 2
    assert all(":latest" not in base and ":" in base for base in bases)
    final = lines[lines.index(bases[-1]) :]
    assert "USER 65532:65532" in final
    assert 'ENTRYPOINT ["penumbra"]' in final
    assert not [line for line in final if "pip" in line and line.startswith("RUN")], "pip belongs to the first stage"
    assert f"requirements.py {image} >" in recipe(image)


@pytest.mark.parametrize("image", LEFT_OUT)
def test_an_image_installs_the_projects_requirements_and_leaves_out_only_what_exists(image: str) -> None:
    found = requirements(image)
    names = [name_of(line) for line in found]
    assert len(set(names)) == len(names)
    assert not set(LEFT_OUT[image]) & set(names)
    everything = {name_of(line) for line in requirements("worker-cuda")} | set(LEFT_OUT["worker-cuda"])
    assert set(LEFT_OUT[image]) <= everything, "a name that no longer is a dependency"


@pytest.mark.parametrize(
    ("image", "packages"),
    [
        ("router", ("router", "wire", "cli")),
        ("worker-cpu", ("prefill_worker", "decode_worker", "kvtransfer", "engine", "wire")),
    ],
)
def test_what_a_service_imports_when_it_starts_is_named_by_its_image(image: str, packages: tuple[str, ...]) -> None:
    """A package that only comes with another one is gone when that one is left out."""
    named = {name_of(line) for line in requirements(image)} | {"pydantic-core"}  # one half of pydantic
    distributions = packages_distributions()
    files = [file for package in packages for file in (ROOT / package).rglob("*.py") if "device" not in file.parts]
    for file in files:
        for module in modules_of(file) - set(sys.stdlib_module_names):
            found = {name.lower().replace("_", "-") for name in distributions.get(module, ())}
            ours = (ROOT / module).is_dir()
            assert ours or found & named, f"{file.relative_to(ROOT)} imports {module}, of {found or 'nobody'}"


def modules_of(file: Path) -> set[str]:
    """What a file imports before any function of it runs: the first words of the modules' names."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_router_starts_without_what_its_image_leaves_out(tmp_path: Path) -> None:
    """Imports everything the router runs with the left-out packages made unimportable."""
    script = (
        "import sys\n"
        f"for name in {[name.replace('-', '_') for name in LEFT_OUT['router']]!r}: sys.modules[name] = None\n"
        "import cli.main, router.process, router.http\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.timeout(INSTALL_S)
def test_the_router_image_stays_under_250_mb_and_has_no_torch(tmp_path: Path) -> None:
    size = install("router", tmp_path / "router")
    assert size / 1e6 + BASE_MB < 250, f"{size / 1e6:.0f} MB of packages"
    python = tmp_path / "router" / "bin" / "python"
    for module, there in (("router.process", True), ("torch", False), ("nixl_cu12", False)):
        code = subprocess.run(
            [str(python), "-P", "-c", f"import {module}"], capture_output=True, check=False
        ).returncode
        assert (code == 0) is there, module
    done = subprocess.run(
        [str(tmp_path / "router" / "bin" / "penumbra"), "router", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    write_sbom(tmp_path / "router", tmp_path / "sbom.json")
    listed = {part["name"].lower() for part in json.loads((tmp_path / "sbom.json").read_text())["components"]}
    assert {"fastapi", "grpcio", "deepseek-recipe", "penumbra"} <= listed


@pytest.mark.long
@pytest.mark.timeout(INSTALL_S)
def test_the_cpu_worker_image_has_its_kernels_and_its_transport(tmp_path: Path) -> None:
    install("worker-cpu", tmp_path / "worker")
    script = (
        "from engine.kernels import native; assert native.library() is not None; "
        "import nixl_cu12, torch; assert torch.version.cuda is None; "
        "import prefill_worker.process, decode_worker.process"
    )
    python = tmp_path / "worker" / "bin" / "python"
    done = subprocess.run([str(python), "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
