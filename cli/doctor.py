"""`penumbra doctor`: reads pages over every prefill-decode pair and says what it found, not what was configured."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.remote import client, get
from wire import convert
from wire.errors import PenumbraError
from wire.rpc import error_from_rpc, open_channel
from wire.types import PAGE_TOKENS, ProbeReply, WorkerRef
from wire.v1 import worker_pb2, worker_pb2_grpc

LONG_TOKENS = 900_000
PROBE_TIMEOUT_S = 60.0
CARRIERS = {"rdma": "RDMA", "tcp": "TCP", "memory": "memory"}
Expect = Literal["auto", "rdma", "any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode worker, as the router's list tells of them, and what a probe of theirs said."""

    prefill: dict[str, Any]
    decode: dict[str, Any]
    reply: ProbeReply | None = None
    problem: str = ""

    @property
    def same_layout(self) -> bool:
        return all(self.prefill[name] == self.decode[name] for name in ("model", "signature", "protocol"))

    def expects_rdma(self, expect: Expect) -> bool:
        """Whether anything slower than RDMA is a fault. Between two hosts whose RDMA ports are up it is."""
        if expect != "auto":
            return expect == "rdma"
        hosts = {worker["address"].rpartition(":")[0] for worker in (self.prefill, self.decode)}
        return len(hosts) == 2 and all(worker.get("rdma_ports", 0) for worker in (self.prefill, self.decode))


@dataclass(frozen=True, slots=True)
class Findings:
    """What a reply comes to."""

    bytes_per_s: float
    page_p50_s: float
    long_s: float  # a prompt of LONG_TOKENS tokens, should all its pages move at this speed

    @classmethod
    def of(cls, reply: ProbeReply) -> Findings:
        speed = reply.num_bytes / (statistics.median(reply.large_us) / 1e6)
        num_bytes = -(-LONG_TOKENS // PAGE_TOKENS) * reply.page_bytes + reply.window_bytes
        return cls(speed, statistics.median(reply.page_us) / 1e6, num_bytes / speed)


def verdict(pair: Pair, expect: Expect) -> str:
    """What is wrong with a pair; nothing when it is as it should be."""
    if pair.problem:
        return pair.problem
    if pair.reply is not None and pair.reply.carrier != "rdma" and pair.expects_rdma(expect):
        carried = f"{CARRIERS.get(pair.reply.carrier, pair.reply.carrier)} {pair.reply.device}".strip()
        return (
            f"pages moved over {carried} where RDMA was expected: look at UCX_TLS and UCX_NET_DEVICES, at the device "
            "plugin, and whether both pods have the RDMA interface"
        )
    return ""


def lonely(workers: Sequence[dict[str, Any]]) -> list[str]:
    """Workers that no worker of the other role can exchange pages with."""
    found = []
    for worker in workers:
        others = [other for other in workers if other["role"] != worker["role"]]
        if not any(Pair(prefill=worker, decode=other).same_layout for other in others):
            found.append(worker["worker_id"])
    return found


def run(url: str, api_key: str | None, *, expect: Expect, num_bytes: int, only: str | None, console: Console) -> int:
    """Probe every pair, one after the other, so that none is measured while another moves. -> exit code."""
    with client(url, api_key) as router:
        workers = [worker for worker in get(router, "/workers")["workers"] if worker["state"] != "down"]
    down = not workers
    pairs = [
        Pair(prefill=prefill, decode=decode)
        for prefill in workers
        for decode in workers
        if (prefill["role"], decode["role"]) == ("prefill", "decode")
        and (only is None or only in (prefill["worker_id"], decode["worker_id"]))
    ]
    apart = [pair for pair in pairs if not pair.same_layout]
    if down or not pairs:
        console.print(
            f"{url} knows no pair of workers{f' with {only}' if only else ''}; nothing can be served", style="red"
        )
        return 1
    together = [pair for pair in pairs if pair.same_layout]
    with console.status("") as status:
        probed = asyncio.run(_probe_all(together, num_bytes, status.update))
    console.print(render(probed, expect))
    for pair in apart:
        console.print(
            f"{pair.prefill['worker_id']} and {pair.decode['worker_id']} hold different models or page layouts",
            style="dim",
        )
    wrong = [(pair, text) for pair in probed if (text := verdict(pair, expect))]
    for pair, text in wrong:
        console.print(
            Text(f"{pair.prefill['worker_id']} -> {pair.decode['worker_id']}: {text}", style="red"), soft_wrap=True
        )
    alone = lonely(workers) if only is None else []
    for name in alone:
        console.print(Text(f"{name} finds no partner with its model and page layout", style="red"), soft_wrap=True)
    if not wrong and not alone:
        console.print(f"{len(probed)} of {len(probed)} pairs move pages as they should", style="green")
    return 1 if wrong or alone else 0


async def _probe_all(pairs: Sequence[Pair], num_bytes: int, say: Callable[[str], None]) -> list[Pair]:
    done = []
    for number, pair in enumerate(pairs, start=1):
        say(f"reading over pair {number} of {len(pairs)}: {pair.prefill['worker_id']} -> {pair.decode['worker_id']}")
        done.append(await _probe(pair, num_bytes))
    return done


async def _probe(pair: Pair, num_bytes: int) -> Pair:
    source = WorkerRef(
        worker_id=pair.prefill["worker_id"], address=pair.prefill["address"], epoch=int(pair.prefill["epoch"], 16)
    )
    request = worker_pb2.ProbeRequest(source=convert.worker_ref_to_wire(source), num_bytes=num_bytes)
    channel = open_channel(pair.decode["address"])
    try:
        stub = worker_pb2_grpc.DecodeStub(channel)  # type: ignore[no-untyped-call]
        reply = convert.probe_reply_from_wire(await stub.Probe(request, timeout=PROBE_TIMEOUT_S))
        return Pair(prefill=pair.prefill, decode=pair.decode, reply=reply)
    except grpc.aio.AioRpcError as failure:
        return Pair(prefill=pair.prefill, decode=pair.decode, problem=str(error_from_rpc(failure)))
    except PenumbraError as error:
        return Pair(prefill=pair.prefill, decode=pair.decode, problem=str(error))
    finally:
        await channel.close(None)


def render(pairs: Sequence[Pair], expect: Expect) -> Table:
    table = Table("prefill", "decode", "transport", box=box.SIMPLE, pad_edge=False)
    for heading in ("GB/s", "p50 of a page", "900K tokens in", "layout"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for pair in pairs:
        names = (pair.prefill["worker_id"], pair.decode["worker_id"])
        layout = pair.decode["signature"][:8]
        if pair.reply is None:
            table.add_row(*names, "", "", "", "", layout, Text("failed", style="red"))
            continue
        found = Findings.of(pair.reply)
        carried = CARRIERS.get(pair.reply.carrier, pair.reply.carrier)
        mark = Text("slow path", style="red") if verdict(pair, expect) else Text("ok", style="green")
        table.add_row(
            *names,
            f"{carried} {pair.reply.device}".strip(),
            f"{found.bytes_per_s / 1e9:.2f}",
            f"{found.page_p50_s * 1e3:.2f} ms",
            f"{found.long_s:.2f} s",
            layout,
            mark,
        )
    return table
