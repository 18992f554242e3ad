"""Real NIXL between real processes: values, restarts, death, and strangers."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.nixl import NixlTransport
from kvtransfer.reader import Reader, ReadJob, ReadResult
from kvtransfer.transport import ReadState
from tests.kvtransfer.memory import Memory, card, card_from_json
from wire.errors import ConfigError, LayoutMismatch, TransferFailed, WorkerLost
from wire.types import OwnerCard, PageClass

ROOT = Path(__file__).parents[2]
FULL, SWA, STATE = PageClass.FULL, PageClass.SWA, PageClass.STATE
WAIT_S = 30


@contextlib.contextmanager
def owner_process(
    num_items: int = 64, seed: int = 1, epoch: int = 1
) -> Iterator[tuple[subprocess.Popen[str], OwnerCard]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kvtransfer.memory", str(num_items), str(seed), str(epoch)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, card_from_json(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(timeout=WAIT_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Side:
    """This process as a reader."""

    def __init__(self, agent: str) -> None:
        self.target = Memory(48)
        self.transport = NixlTransport(agent)
        self.transport.register(self.target.classes)
        self.results: queue.SimpleQueue[ReadResult] = queue.SimpleQueue()
        self.settled: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.reader = Reader(
            self.transport,
            self.target.classes,
            self.target.verify,
            self.results.put,
            self.settled.put,
            max_slice_bytes=16_000,
        )
        self.reader.start()

    def read(self, job_id: str, owner: OwnerCard, source: Memory, pages: int = 32) -> tuple[ReadJob, ReadResult]:
        rng = random.Random(job_id)
        job = ReadJob(
            job_id=job_id,
            card=owner,
            groups=tuple(source.group(c, range(pages), rng.sample(range(64), pages)) for c in (FULL, SWA, STATE)),
            local={c: dict(enumerate(rng.sample(range(48), pages))) for c in (FULL, SWA, STATE)},
        )
        self.reader.submit(job)
        return job, self.results.get(timeout=WAIT_S)

    def arrived(self, job: ReadJob, source: Memory) -> bool:
        return all(
            self.target.item(g.page_class, job.local[g.page_class][position]) == source.item(g.page_class, item)
            for g in job.groups
            for position, item in zip(g.positions, g.items, strict=True)
        )


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    side = Side(request.node.name)
    yield side
    assert side.reader.stop(5.0) == ()
    side.transport.close()
    assert not any(thread.name in ("kv-reader", "nixl-progress") for thread in threading.enumerate())


def test_permuted_pages_of_every_class_cross_between_processes(side: Side) -> None:
    source = Memory(64, seed=1)  # what the owner process fills its own memory with
    with owner_process() as (_, owner):
        for attempt in range(3):
            job, result = side.read(f"a{attempt}", owner, source)
            assert result.ok, result.error
            assert result.num_bytes == 32 * (1728 + 576 + 2048 + 64 + 256 + 64)
            assert side.arrived(job, source)


def test_two_owners_are_read_side_by_side(side: Side) -> None:
    first, second = Memory(64, seed=1), Memory(64, seed=2)
    with owner_process(epoch=1) as (_, one), owner_process(seed=2, epoch=2) as (_, two):
        two = replace(two, worker_id="prefill-1")
        job, result = side.read("a", one, first)
        assert result.ok
        assert side.arrived(job, first)
        job, result = side.read("b", two, second)
        assert result.ok
        assert side.arrived(job, second)


def test_a_killed_owner_fails_the_read_and_its_next_life_is_read_again(side: Side) -> None:
    source = Memory(64, seed=1)
    with owner_process(epoch=1) as (process, owner):
        assert side.read("before", owner, source)[1].ok
        process.kill()
        process.wait(timeout=WAIT_S)
        _, result = side.read("after death", owner, source)
        assert isinstance(result.error, WorkerLost | TransferFailed)
    reborn = Memory(64, seed=2)
    with owner_process(seed=2, epoch=2) as (_, owner):
        job, result = side.read("next life", owner, reborn)
        assert result.ok, result.error
        assert side.arrived(job, reborn)
    assert side.reader.stop(5.0) == ()


def test_an_owner_killed_before_the_first_read_fails_it(side: Side) -> None:
    with owner_process() as (process, owner):
        process.kill()
        process.wait(timeout=WAIT_S)
        _, result = side.read("a", owner, Memory(64, seed=1))
        assert isinstance(result.error, WorkerLost | TransferFailed)


def test_an_owner_frozen_before_the_first_read_is_given_up_and_its_pages_settle_after_the_thaw(side: Side) -> None:
    source = Memory(64, seed=1)
    with owner_process() as (process, owner):
        process.send_signal(signal.SIGSTOP)
        job, result = side.read("frozen", owner, source)
        assert isinstance(result.error, TransferFailed)
        assert "No read from prefill-0 finished for 2 s" in str(result.error)
        assert result.unsettled
        process.send_signal(signal.SIGCONT)
        settled: set = set()
        while settled != set(result.unsettled):
            settled |= set(side.settled.get(timeout=WAIT_S))
        job, result = side.read("thawed", owner, source)
        assert result.ok, result.error
        assert side.arrived(job, source)


def test_an_agent_reads_from_itself() -> None:
    memory = Memory(8, seed=3)
    before = memory.item(FULL, 2)
    transport = NixlTransport("alone")
    transport.register(memory.classes)
    ours = card(memory, transport)
    transport.connect(ours)
    handle = transport.read(ours, FULL, [2], [5])
    while handle.poll() is ReadState.RUNNING:
        pass
    assert handle.poll() is ReadState.DONE
    handle.close()
    handle.close()
    assert memory.item(FULL, 5) == memory.item(FULL, 2) == before
    transport.close()


def test_a_stranger_is_refused_before_a_byte_moves(side: Side) -> None:
    with owner_process() as (_, owner):
        full = owner.classes[0]
        wider = replace(full.regions[0], item_bytes=full.regions[0].item_bytes * 2)
        other = replace(owner, classes=(replace(full, regions=(wider, *full.regions[1:])), *owner.classes[1:]))
        with pytest.raises(LayoutMismatch, match="region 'c4' has items of 3456 bytes"):
            side.transport.connect(other)
        moved = replace(full.regions[0], address=4096)
        unregistered = replace(owner, classes=(replace(full, regions=(moved, *full.regions[1:])), *owner.classes[1:]))
        with pytest.raises(LayoutMismatch, match="has not registered"):
            side.transport.connect(unregistered)
        with pytest.raises(WorkerLost, match="calls itself impostor"):
            side.transport.connect(replace(owner, agent="impostor"))
        for rubbish in (b"", b"rubbish", bytes(10_000)):
            with pytest.raises(WorkerLost, match="cannot be reached"):
                side.transport.connect(replace(owner, metadata=rubbish))
        side.transport.connect(owner)
        assert side.read("a", owner, Memory(64, seed=1))[1].ok


def test_connection_data_cut_short_is_refused_and_others_are_still_read(side: Side) -> None:
    with owner_process() as (_, torn), owner_process(seed=2, epoch=2) as (_, whole):
        for length in (len(torn.metadata) // 4, len(torn.metadata) // 2, len(torn.metadata) - 1):
            with pytest.raises(WorkerLost, match="cannot be reached"):
                side.transport.connect(replace(torn, metadata=torn.metadata[:length]))
        assert side.read("a", whole, Memory(64, seed=2))[1].ok


def test_a_worker_that_is_not_connected_can_not_be_read(side: Side) -> None:
    with owner_process() as (_, owner), pytest.raises(WorkerLost, match="not connected"):
        side.transport.read(owner, FULL, [0], [0])


@pytest.mark.parametrize("transports", ["sm,self", "cma"])
def test_ucx_without_tcp_is_a_config_error_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:
    monkeypatch.setitem(os.environ, "UCX_TLS", transports)
    with pytest.raises(ConfigError, match=f"Set UCX_TLS={transports},tcp or unset it"):
        NixlTransport("x")
