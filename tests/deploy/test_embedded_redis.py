from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis as redis_client

from deploy.redis import EmbeddedRedis
from wire.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_server_is_real_and_leaves_nothing_behind(tmp_path, process_gone):
    with EmbeddedRedis(log=tmp_path / "redis.log") as server:
        pid, port = server.pid, server.port
        with redis_client.Redis.from_url(server.url) as client:
            assert client.set("worker", "here", px=60_000)
            assert client.get("worker") == b"here"
            assert client.info("server")["process_id"] == pid
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert client.config_get("save")["save"] == ""
    assert process_gone(pid)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["redis.log"]


def test_it_listens_on_loopback_only():
    with EmbeddedRedis() as server, redis_client.Redis.from_url(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_two_servers_live_side_by_side():
    with EmbeddedRedis() as one, EmbeddedRedis() as two:
        assert one.port != two.port
        assert one.pid != two.pid


def test_a_server_that_was_killed_comes_back_empty_on_its_port(eventually):
    with EmbeddedRedis() as server:
        port = server.port
        with redis_client.Redis.from_url(server.url) as client:
            client.set("worker", "here")
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: not server.alive)
        server.restart()
        assert server.port == port
        with redis_client.Redis.from_url(server.url) as client:
            assert client.get("worker") is None


def test_a_taken_port_is_refused_with_a_message_that_names_it(tmp_path):
    with EmbeddedRedis() as holder, pytest.raises(ConfigError, match=f"port {holder.port}"):
        EmbeddedRedis(port=holder.port, log=tmp_path / "redis.log").start()


def test_the_server_dies_with_a_process_that_is_killed_without_warning(eventually, process_gone):
    script = (
        "from deploy.redis import EmbeddedRedis\n"
        "import time\n"
        "with EmbeddedRedis() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert not process_gone(pid)
        holder.kill()
    eventually(lambda: process_gone(pid))
