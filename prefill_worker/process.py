"""One prefill worker process, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import secrets

from prometheus_client import CollectorRegistry

from engine.runner import Runner
from kvtransfer.loopback import LoopbackTransport
from kvtransfer.nixl import NixlTransport
from kvtransfer.transport import Transport
from prefill_worker.config import PrefillConfig
from prefill_worker.scheduler import PrefillCore, PrefillLimits
from prefill_worker.service import PrefillService
from wire.events import PrefixPublisher
from wire.telemetry import WorkerMetrics, configure_logging
from wire.types import OwnerCard, PageClass
from wire.worker import DoorConfig, serve


def run(config: PrefillConfig) -> int:
    """Serve until asked to stop; 0 then, 1 after a fault. Raises ConfigError for what can not be served."""
    configure_logging("prefill", config.worker_id, config.log_level)
    runner = Runner.load(config.engine)
    # A life of this worker has a number of its own, so that nobody takes its pages for those of the one
    # before.
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


async def _serve(config: PrefillConfig, runner: Runner, transport: Transport, epoch: int) -> int:
    agent, metadata = transport.describe()
    card = OwnerCard(
        worker_id=config.worker_id,
        epoch=epoch,
        transport=transport.name,
        agent=agent,
        metadata=metadata,
        memory=runner.pools.memory,
        signature=runner.pools.signature,
        classes=runner.pools.classes,
    )
    model, pools = runner.model_config, runner.pools
    (window_bytes,) = [sum(r.item_bytes for r in c.regions) for c in pools.classes if c.name is PageClass.SWA]
    retained = pools.swa.capacity // 4
    if config.retained_window_bytes is not None:
        retained = min(config.retained_window_bytes // window_bytes, pools.swa.capacity)
    core = PrefillCore(
        pools,
        PrefillLimits(
            chunk_tokens=config.chunk_tokens,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
            queue_timeout_s=config.queue_timeout_s,
            step_s=config.step_s,
            max_context=runner.max_context,
            vocab_size=model.vocab_size,
            # The draft layer's window is behind one layer more.
            num_layers=model.num_layers + (config.engine.draft and model.draft_layer),
            prefix_cache=config.prefix_cache,
            retained_windows=retained,
        ),
    )
    pool_bytes = sum(r.item_bytes * r.num_items for c in pools.classes for r in c.regions)
    registry = CollectorRegistry()
    publisher = PrefixPublisher(config.redis_url, config.worker_id, epoch)
    service = PrefillService(
        core,
        runner,
        card,
        WorkerMetrics(registry),
        model=runner.fingerprint,
        max_context=runner.max_context,
        held_bytes=pool_bytes // 2 if config.held_bytes is None else config.held_bytes,
        publish=publisher.publish,
        hold_grammar=runner.grammars.hold,
    )
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
    async with publisher:
        return await serve(service, door, registry)
