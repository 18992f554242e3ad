from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.cluster import ClusterConfig
from deploy.state import ClusterState, Member, cluster_folder, ready_line, stop
from wire.errors import ConfigError

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def member_of(name: str, pid: int) -> Member:
    return Member(name=name, pid=pid, started=psutil.Process(pid).create_time(), log="/dev/null")


def state_of(supervisor: Member, *members: Member) -> ClusterState:
    return ClusterState(
        cluster="default",
        url="http://127.0.0.1:8000",
        model="penumbra-nano",
        ready=True,
        supervisor=supervisor,
        members=members,
    )


@pytest.fixture
def sleeper():
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


def test_the_state_file_reads_back_as_it_was_written(tmp_path):
    own = member_of("supervisor", os.getpid())
    state = state_of(own, replace(own, name="router"))
    state.save(tmp_path)
    assert ClusterState.load(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_folder_without_a_state_file_means_nothing_runs(tmp_path):
    assert ClusterState.load(tmp_path) is None
    assert stop(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cluster": "x", "surprise": 1}', '{"supervisor": {"pid": 1}}'])
def test_a_state_file_that_is_not_ours_is_refused_by_name(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ConfigError, match=r"state\.json is not a state file of this version"):
        ClusterState.load(tmp_path)


def test_stopping_ends_the_supervisor_and_what_it_left_behind(tmp_path, sleeper, process_gone):
    with subprocess.Popen(SLEEP) as orphan:
        state_of(member_of("supervisor", sleeper.pid), member_of("decode-0", orphan.pid)).save(tmp_path)
        assert stop(tmp_path) == ["decode-0"]
        assert process_gone(sleeper.pid)
        assert process_gone(orphan.pid)
    assert not (tmp_path / "state.json").exists()


def test_a_process_that_got_a_recycled_pid_is_never_touched(tmp_path, sleeper):
    stranger = member_of("supervisor", sleeper.pid)
    before = replace(stranger, started=stranger.started - 3600)
    assert stranger.process() is not None
    assert before.process() is None
    state_of(before, replace(before, name="router")).save(tmp_path)
    assert stop(tmp_path) is None
    assert sleeper.poll() is None


def test_the_ready_line_holds_a_request_a_shell_can_run():
    import json
    import shlex

    words = shlex.split(ready_line(state_of(member_of("supervisor", os.getpid()))))
    assert words[:3] == ["ready:", "curl", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"model": "penumbra-nano", "messages": [{"role": "user", "content": "Tell me a story."}]}


def test_a_home_folder_holds_everything_a_cluster_writes():
    assert cluster_folder(Path("/srv/penumbra"), "blue") == Path("/srv/penumbra/clusters/blue")
    assert cluster_folder(None, "blue") == Path.home() / ".local/state/penumbra/blue"


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b"])
def test_a_cluster_name_can_not_leave_its_folder(name):
    with pytest.raises(ConfigError, match="can not name a cluster"):
        cluster_folder(None, name)


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (1, 0)])
def test_a_cluster_without_one_kind_of_worker_is_refused(prefill, decode):
    with pytest.raises(ConfigError, match=f"not {prefill} prefill and {decode} decode"):
        ClusterConfig(prefill=prefill, decode=decode)
