"""The clients that people already have, unmodified, each with all it offers, against a real cluster.

The model is random: what it says means nothing, and that it calls a tool or closes its reasoning is forced on it, by
the grammar and by a bias towards the token that ends reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from engine.model.tiny import tokenizer_json
from tests.cluster.local_cluster import LocalCluster

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["a", "b"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


class Pick(BaseModel):
    """One of two kinds, some number of times."""

    kind: Literal["a", "b"]
    count: int = Field(ge=0, le=99)


THINK_END = next(token["id"] for token in tokenizer_json()["added_tokens"] if token["content"] == "</think>")
BRIEFLY = {str(THINK_END): 8.0}
"""Reasoning of a few tokens: its end is likely at each."""


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def claude(cluster: LocalCluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=cluster.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def chain_of(cluster: LocalCluster, model: Path, **clients: Any) -> ChatOpenAI:
    """Over HTTP clients of ours: its own are closed by whichever collection of garbage comes by."""
    return ChatOpenAI(
        base_url=f"{cluster.url}/v1",
        api_key=SecretStr("none"),
        model=model.name,
        max_retries=0,
        timeout=60,
        seed=1,
        max_completion_tokens=300,
        **clients,
    )


# OpenAI, chat


def test_openai_lists_and_retrieves_the_model(client: openai.OpenAI, model: Path) -> None:
    (listed,) = client.models.list().data
    assert listed.id == model.name
    assert client.models.retrieve(model.name) == listed


def test_openai_chat_reasons_and_then_answers_by_a_schema(client: openai.OpenAI, model: Path) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": "json"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "pick", "schema": PARAMETERS}},
        "reasoning_effort": "high",
        "logit_bias": BRIEFLY,
        "max_completion_tokens": 600,
        "seed": 1,
        "extra_body": {"thinking": {"type": "enabled"}},
    }
    whole = client.chat.completions.create(**ask)
    (choice,) = whole.choices
    jsonschema.validate(json.loads(choice.message.content or ""), PARAMETERS)
    reasoning = choice.message.reasoning_content  # type: ignore[attr-defined]
    assert len(reasoning) > 0
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert 0 < (whole.usage.completion_tokens_details.reasoning_tokens or 0) < whole.usage.completion_tokens

    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    deltas = [part.choices[0].delta for part in parts if part.choices]
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(thought or "" for thought in thoughts) == reasoning
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert sum(bool(thought) for thought in thoughts) > 1, "the reasoning came in pieces"
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_chat_calls_a_tool_whose_arguments_come_in_pieces(client: openai.OpenAI, model: Path) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": PARAMETERS, "strict": True}}
        for name in ("pick", "drop")
    ]
    ask: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": "go"}],
        "tools": tools,
        "parallel_tool_calls": False,
        "max_completion_tokens": 600,
        "seed": 2,
    }
    for choice, names in (
        ("required", ("pick", "drop")),
        ({"type": "function", "function": {"name": "drop"}}, ("drop",)),
    ):
        whole = client.chat.completions.create(**ask, tool_choice=choice)
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)

        with client.chat.completions.stream(**ask, tool_choice=choice) as stream:
            pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
        assert len(pieces) > 2
        assert streamed.function.name == call.function.name

    # What a tool gave goes back in the next turn.
    messages = [*ask["messages"], whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    after = client.chat.completions.create(
        **ask | {"messages": messages, "max_completion_tokens": 4}, tool_choice="none"
    )
    assert after.choices[0].message.tool_calls is None
    assert after.usage is not None
    assert after.usage.completion_tokens <= 4


def test_openai_chat_parses_into_a_model(client: openai.OpenAI, model: Path) -> None:
    parsed = client.chat.completions.parse(
        model=model.name,
        messages=[{"role": "user", "content": "json"}],
        response_format=Pick,
        max_completion_tokens=300,
        seed=3,
    )
    assert isinstance(parsed.choices[0].message.parsed, Pick)


def test_openai_chat_thinks_only_when_told_to(client: openai.OpenAI, model: Path) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 12,
        "seed": 5,
    }
    on = client.chat.completions.create(**ask, extra_body={"thinking": {"type": "enabled"}, "ignore_eos": True})
    off = client.chat.completions.create(**ask, extra_body={"thinking": {"type": "disabled"}, "ignore_eos": True})
    default = client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
    assert on.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert off.choices[0].message.content
    assert not getattr(off.choices[0].message, "reasoning_content", None)
    assert default.choices[0].message == off.choices[0].message


# OpenAI, responses


def test_openai_responses_answer_whole_and_streamed(client: openai.OpenAI, model: Path) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "max_output_tokens": 20,
        "temperature": 0.8,
        "metadata": {"trace": "7"},
        "reasoning": {"effort": "none"},
        "extra_body": {"seed": 6, "ignore_eos": True},
    }
    whole = client.responses.create(**ask)
    assert whole.id.startswith("resp_")
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.metadata == {"trace": "7"}
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    assert whole.usage.total_tokens == whole.usage.input_tokens + 20

    events = list(client.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 3
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 20


def test_openai_responses_reason_call_a_tool_and_take_its_result(client: openai.OpenAI, model: Path) -> None:
    tool = {"type": "function", "name": "pick", "parameters": PARAMETERS, "strict": True}
    ask: dict[str, Any] = {
        "model": model.name,
        "input": [{"role": "user", "content": "go"}],
        "tools": [tool],
        "parallel_tool_calls": False,
        "max_output_tokens": 600,
        "extra_body": {"seed": 8},
    }
    with client.responses.stream(
        **ask, tool_choice={"type": "function", "name": "pick"}, reasoning={"effort": "none"}
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.parallel_tool_calls is False
    (call,) = [item for item in final.output if item.type == "function_call"]
    assert call.name == "pick"
    assert "".join(pieces) == call.arguments
    assert len(pieces) > 2
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)

    after = client.responses.create(
        **ask
        | {
            "input": [
                *ask["input"],
                call.model_dump(),
                {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
            ],
            "tool_choice": "none",
            "reasoning": {"effort": "high"},
            "max_output_tokens": 100,
            "extra_body": {"seed": 8, "logit_bias": BRIEFLY, "ignore_eos": True},
        }
    )
    assert [item.type for item in after.output] == ["reasoning", "message"]
    assert after.usage is not None
    assert after.usage.output_tokens_details.reasoning_tokens > 0


def test_openai_responses_parse_into_a_model(client: openai.OpenAI, model: Path) -> None:
    parsed = client.responses.parse(
        model=model.name, input="json", text_format=Pick, max_output_tokens=300, reasoning={"effort": "none"}
    )
    assert isinstance(parsed.output_parsed, Pick)


def test_openai_responses_keep_nothing_and_say_so(client: openai.OpenAI, model: Path) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model.name, input="hi", previous_response_id="resp_1")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "previous_response_id")


# Anthropic


def test_anthropic_answers_whole_and_streamed(claude: anthropic.Anthropic, model: Path) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "thinking": {"type": "disabled"},
        "extra_body": {"seed": 6, "ignore_eos": True},
    }
    whole = claude.messages.create(**ask)
    assert whole.id.startswith("msg_")
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 20
    assert whole._request_id
    (block,) = whole.content
    assert block.type == "text"

    with claude.messages.stream(**ask) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == block.text
    assert len(pieces) > 3
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 20
    read = final.usage.cache_read_input_tokens or 0
    counted = claude.messages.count_tokens(**{key: ask[key] for key in ("model", "system", "messages", "thinking")})
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == final.usage.input_tokens + read


def test_anthropic_thinks_in_pieces_before_it_answers(claude: anthropic.Anthropic, model: Path) -> None:
    with claude.messages.stream(
        model=model.name,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=1100,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"format": {"type": "json_schema", "schema": PARAMETERS}},
        extra_body={"seed": 9, "logit_bias": BRIEFLY},
    ) as stream:
        deltas = [event for event in stream if event.type == "thinking"]
        final = stream.get_final_message()
    thinking, text = final.content
    assert thinking.type == "thinking"
    assert "".join(event.thinking for event in deltas) == thinking.thinking
    assert len(deltas) > 1
    assert thinking.signature
    assert text.type == "text"
    jsonschema.validate(json.loads(text.text), PARAMETERS)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "drop"}])
def test_anthropic_calls_a_tool_and_takes_its_result(
    claude: anthropic.Anthropic, model: Path, choice: dict[str, Any]
) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": "go"}],
        "tools": [{"name": name, "input_schema": PARAMETERS} for name in ("pick", "drop")],
        "max_tokens": 600,
        "thinking": {"type": "disabled"},
        "extra_body": {"seed": 2},
    }
    choice = choice | {"disable_parallel_tool_use": True}
    whole = claude.messages.create(**ask, tool_choice=choice)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.type == "tool_use"
    assert call.name == "drop" if "name" in choice else call.name in ("pick", "drop")
    jsonschema.validate(call.input, PARAMETERS)

    with claude.messages.stream(**ask, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input == call.input
    assert json.loads("".join(pieces)) == call.input
    assert len(pieces) > 2

    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "7"}]}
    turns = [*ask["messages"], {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(**ask | {"messages": turns, "max_tokens": 4}, tool_choice={"type": "none"})
    assert after.usage.output_tokens <= 4


def test_anthropic_stops_at_a_sequence_and_says_which(claude: anthropic.Anthropic, model: Path) -> None:
    ask: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 60,
        "thinking": {"type": "disabled"},
        "extra_body": {"seed": 6, "ignore_eos": True},
    }
    (block,) = claude.messages.create(**ask).content
    assert block.type == "text"
    free = block.text
    stop = next(free[i : i + 2] for i in range(4, len(free) - 2) if free.find(free[i : i + 2]) == i)
    with claude.messages.stream(**ask, stop_sequences=["\0never", stop]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == free[: free.index(stop)]
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert 0 < final.usage.output_tokens < 60


def test_anthropic_reads_our_errors(claude: anthropic.Anthropic, model: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="nobody", messages=messages, max_tokens=5)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    picture: Any = [{"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}]
    with pytest.raises(anthropic.BadRequestError) as image:
        claude.messages.create(model=model.name, messages=[{"role": "user", "content": picture}], max_tokens=5)
    assert image.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert image.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        claude.messages.create(model=model.name, messages=messages, max_tokens=50_000_000)


# LangChain


@pytest.fixture
def chain(cluster: LocalCluster, model: Path) -> Iterator[ChatOpenAI]:
    with httpx.Client() as client:
        yield chain_of(cluster, model, http_client=client)


def test_langchain_answers_streams_calls_and_structures(chain: ChatOpenAI) -> None:
    short = chain.model_copy(update={"max_tokens": 16, "extra_body": {"ignore_eos": True}})
    whole = short.invoke("hello")
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    pieces = list(short.stream("hello"))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert len(pieces) > 3

    bound = chain.bind_tools([Pick], tool_choice="Pick", parallel_tool_calls=False)
    answer = bound.invoke("go")
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert call["name"] == "Pick"
    Pick.model_validate(call["args"])
    joined: Any = None
    for chunk in bound.stream("go"):
        assert isinstance(chunk, AIMessageChunk)
        joined = chunk if joined is None else joined + chunk
    assert [made["args"] for made in joined.tool_calls] == [call["args"]]

    assert isinstance(chain.with_structured_output(Pick, method="json_schema").invoke("json"), Pick)


async def test_langchain_answers_many_at_once(cluster: LocalCluster, model: Path) -> None:
    async with httpx.AsyncClient() as client:
        short = chain_of(cluster, model, http_async_client=client).model_copy(update={"max_tokens": 6})
        answers = await short.abatch(["one", "two", "three", "four"])
    assert all(answer.usage_metadata["output_tokens"] <= 6 for answer in answers if answer.usage_metadata)
    assert len(answers) == 4
