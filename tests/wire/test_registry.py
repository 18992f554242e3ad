"""The registry against a real server, including one that is killed, slow, empty or full of rubbish."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace

import pytest
import uvloop

from chaos.proxy import Network, Proxy
from wire.errors import ConfigError, Superseded
from wire.registry import MAX_LINKS, Registry, Snapshot, decode_record, encode_record
from wire.types import Link, Role, WorkerInfo

INFO = WorkerInfo(
    worker_id="prefill-0",
    role=Role.PREFILL,
    address="127.0.0.1:50051",
    epoch=2**63 + 7,
    model="m",
    signature="s",
    max_context=8192,
    free_tokens=100,
    total_tokens=200,
)


@contextlib.asynccontextmanager
async def beating(registry: Registry, get_info: Callable[[], WorkerInfo]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(registry.run_heartbeat(get_info))
        yield
        task.cancel()


async def until(registry: Registry, accept: Callable[[Snapshot], bool], within_s: float = 5) -> Snapshot:
    async with asyncio.timeout(within_s):
        while True:
            snapshot = await registry.snapshot()
            if accept(snapshot):
                return snapshot
            await asyncio.sleep(0.02)


async def test_a_worker_appears_with_its_latest_record_and_leaves_when_it_stops(redis_server) -> None:
    info = INFO
    async with Registry(redis_server.url) as registry:
        assert (await registry.snapshot()).workers == {}
        async with beating(registry, lambda: info):
            first = await until(registry, lambda s: "prefill-0" in s.workers)
            assert first.workers == {"prefill-0": INFO}
            assert first.stale_since is None
            info = replace(INFO, draining=True, running=3)
            second = await until(registry, lambda s: s.workers["prefill-0"].draining)
            assert second.workers["prefill-0"].running == 3
        assert (await registry.snapshot()).workers == {}
        assert redis_server.client().keys("*") == []


async def test_a_worker_that_died_silently_leaves_with_its_lease(redis_server) -> None:
    client = redis_server.client()
    async with Registry(redis_server.url) as registry:
        client.set("penumbra:worker:prefill-0", encode_record(INFO), px=300)
        client.sadd("penumbra:workers", "prefill-0")
        assert "prefill-0" in (await registry.snapshot()).workers
        await until(registry, lambda s: s.workers == {})
        assert client.smembers("penumbra:workers") == set()


async def test_a_lease_lasts_three_seconds(redis_server) -> None:
    async with Registry(redis_server.url) as registry, beating(registry, lambda: INFO):
        await until(registry, lambda s: "prefill-0" in s.workers)
        assert 1_500 < redis_server.client().pttl("penumbra:worker:prefill-0") <= 3_000


async def test_killing_redis_raises_nothing_and_an_empty_one_is_filled_again(redis_server) -> None:
    async with Registry(redis_server.url) as registry, beating(registry, lambda: INFO):
        await until(registry, lambda s: "prefill-0" in s.workers)
        redis_server.kill()
        stale = await until(registry, lambda s: s.stale_since is not None)
        assert stale.workers == {"prefill-0": INFO}
        later = await registry.snapshot()
        assert later.stale_since == stale.stale_since
        redis_server.start()
        fresh = await until(registry, lambda s: s.stale_since is None and "prefill-0" in s.workers, within_s=3)
        assert fresh.workers == {"prefill-0": INFO}


def test_connections_that_redis_resets_raise_nothing_on_the_routers_event_loop(redis_server) -> None:
    """uvloop answers a write to such a connection with a RuntimeError."""

    async def look(proxy: Proxy) -> list[bool]:
        fresh = []
        async with Registry(f"redis://127.0.0.1:{proxy.address[1]}/0") as registry:
            for _ in range(20):
                fresh.append((await registry.snapshot()).stale_since is None)
                # In the same turn of the loop, so that it hears of the reset when it writes.
                await asyncio.to_thread(network.reset, proxy)
            await asyncio.sleep(0.1)
            fresh.append((await registry.snapshot()).stale_since is None)
        return fresh

    with Network() as network:
        fresh = uvloop.run(look(network.proxy(("127.0.0.1", redis_server.port))))
    assert fresh[0]
    assert len(fresh) == 21


async def test_a_flushed_redis_is_filled_again(redis_server) -> None:
    async with Registry(redis_server.url) as registry, beating(registry, lambda: INFO):
        await until(registry, lambda s: "prefill-0" in s.workers)
        redis_server.client().flushall()
        assert (await registry.snapshot()).workers == {}
        await until(registry, lambda s: "prefill-0" in s.workers, within_s=3)


async def test_a_redis_that_was_never_there_is_an_empty_stale_snapshot(redis_server) -> None:
    redis_server.kill()
    async with Registry(redis_server.url) as registry, beating(registry, lambda: INFO):
        snapshot = await registry.snapshot()
        assert snapshot.workers == {}
        assert snapshot.stale_since is not None


async def test_a_slow_redis_gives_the_last_snapshot_and_no_answer_meant_for_another_question(
    redis_server,
) -> None:
    async with Registry(redis_server.url) as registry, beating(registry, lambda: INFO):
        await until(registry, lambda s: "prefill-0" in s.workers)
        sleep = redis_server.client().execute_command
        async with asyncio.TaskGroup() as tasks:
            asleep = tasks.create_task(asyncio.to_thread(sleep, "DEBUG", "SLEEP", "1.0"))
            stale = await until(registry, lambda s: s.stale_since is not None)
            assert (await registry.snapshot()).workers == stale.workers == {"prefill-0": INFO}
            assert not asleep.done()
        fresh = await until(registry, lambda s: s.stale_since is None)
        assert fresh.workers == {"prefill-0": INFO}
        assert fresh.skipped == 0


async def test_records_that_can_not_be_used_are_skipped_and_counted(redis_server) -> None:
    client = redis_server.client()
    good = json.loads(encode_record(INFO))
    rubbish = {
        "not-json": b"{",
        "not-text": b"\xff\xfe",
        "a-list": b"[]",
        "deep": b"[" * 16_000,
        "huge": b"x" * 1_000_000,
        "wrong-kind": json.dumps(good | {"worker_id": "wrong-kind", "epoch": "7"}),
        "a-bool": json.dumps(good | {"worker_id": "a-bool", "running": True}),
        "negative": json.dumps(good | {"worker_id": "negative", "free_tokens": -1}),
        "too-big": json.dumps(good | {"worker_id": "too-big", "epoch": 2**64}),
        "no-address": json.dumps({k: v for k, v in good.items() if k != "address"} | {"worker_id": "no-address"}),
        "no-role": json.dumps(good | {"worker_id": "no-role", "role": "cook"}),
        "later": json.dumps(good | {"worker_id": "later", "protocol": 2}),
        "impostor": encode_record(INFO),
    }
    for worker_id, record in rubbish.items():
        client.set(f"penumbra:worker:{worker_id}", record)
        client.sadd("penumbra:workers", worker_id)
    client.rpush("penumbra:worker:a-queue", "x")
    client.sadd("penumbra:workers", "a-queue", "Bad:Id", "x" * 100, b"\xff")
    added = good | {"worker_id": "newer", "colour": "red"}
    client.set("penumbra:worker:newer", json.dumps(added))
    client.sadd("penumbra:workers", "newer")
    async with Registry(redis_server.url) as registry:
        snapshot = await registry.snapshot()
    assert snapshot.workers == {"newer": replace(INFO, worker_id="newer")}
    assert snapshot.skipped == len(rubbish) + 1
    assert snapshot.stale_since is None


async def test_an_index_of_the_wrong_type_is_a_stale_snapshot(redis_server) -> None:
    redis_server.client().set("penumbra:workers", "oops")
    async with Registry(redis_server.url) as registry:
        assert (await registry.snapshot()).stale_since is not None


async def test_namespaces_do_not_see_each_other(redis_server) -> None:
    url = redis_server.url
    async with Registry(url, "blue") as blue, Registry(url, "green") as green, beating(blue, lambda: INFO):
        await until(blue, lambda s: "prefill-0" in s.workers)
        assert (await green.snapshot()).workers == {}


@pytest.mark.parametrize("worker_id", ["", "A", "a:b", "a b", "a*", "x" * 64, "a\r\n"])
async def test_a_worker_id_that_can_not_be_a_key_is_refused(worker_id: str) -> None:
    async with Registry("redis://127.0.0.1:1") as registry:
        with pytest.raises(ConfigError, match="rename it"):
            await registry.run_heartbeat(lambda: replace(INFO, worker_id=worker_id))


def test_a_url_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="redis URL"):
        Registry("http://x")


def test_a_record_comes_back_as_it_was() -> None:
    assert decode_record("prefill-0", encode_record(INFO)) == INFO


LINK = Link(source="prefill-0", bytes_per_s=2**40, p50_us=1500, reads=3, read_bytes=2**50)


def test_a_record_brings_the_pairs_its_worker_has_read_over() -> None:
    info = replace(INFO, links=(LINK, replace(LINK, source="prefill-1")))
    assert decode_record("prefill-0", encode_record(info)) == info


@pytest.mark.parametrize(
    "links",
    [
        "many",
        {"source": "prefill-0"},
        ["prefill-0"],
        [{"source": "prefill-0"}],
        [asdict(LINK) | {"reads": -1}],
        [asdict(LINK) | {"reads": "3"}],
        [asdict(LINK)] * (MAX_LINKS + 1),
    ],
)
def test_pairs_that_make_no_sense_make_the_record_unusable(links: object) -> None:
    record = json.dumps(asdict(INFO) | {"links": links}).encode()
    with pytest.raises(ValueError, match=r"links|reads|missing"):
        decode_record("prefill-0", record)


async def test_a_poll_that_is_cancelled_at_any_moment_ends(redis_server) -> None:
    """redis-py may lose a cancellation that arrives as a command is sent; a loop of ours must not."""
    async with Registry(redis_server.url) as registry:

        async def poll() -> None:
            while True:
                await registry.snapshot()

        for steps in range(60):
            task = asyncio.create_task(poll())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done == {task}
            assert task.cancelled()


async def test_of_two_lives_of_a_worker_the_one_that_began_last_keeps_its_record(redis_server) -> None:
    """As when a frozen process is thawed after another has taken its place."""
    later = replace(INFO, epoch=5, address="127.0.0.1:50052")
    async with Registry(redis_server.url) as first, Registry(redis_server.url) as second:
        old = asyncio.create_task(first.run_heartbeat(lambda: INFO))
        await until(first, lambda s: "prefill-0" in s.workers)
        async with beating(second, lambda: later):
            with pytest.raises(Superseded, match=r"another life \(epoch 0000000000000005\)"):
                async with asyncio.timeout(10):
                    await old
            assert (await second.snapshot()).workers == {"prefill-0": later}
