"""One decode worker process, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import secrets
import time

import structlog
from prometheus_client import CollectorRegistry

from decode_worker.config import DecodeConfig
from decode_worker.scheduler import DecodeCore, DecodeLimits
from decode_worker.service import DecodeService
from engine.colocated import generate
from engine.pace import Pace
from engine.runner import Runner
from kvtransfer.loopback import LoopbackTransport
from kvtransfer.nixl import NixlTransport
from kvtransfer.reader import Reader
from kvtransfer.transport import Transport
from wire.events import PrefixPublisher
from wire.telemetry import WorkerMetrics, configure_logging
from wire.types import PAGE_TOKENS, SamplingParams
from wire.worker import DoorConfig, serve

log = structlog.get_logger()

READER_STOP_S = 5.0


def run(config: DecodeConfig) -> int:
    """Serve until asked to stop; 0 then, 1 after a fault. Raises ConfigError for what can not be served."""
    configure_logging("decode", config.worker_id, config.log_level)
    runner = Runner.load(config.engine)
    # A life of this worker has a number of its own, so that nobody takes it for the one before.
    epoch = secrets.randbits(64)
    agent = f"{config.worker_id}-{epoch:016x}"
    transport: Transport = (
        NixlTransport(agent, memory=runner.pools.memory) if config.transport == "nixl" else LoopbackTransport(agent)
    )
    try:
        transport.register(runner.pools.classes)
        return asyncio.run(_serve(config, runner, transport, epoch))
    finally:
        transport.close()


def measured(runner: Runner) -> Pace:
    """How fast this worker computes prompts, from one of a page's length; the first one only warms up.

    Without it no router would know whether to ask it to, and it would never find out.
    """
    pace, num_tokens = Pace(), min(PAGE_TOKENS, runner.max_context - 1)
    prompt = [i % runner.model_config.vocab_size for i in range(num_tokens)]
    for _ in range(2):
        began = time.perf_counter()
        for _ in generate(runner, prompt, SamplingParams(max_tokens=1, seed=0), chunk_tokens=num_tokens):
            pace = Pace()
            pace.record([(0, num_tokens)], time.perf_counter() - began)
    return pace


async def _serve(config: DecodeConfig, runner: Runner, transport: Transport, epoch: int) -> int:
    pools = runner.pools
    core = DecodeCore(
        pools,
        DecodeLimits(
            max_waiting=config.max_waiting,
            queue_timeout_s=config.queue_timeout_s,
            offer_timeout_s=config.offer_timeout_s,
            growth_tokens=config.growth_tokens,
            host_memory_bytes=config.host_memory_bytes,
            prefix_cache=config.prefix_cache,
            draft_tokens=config.draft_tokens if runner.draft is not None else 0,
            local_prefill=config.local_prefill,
            # The draft layer's window is behind one layer more.
            num_layers=runner.model_config.num_layers + (config.engine.draft and runner.model_config.draft_layer),
            max_context=runner.max_context,
            vocab_size=runner.model_config.vocab_size,
            eos_token_id=runner.model_config.eos_token_id,
        ),
        measured(runner) if config.local_prefill else Pace(),
    )
    registry = CollectorRegistry()
    publisher = PrefixPublisher(config.redis_url, config.worker_id, epoch)
    service = DecodeService(
        core,
        runner,
        pools,
        WorkerMetrics(registry),
        worker_id=config.worker_id,
        epoch=epoch,
        model=runner.fingerprint,
        signature=pools.signature,
        max_context=runner.max_context,
        local_prefill=config.local_prefill,
        hold_grammar=runner.grammars.hold,
        publish=publisher.publish,
    )
    reader = Reader(transport, pools.classes, pools.import_pages, service.reader_results, service.reader_settled)
    service.attach(reader)
    door = DoorConfig(
        worker_id=config.worker_id,
        redis_url=config.redis_url,
        host=config.host,
        port=config.port,
        http_port=config.http_port,
        advertise_host=config.advertise_host,
        drain_s=config.drain_s,
        otlp_traces_endpoint=config.otlp_traces_endpoint,
    )
    reader.start()
    try:
        async with publisher:
            return await serve(service, door, registry)
    finally:
        if unsettled := await asyncio.to_thread(reader.stop, READER_STOP_S):
            log.warning("reads_unsettled_at_exit", num_items=len(unsettled))
