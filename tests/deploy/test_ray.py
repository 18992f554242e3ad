"""What a cluster on Ray decides without Ray. tests/cluster/test_on_ray.py runs a real one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from rich.console import Console

from deploy.cluster import ClusterConfig, RayConfig, run
from deploy.ray import bundle, takes_anybody
from deploy.redis import free_port
from deploy.services import Service
from deploy.state import Member
from wire.errors import ConfigError

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TOKEN = "Bearer of-the-cluster"


@contextmanager
def control_service(answers: Callable[[dict[str, str]], bool]) -> Iterator[str]:
    """A gRPC server that answers Ray's question, or says UNAUTHENTICATED, by a call's metadata. -> its address"""

    def check_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
        if not answers({key: str(value) for key, value in context.invocation_metadata()}):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    handler = grpc.unary_unary_rpc_method_handler(check_alive)
    server = grpc.server(ThreadPoolExecutor(1))
    service, method = CHECK_ALIVE.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


def test_a_ray_cluster_that_answers_strangers_is_found_out() -> None:
    with control_service(lambda metadata: True) as address:
        assert takes_anybody(address)
    with control_service(lambda metadata: metadata.get("authorization") == TOKEN) as address:
        assert not takes_anybody(address)
    assert not takes_anybody(f"127.0.0.1:{free_port()}")


def test_a_worker_asks_ray_for_what_it_has_and_never_for_nothing() -> None:
    assert bundle(2.0, 1.0) == {"CPU": 2.0, "GPU": 1.0}
    assert bundle(0.25, 0.0) == {"CPU": 0.25}
    assert list(bundle(0.0, 0.0)) == ["CPU"], "Ray refuses an empty bundle"


def test_a_worker_listens_where_its_machine_is_reached() -> None:
    worker = Service(name="decode-0", role="decode", arguments=("--port", "0"), threads=2)
    spec = worker.on("10.0.0.7")
    assert spec.command[0] == sys.executable
    assert spec.command[-5:] == ("decode", "--host", "10.0.0.7", "--port", "0")
    assert spec.env["OMP_NUM_THREADS"] == "2"


def test_a_process_of_another_machine_is_never_taken_for_one_of_ours() -> None:
    here = Member(name="decode-0", pid=os.getpid(), started=psutil.Process().create_time(), log="")
    assert here.process() is not None
    elsewhere = Member(name="decode-0", pid=here.pid, started=here.started, log="", node="10.0.0.7")
    assert elsewhere.process() is None
    assert Member(name="decode-1", pid=0, started=0.0, log="").process() is None


def test_without_ray_the_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = ClusterConfig(home=tmp_path, model=tmp_path / "model", port=0, ray=RayConfig())
    with pytest.raises(ConfigError, match='make install EXTRAS="ray"'):
        run(config, Console(quiet=True))
    assert not (tmp_path / "clusters" / "default" / "ray.token").exists()
