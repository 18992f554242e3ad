from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.supervisor import STEADY_S, Child, ChildSpec, Restarts, Supervisor

ROOT = Path(__file__).resolve().parents[2]

ENDS_ON_TERM = """
import os, signal, sys, time
def leave(*_):
    print("leaving", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("here", flush=True)
time.sleep(60)
"""
IGNORES_TERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("here", flush=True)
time.sleep(60)
"""


class Heard(list[tuple[str, str]]):
    """What children wrote, in the order it came."""

    def __call__(self, name: str, line: str) -> None:
        self.append((name, line))


@pytest.fixture
def heard():
    return Heard()


def spec(name: str, script: str, **env: str) -> ChildSpec:
    return ChildSpec(name=name, command=(sys.executable, "-c", script), env=env)


def test_tiers_stop_in_reverse_order_and_nobody_is_left(tmp_path, heard, eventually, process_gone):
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([spec("prefill-0", ENDS_ON_TERM), spec("prefill-1", ENDS_ON_TERM)])
        supervisor.start([spec("router", ENDS_ON_TERM)])
        pids = [child.pid for child in supervisor.children]
        eventually(lambda: len(heard) == 3)
        assert supervisor.dead() is None
    left = [name for name, line in heard if line == "leaving"]
    assert left[0] == "router"
    assert sorted(left[1:]) == ["prefill-0", "prefill-1"]
    assert all(process_gone(pid) for pid in pids)


def test_a_child_that_ignores_the_request_is_killed_after_its_grace(tmp_path, heard, eventually):
    supervisor = Supervisor(log_dir=tmp_path, echo=heard, grace_s=0.3)
    (stubborn,) = supervisor.start([spec("decode-0", IGNORES_TERM)])
    eventually(lambda: ("decode-0", "here") in heard)
    assert supervisor.stop() == ["decode-0"]
    assert stubborn.exit_code == -signal.SIGKILL


def test_being_in_a_hurry_ends_the_grace_at_once(tmp_path, heard, eventually):
    supervisor = Supervisor(log_dir=tmp_path, echo=heard, grace_s=3600)
    supervisor.start([spec("decode-0", IGNORES_TERM)])
    eventually(lambda: ("decode-0", "here") in heard)
    assert supervisor.stop(hurry=lambda: True) == ["decode-0"]


def test_a_child_that_dies_is_named_with_its_code_and_last_lines(tmp_path, heard, eventually):
    script = "import sys\nfor n in range(40): print('line', n)\nsys.exit(78)"
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([spec("router", ENDS_ON_TERM), spec("prefill-0", script)])
        eventually(lambda: supervisor.dead() is not None)
        dead = supervisor.dead()
        assert dead is not None
        assert (dead.name, dead.exit_code) == ("prefill-0", 78)
        assert dead.tail() == [f"line {n}" for n in range(28, 40)]
    assert (tmp_path / "prefill-0.log").read_text().splitlines() == [f"line {n}" for n in range(40)]


def test_a_line_that_is_not_text_is_logged_as_it_came(tmp_path, heard, eventually):
    script = r"import sys; sys.stdout.buffer.write(b'\xff broken\n'); sys.stdout.flush()"
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([spec("router", script)])
        eventually(lambda: supervisor.dead() is not None)
        assert supervisor.dead().tail() == ["\ufffd broken"]
    assert (tmp_path / "router.log").read_bytes() == b"\xff broken\n"


def test_a_child_yields_to_others_as_much_as_it_was_told(tmp_path, heard, eventually):
    script = "import os, time; time.sleep(0.5); print(os.nice(0))"
    command = (sys.executable, "-c", script)
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([ChildSpec(name=name, command=command, nice=nice) for name, nice in (("a", 5), ("b", 0))])
        eventually(lambda: len(heard) == 2)
    assert sorted(heard) == [("a", str(os.nice(0) + 5)), ("b", str(os.nice(0)))]


def test_a_childs_environment_is_laid_over_ours(tmp_path, heard, eventually, monkeypatch):
    monkeypatch.setenv("FROM_OURS", "kept")
    script = "import os; print(os.environ['FROM_OURS'], os.environ['OMP_NUM_THREADS'])"
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([spec("prefill-0", script, OMP_NUM_THREADS="7")])
        eventually(lambda: heard == [("prefill-0", "kept 7")])


def test_a_program_that_does_not_exist_is_a_death_that_says_so(tmp_path, heard, eventually):
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        supervisor.start([ChildSpec(name="router", command=("/no/such/program",))])
        eventually(lambda: supervisor.dead() is not None)
        assert supervisor.dead().tail() == ["cannot run /no/such/program: No such file or directory"]


def test_children_die_with_a_supervisor_that_is_killed_without_warning(tmp_path, eventually, process_gone):
    script = (
        "import sys, time, pathlib\n"
        "from deploy.supervisor import STEADY_S, Child, ChildSpec, Restarts, Supervisor\n"
        "child = (sys.executable, '-c', 'import time; time.sleep(60)')\n"
        "supervisor = Supervisor(log_dir=pathlib.Path(sys.argv[1]), echo=lambda name, line: None)\n"
        "supervisor.start([ChildSpec(name=f'c{n}', command=child) for n in range(2)])\n"
        "print(*(child.pid for child in supervisor.children), flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        pids = [int(word) for word in holder.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(process_gone(pid) for pid in pids)
        holder.kill()
    eventually(lambda: all(process_gone(pid) for pid in pids))


def test_a_command_whose_supervisor_is_already_gone_is_not_started(tmp_path):
    witness = tmp_path / "ran"
    tether = ROOT / "deploy" / "tether.py"
    strangers_pid = str(os.getppid())
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(tether), strangers_pid, "touch", str(witness)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert f"process {strangers_pid} that asked for it is gone" in result.stderr
    assert not witness.exists()


def test_a_child_that_died_is_started_again_in_its_place_and_its_log_goes_on(tmp_path, heard, eventually, process_gone):
    with Supervisor(log_dir=tmp_path, echo=heard) as supervisor:
        (first,) = supervisor.start([spec("prefill-0", ENDS_ON_TERM)])
        supervisor.start([spec("router", ENDS_ON_TERM)])
        eventually(lambda: len(heard) == 2)
        first.send(signal.SIGKILL)
        eventually(lambda: supervisor.dead() is first)
        again = supervisor.replace(first)
        assert [child.name for child in supervisor.children] == ["prefill-0", "router"]
        assert supervisor.dead() is None
        eventually(lambda: len(heard) == 3)
        assert again.log.read_text() == "here\nhere\n"
    assert process_gone(again.pid)


def test_pauses_before_a_restart_double_up_to_a_limit_and_start_over_after_a_steady_life():
    restarts, now, pauses = Restarts(), 0.0, []
    for _ in range(8):
        pauses.append(restarts.died(now, "decode-0"))
        assert restarts.waits("decode-0")
        assert restarts.due(now + pauses[-1] - 0.01) == []
        now += pauses[-1]
        assert restarts.due(now) == ["decode-0"]
        assert restarts.due(now) == []
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restarts.died(now, "prefill-0") == 0.5
    assert restarts.died(now + STEADY_S, "decode-0") == 0.5


def test_a_log_that_grows_long_makes_room_for_another_and_two_of_them_are_kept(tmp_path, heard, monkeypatch):
    monkeypatch.setattr("deploy.supervisor.LOG_BYTES", 1_000)
    log = tmp_path / "chatty.log"
    child = Child(spec("chatty", "for i in range(345): print(f'{i:09}')"), log=log, echo=heard)
    assert child.wait(60)
    child.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chatty.log", "chatty.log.1"]
    assert log.read_text().split() == [f"{i:09}" for i in range(300, 345)]
    assert (tmp_path / "chatty.log.1").read_text().split() == [f"{i:09}" for i in range(200, 300)]
    assert heard == [("chatty", f"{i:09}") for i in range(345)]


def test_a_long_log_that_can_not_be_put_aside_goes_on_and_loses_nothing(tmp_path, heard, monkeypatch):
    monkeypatch.setattr("deploy.supervisor.LOG_BYTES", 1_000)
    log = tmp_path / "chatty.log"
    (tmp_path / "chatty.log.1").mkdir()
    child = Child(spec("chatty", "for i in range(345): print(f'{i:09}')"), log=log, echo=heard)
    assert child.wait(60)
    child.close()
    assert log.read_text().split() == [f"{i:09}" for i in range(345)]
    assert heard == [("chatty", f"{i:09}") for i in range(345)]


def test_a_log_that_another_has_put_aside_is_left_for_the_new_one(tmp_path, heard, monkeypatch, eventually):
    """As where one life of a child succeeds another, and both still write."""
    monkeypatch.setattr("deploy.supervisor.LOG_BYTES", 1_000)
    log, aside = tmp_path / "chatty.log", tmp_path / "chatty.log.1"
    script = f"""
import pathlib, time
print("x" * 999, flush=True)
for _ in range(3_000):
    if pathlib.Path({str(tmp_path / "go")!r}).exists():
        break
    time.sleep(0.01)
print("y", flush=True)
"""
    child = Child(spec("chatty", script), log=log, echo=heard)
    eventually(lambda: len(heard) == 1)
    log.replace(aside)
    log.write_text("of the other\n")
    (tmp_path / "go").touch()
    assert child.wait(60)
    child.close()
    assert aside.read_text() == "x" * 999 + "\n"
    assert log.read_text() == "of the other\ny\n"


def test_a_child_whose_log_can_not_be_written_goes_on(heard):
    child = Child(spec("chatty", "for i in range(2_000): print('x' * 100)"), log=Path("/dev/full"), echo=heard)
    assert child.wait(60)
    child.close()
    assert child.exit_code == 0
    assert heard == [("chatty", "x" * 100)] * 2_000
