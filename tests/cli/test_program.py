from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(penumbra):
    result = penumbra("--help")
    assert result.returncode == 0
    for command in (
        "up",
        "down",
        "status",
        "chat",
        "doctor",
        "router",
        "prefill",
        "decode",
        "model",
        "config",
        "bench",
        "train",
        "eval",
    ):
        assert f"│ {command} " in result.stdout


def test_help_and_config_load_neither_torch_nor_a_service():
    script = (
        "import sys\n"
        "from cli.main import main\n"
        "for words in (['--help'], ['config', 'dump', 'up']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as ended:\n"
        "        assert not ended.code, ended.code\n"
        "heavy = {'torch', 'numpy', 'nixl_cu12', 'transformers', 'fastapi', 'uvicorn', 'engine', 'router'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_an_unknown_command_is_a_matter_of_usage(penumbra_here):
    result = penumbra_here("upp")
    assert result.returncode == 2
    assert "upp" in result.stderr


def test_a_cluster_that_is_not_up_has_no_status_and_nothing_to_stop(penumbra_here):
    status = penumbra_here("status")
    assert (status.returncode, status.stdout) == (3, "the cluster 'default' is not up\n")
    down = penumbra_here("down")
    assert (down.returncode, down.stdout) == (0, "the cluster 'default' is not up\n")


def test_a_taken_port_stops_up_before_anything_starts(penumbra_here, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = penumbra_here("up", "--port", str(port))
    assert result.returncode == 78
    assert result.stderr == (
        f"error: Cannot listen on 127.0.0.1:{port}: it is in use. Choose another with --port, "
        "or let --port 0 find a free one.\n"
    )
    assert not (tmp_path / "home" / "models").exists()


def test_a_model_folder_that_is_not_there_is_refused_in_one_line(penumbra_here, tmp_path):
    result = penumbra_here("up", "--model", str(tmp_path / "none"), "--port", "0")
    assert result.returncode == 78
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path}/none" in result.stderr


def test_model_tiny_writes_what_model_inspect_approves(penumbra, tmp_path):
    out = tmp_path / "tiny"
    written = penumbra(
        "model", "tiny", str(out), "--seed", "3", "--layers", "0,4,128", "--hidden", "128", "--heads", "2"
    )
    assert written.returncode == 0, written.stderr
    assert written.stdout == f"{out}\n"
    looked = penumbra("model", "inspect", str(out))
    assert looked.returncode == 0, looked.stdout + looked.stderr

    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    broken = penumbra("model", "inspect", str(out))
    assert broken.returncode == 78
    assert shard.name in " ".join(broken.stdout.split())


def test_model_tiny_with_words_for_layers_is_refused_in_one_line(penumbra_here, tmp_path):
    result = penumbra_here("model", "tiny", str(tmp_path / "x"), "--layers", "zero,four")
    assert result.returncode == 78
    assert result.stderr.startswith("error: --layers is 'zero,four'; write whole numbers")
    assert not (tmp_path / "x").exists()


def test_what_is_installed_by_default_brings_no_cuda():
    """torch's CUDA build drags in a dozen nvidia-*-cu12 packages; ours must be the CPU one."""
    installed = {(dist.metadata["Name"] or "").lower() for dist in importlib.metadata.distributions()}
    assert {name for name in installed if name.startswith(("nvidia-", "cuda-"))} == set()
    assert "torch" in installed
