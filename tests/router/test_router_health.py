"""A router that reads long prompts still says that it lives: a probe that waits for them gets it restarted."""

from __future__ import annotations

import asyncio
import json

import pytest

from router import schema
from tests.router.conftest import MODEL, RouterStarter
from tests.router.test_router_http import check_error

TOKENS = 900_000


async def test_health_answers_all_the_while_ten_prompts_of_900_000_tokens_are_tokenized(
    start_router: RouterStarter, monkeypatch: pytest.MonkeyPatch
):
    """Told by the order of answers, since no clock here is to be trusted: many between the first and the last. And by
    what this process reads itself: nothing that would keep it busy.
    """
    parse, lengths = schema.parse_json, []

    def noting(raw: bytes) -> schema.Json:
        lengths.append(len(raw))
        return parse(raw)

    monkeypatch.setattr(schema, "parse_json", noting)
    text = json.dumps({"model": MODEL, "prompt": "x" * TOKENS}).encode()
    ids = json.dumps({"model": MODEL, "prompt": [7] * TOKENS}).encode()
    headers = {"content-type": "application/json"}
    async with start_router(namespace="health", max_context=1 << 20) as client:
        posts = [
            asyncio.create_task(client.post("/v1/completions", content=body, headers=headers, timeout=100))
            for body in (text, ids) * 5
        ]
        answered: list[int] = []  # for each answer of health, how many prompts were done
        while not all(post.done() for post in posts):
            for path in ("/health", "/readiness"):
                answer = await client.get(path, timeout=100)
                assert answer.status_code == (200 if path == "/health" else 503)  # it lives, without any worker
            answered.append(sum(post.done() for post in posts))
        for post in posts:
            check_error(post.result(), 503, "no_workers")  # which it says behind the tokenizing
    assert answered[0] == 0
    assert len(lengths) == len(posts)
    assert max(lengths) < 100
    assert len([done for done in answered if done < len(posts)]) >= 20, answered
