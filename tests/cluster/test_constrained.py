"""Through the whole cluster: answers that a schema, a pattern or a tool demands, and several answers to one prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cluster.local_cluster import LocalCluster

SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 9999},
    {"enum": ["red", "größe", None, 4.5]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 200}},
        "required": ["name"],
        "additionalProperties": False,
    },
]


def chat(cluster: LocalCluster, model: Path, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "json"}]
    answer = cluster.post("/v1/chat/completions", {"model": model.name, "messages": messages, "seed": 5, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_answers_follow_their_schemas(cluster: LocalCluster, model: Path) -> None:
    for seed, schema in enumerate(SCHEMAS * 2):
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        (choice,) = chat(cluster, model, response_format=wanted, seed=seed, max_tokens=300)["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_answers_match_their_pattern_also_streamed_and_several_at_once(cluster: LocalCluster, model: Path) -> None:
    answer = chat(cluster, model, response_format={"type": "regex", "regex": "[ab]{20}-[0-9]{3}"}, n=4, max_tokens=99)
    said = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(re.fullmatch("[ab]{20}-[0-9]{3}", text) for text in said), said
    assert len(set(said)) == 4
    # 24 characters and the end of each; the prompt counts once.
    assert answer["usage"]["completion_tokens"] == 4 * 25
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 4 * 25


def test_a_forced_call_has_arguments_of_the_tools_schema(cluster: LocalCluster, model: Path) -> None:
    parameters = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "count"],
    }
    tools = [{"type": "function", "function": {"name": "pick", "parameters": parameters}}]
    end = {"logit_bias": {str(3 + ord("/")): 50}}  # one call is enough
    (choice,) = chat(cluster, model, tools=tools, tool_choice="required", max_tokens=600, **end)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "pick"
    jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


def test_a_choice_is_what_it_is_alone_and_with_others(cluster: LocalCluster, model: Path) -> None:
    body = {"model": model.name, "prompt": [7, 8, 9] * 100, "max_tokens": 8, "seed": 3, "return_token_ids": True}
    several = cluster.post("/v1/completions", body | {"n": 3}).json()["choices"]
    alone = cluster.post("/v1/completions", body).json()["choices"][0]
    assert several[0]["token_ids"] == alone["token_ids"]
    assert len({tuple(choice["token_ids"]) for choice in several}) == 3


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"$ref": "#"}])
def test_a_schema_that_does_not_compile_is_refused_and_the_next_request_is_served(
    cluster: LocalCluster, model: Path, schema: dict[str, Any]
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"model": model.name, "messages": [{"role": "user", "content": "json"}], "response_format": wanted}
    assert cluster.post("/v1/chat/completions", body).status_code == 400
    assert chat(cluster, model, max_tokens=2)["usage"]["completion_tokens"] <= 2
