"""What users bring: the openai package, raw SSE, mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.cluster.local_cluster import LocalCluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_openai_client_streams_a_chat(client: openai.OpenAI, model: Path) -> None:
    stream = client.chat.completions.create(
        model=model.name,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}],
        max_tokens=24,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert len({c.id for c in chunks}) == 1


def test_openai_client_streamed_and_whole_answers_agree(client: openai.OpenAI, model: Path) -> None:
    ask = {"model": model.name, "prompt": "The quick brown fox", "max_tokens": 40, "seed": 9, "temperature": 0.7}
    whole = client.completions.create(**ask)
    parts = list(client.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert len(parts) > 5, "the answer came in pieces"


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: Path) -> None:
    ask = {"model": model.name, "prompt": "abc", "max_tokens": 60, "seed": 2, "extra_body": {"ignore_eos": True}}
    free = client.completions.create(**ask).choices[0].text
    stop = next(free[i : i + 2] for i in range(4, len(free) - 2) if free.find(free[i : i + 2]) == i)
    stopped = client.completions.create(**ask, stop=[stop])
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_openai_client_reads_our_errors(client: openai.OpenAI, model: Path) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=model.name, prompt="hi", max_tokens=10_000_000)
    assert "10000000" in str(too_long.value).replace(",", "")
    assert too_long.value.request_id


BAD_BODIES = [
    (b"{", "invalid_json"),
    (b'{"model":"tiny-v4","prompt":[]}', "empty_prompt"),
    (b'{"model":"tiny-v4","prompt":""}', "empty_prompt"),
    (b'{"model":"tiny-v4","prompt":[999999]}', "invalid_request"),
    (b'{"model":"tiny-v4","prompt":"x","max_tokens":0}', "invalid_request"),
    (b'{"model":"tiny-v4","prompt":"x","max_tokens":"10"}', "invalid_request"),
    (b'{"model":"tiny-v4","prompt":"x","temperature":NaN}', "invalid_number"),
    (b'{"model":"tiny-v4","prompt":"x","seed":-1}', "invalid_request"),
]


def test_bad_input_is_refused_and_the_next_good_request_works(cluster: LocalCluster, model: Path) -> None:
    good = {"model": model.name, "prompt": "still here?", "max_tokens": 3, "seed": 0}
    expected = cluster.post("/v1/completions", good).json()["choices"]
    for body, code in BAD_BODIES:
        answer = httpx.post(
            f"{cluster.url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert answer.status_code == 400, body
        assert answer.json()["error"]["code"] == code, body
        assert answer.headers["x-request-id"]
    assert cluster.post("/v1/completions", good).json()["choices"] == expected


def test_sse_frames_are_data_lines_ending_in_done(cluster: LocalCluster, model: Path) -> None:
    body = {"model": model.name, "prompt": "hi", "max_tokens": 4, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])
