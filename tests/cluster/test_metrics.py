"""What a running cluster exposes: everything the dashboards and alerts name, and no more series than it has parts."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.local_cluster import LocalCluster
from tests.deploy.test_dashboards import expressions, metric_names

SUFFIXES = {"counter": ("_total", "_created"), "histogram": ("_bucket", "_sum", "_count", "_created"), "gauge": ("",)}


def exposed(cluster: LocalCluster) -> dict[str, set[str]]:
    """Metric name -> label names, over the router and every worker; also of those that have no sample yet."""
    pages = [f"{cluster.url}/metrics"]
    pages += [f"http://{worker['http_address']}/metrics" for worker in cluster.workers()]
    found: dict[str, set[str]] = {}
    for url in pages:
        for family in text_string_to_metric_families(httpx.get(url, timeout=30).text):
            for suffix in SUFFIXES[family.type]:
                found.setdefault(family.name + suffix, set())
            for sample in family.samples:
                found[sample.name] |= sample.labels.keys()
    return found


def num_series(cluster: LocalCluster) -> int:
    families = text_string_to_metric_families(httpx.get(f"{cluster.url}/metrics", timeout=30).text)
    return sum(len(family.samples) for family in families)


def test_every_metric_that_dashboards_and_alerts_name_exists(cluster: LocalCluster) -> None:
    names = exposed(cluster)
    missing = {
        (where, name) for where, expression in expressions() for name in metric_names(expression) if name not in names
    }
    assert not missing


def test_an_answer_is_counted_where_the_dashboards_look(cluster: LocalCluster) -> None:
    model = httpx.get(f"{cluster.url}/v1/models", timeout=10).json()["data"][0]["id"]
    before = cluster.metrics()
    body = {"model": model, "prompt": [9] * 300, "max_tokens": 5, "ignore_eos": True}
    assert cluster.post("/v1/completions", body).status_code == 200
    after = cluster.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('penumbra_request_success_total{finished_reason="length"}') == 1
    assert grown("penumbra_request_prompt_tokens_sum") == 300
    assert grown("penumbra_request_generation_tokens_sum") == 5
    assert grown("penumbra_request_time_per_output_token_seconds_count") == 1
    assert after['penumbra_worker_health{role="decode",worker_id="decode-0"}'] == 1
    assert after["process_resident_memory_bytes"] > 10_000_000


def test_what_clients_send_makes_no_series(cluster: LocalCluster) -> None:
    def send(i: int) -> None:
        httpx.get(f"{cluster.url}/nothing/{i}", headers={"x-request-id": f"id-{i}"}, timeout=30)
        httpx.get(f"{cluster.url}/v1/models/name-{i}", timeout=30)
        httpx.get(f"{cluster.url}/page/{i}.js", timeout=30)
        cluster.post("/v1/completions", {"model": f"model-{i}", "prompt": "x"})
        cluster.post("/v1/completions", {"model": "m", "prompt": "x", f"field_{i}": 1})

    send(0)
    before = num_series(cluster)
    for i in range(1, 30):
        send(i)
    assert num_series(cluster) == before
