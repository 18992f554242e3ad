"""Several answers to one prompt: drawn apart, on pages that travel once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.cluster.local_cluster import LocalCluster
from tests.cluster.test_conversations import worker_metrics
from wire.types import PAGE_TOKENS

PROMPT_TOKENS = 5_000
MOVED, SHARED = "penumbra_kv_transfer_bytes_total", "penumbra_prefix_cache_hits_total"


def test_the_pages_of_a_prompt_move_once_for_all_of_its_answers(cluster: LocalCluster, model: Path) -> None:
    rng = random.Random(77)

    def ask(n: int) -> tuple[list[dict[str, Any]], float, float]:
        """The answers to a prompt of its own, the bytes that moved for them, and the tokens that had not to."""
        body = {
            "model": model.name,
            "prompt": [rng.randrange(3, 250) for _ in range(PROMPT_TOKENS)],
            "n": n,
            "seed": 11,
            "max_tokens": 5,
            "ignore_eos": True,
        }
        before = worker_metrics(cluster)["decode"]
        answer = cluster.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        after = worker_metrics(cluster)["decode"]
        moved, shared = (after[name] - before[name] for name in (MOVED, SHARED))
        return answer.json()["choices"], moved, shared

    (alone,), moved_once, _ = ask(1)
    answers, moved, shared = ask(4)
    assert alone["finish_reason"] == "length"
    assert sorted(choice["index"] for choice in answers) == [0, 1, 2, 3]
    assert len({choice["text"] for choice in answers}) == 4, "each is drawn with noise of its own"
    whole_pages = PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS
    assert shared == 3 * whole_pages
    # Every answer goes on from a window and a state of its own, which are all that moves again.
    (decode,) = [worker for worker in cluster.workers() if worker["role"] == "decode"]
    assert moved < 4 * moved_once - 2.9 * whole_pages * decode["kv_token_bytes"]
