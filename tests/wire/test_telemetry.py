"""Logs are one event a line, metrics have the names dashboards know."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client import CollectorRegistry

from wire.errors import ConfigError
from wire.telemetry import RouterMetrics, WorkerMetrics, configure_logging
from wire.types import PageClass


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logging_restored")
def test_an_event_is_one_line_of_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0")
    structlog.get_logger().info("request_done", request_id="r1", ttft_ms=212)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "level=info event=request_done" in line
    assert line.endswith("request_id=r1 ttft_ms=212 service=decode worker_id=decode-0\n")


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_stays_on_its_events_line(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    configure_logging("router", json=as_json)
    try:
        raise KeyError("page 7")
    except KeyError:
        structlog.get_logger().exception("broke")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "KeyError: 'page 7'" in lines[0]


@pytest.mark.usefixtures("logging_restored")
def test_libraries_log_in_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("prefill", json=True)
    logging.getLogger("some.library").warning("took %d ms", 7)
    logging.getLogger("uvicorn.access").info("GET /metrics")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    event = json.loads(lines[0])
    assert (event["event"], event["level"], event["service"]) == ("took 7 ms", "warning", "prefill")


@pytest.mark.usefixtures("logging_restored")
def test_events_below_the_level_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router", level="warning")
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line.split("event=")[1].split()[0] for line in capsys.readouterr().err.splitlines()] == ["loud"]


def test_an_unknown_level_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'chatty' is unknown"):
        configure_logging("router", level="chatty")


def test_a_time_to_first_token_of_minutes_is_told_apart() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.ttft.observe(146)
    metrics.ttft.observe(202)
    value = lambda edge: registry.get_sample_value(  # noqa: E731
        "penumbra_time_to_first_token_seconds_bucket", {"le": edge}
    )
    assert [value(edge) for edge in ("120.0", "150.0", "180.0", "240.0", "600.0", "+Inf")] == [0, 1, 1, 2, 2, 2]


def test_the_edges_of_durations_are_those_that_were_asked_for() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, (1.0, 900.0))
    metrics.ttft.observe(700)
    metrics.stage.labels("prefill").observe(700)
    edges = {
        name: [
            sample.labels["le"]
            for family in registry.collect()
            for sample in family.samples
            if sample.name == f"{name}_bucket" and sample.value == 1
        ]
        for name in ("penumbra_time_to_first_token_seconds", "penumbra_stage_duration_seconds")
    }
    assert list(edges.values()) == [["900.0", "+Inf"]] * 2


def test_page_states_sum_to_the_pool_and_set_the_usage() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.set_pages(PageClass.FULL, free=6, used=3, quarantined=1)
    metrics.set_pages(PageClass.SWA, free=0, used=8, quarantined=0)
    pages = {
        (s.labels["page_class"], s.labels["state"]): s.value
        for family in registry.collect()
        for s in family.samples
        if s.name == "penumbra_pages"
    }
    assert pages[("full", "free")] + pages[("full", "used")] + pages[("full", "quarantined")] == 10
    assert pages[("swa", "used")] == 8
    assert registry.get_sample_value("penumbra_kv_cache_usage_perc") == pytest.approx(0.4)


def test_two_registries_do_not_share_metrics() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(first).running.set(5)
    WorkerMetrics(second)
    assert first.get_sample_value("penumbra_num_requests_running") == 5
    assert second.get_sample_value("penumbra_num_requests_running") == 0
