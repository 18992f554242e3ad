"""What clients may demand of an answer becomes a grammar that allows just that, or a 400 before any worker knows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from router.answers import Header, Usage
from router.config import ModelFacts
from router.grammar import KEPT_VERDICTS, GrammarChecker, grammar_of
from router.protocols.chat import Chat, ChatBody
from router.schema import parse_body
from router.text import ChatPrompt, Text
from tests.router.conftest import MODEL, RouterStarter, convert_chat
from tests.router.test_router_stream import cluster, saying
from wire.errors import InvalidRequest
from wire.grammar import load_tokenizer
from wire.types import FinishReason, TokenEvent

Json = dict[str, Any]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F", 0]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "note": {"type": "string", "maxLength": 3},
        "where": {"$ref": "#/$defs/place"},
        "any": {},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
INVOKE = '<｜DSML｜invoke name="{}">\n{}</｜DSML｜invoke>\n'
END = "</｜DSML｜tool_calls>"


def argument(name: str, value: str, *, text: bool) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{str(text).lower()}">{value}</｜DSML｜parameter>\n'


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path, facts: ModelFacts) -> LLTokenizer:
    return load_tokenizer(model_dir, facts.vocab_size, facts.eos_token_ids)


@pytest.fixture(scope="module")
def checker(model_dir: Path, facts: ModelFacts) -> Iterator[GrammarChecker]:
    made = GrammarChecker(model_dir, facts.vocab_size, facts.eos_token_ids)
    yield made
    made.close()


def prompt_of(text: Text, **fields: Any) -> ChatPrompt:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "json, please"}], **fields}
    return convert_chat(text, parse_body(ChatBody, json.dumps(body).encode()).for_recipe())


def accepts(tokenizer: LLTokenizer, text: Text, grammar: str, answer: str) -> bool:
    """Whether the grammar allows exactly this answer."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    ids = text.encode(answer, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("response_format", "good", "bad"),
    [
        ({"type": "json_object"}, ['{"a": [1, null]}', "{}", '{\n  "a": 1\n}'], ["[]", "1", "{", '{"a":  1}', "hi"]),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "array", "items": {"type": "boolean"}}},
            },
            ["[]", "[true, false]", "[true,false]"],
            ["{}", "[1]", ""],
        ),
        ({"type": "regex", "regex": r"\d{3}/[a-c]+|x y"}, ["123/abc", "x y"], ["12/a", "123/d", "x  y", ""]),
    ],
)
def test_a_response_format_allows_what_it_describes(
    text: Text, tokenizer: LLTokenizer, response_format: Json, good: list[str], bad: list[str]
) -> None:
    grammar = text.grammar_of(prompt_of(text, response_format=response_format))
    assert [answer for answer in good if not accepts(tokenizer, text, grammar, answer)] == []
    assert [answer for answer in bad if accepts(tokenizer, text, grammar, answer)] == []


def test_without_a_demand_there_is_no_grammar(text: Text) -> None:
    assert text.grammar_of(prompt_of(text)) == ""
    assert text.grammar_of(prompt_of(text, tools=TOOLS, tool_choice="none")) == ""


def test_reasoning_comes_first_and_is_free(text: Text, tokenizer: LLTokenizer) -> None:
    prompt = prompt_of(text, response_format={"type": "json_object"}, thinking={"type": "enabled"})
    grammar = text.grammar_of(prompt)
    assert accepts(tokenizer, text, grammar, 'well {[ hm</think>{"a": 1}')
    assert accepts(tokenizer, text, grammar, "</think>{}")
    assert not accepts(tokenizer, text, grammar, '{"a": 1}')
    assert not accepts(tokenizer, text, grammar, "a</think>b</think>{}")


CALLS_GOOD = [
    INVOKE.format("get_weather", argument("city", "Pa<r>is & </a> \n x", text=True)),
    INVOKE.format("get_weather", argument("city", "", text=True) + argument("days", "3", text=False)),
    INVOKE.format(
        "get_weather",
        argument("city", "x", text=True)
        + argument("unit", "F", text=True)
        + argument("zip", "01234", text=True)
        + argument("note", "abc", text=True)
        + argument("where", "[1.5, -2]", text=False)
        + argument("any", "free", text=True),
    ),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("unit", "0", text=False))
    + INVOKE.format("stop", ""),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("any", '{"a": [1]}', text=False)),
]
CALLS_BAD = [
    "",
    INVOKE.format("get_weather", ""),
    INVOKE.format("get_wether", argument("city", "x", text=True)),
    INVOKE.format("get_weather", argument("city", "1", text=False)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("days", "10", text=False)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("unit", "K", text=True)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("zip", "1234", text=True)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("note", "abcd", text=True)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("where", "[1, 2, 3]", text=False)),
    INVOKE.format("get_weather", argument("city", "x", text=True) + argument("more", "1", text=False)),
]


def test_a_required_call_is_one_of_the_tools_with_arguments_of_its_schema(text: Text, tokenizer: LLTokenizer) -> None:
    grammar = text.grammar_of(prompt_of(text, tools=TOOLS, tool_choice="required"))
    assert [calls for calls in CALLS_GOOD if not accepts(tokenizer, text, grammar, calls + END)] == []
    assert [calls for calls in CALLS_BAD if accepts(tokenizer, text, grammar, calls + END)] == []
    assert not accepts(tokenizer, text, grammar, "I would rather talk.")


def test_a_named_tool_is_the_only_one_that_may_be_called(text: Text, tokenizer: LLTokenizer) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    grammar = text.grammar_of(prompt_of(text, tools=TOOLS, tool_choice=choice))
    assert accepts(tokenizer, text, grammar, INVOKE.format("stop", "") + END)
    assert not accepts(tokenizer, text, grammar, CALLS_GOOD[0] + END)


def test_with_auto_an_answer_is_text_or_text_and_then_calls_of_the_right_form(
    text: Text, tokenizer: LLTokenizer
) -> None:
    grammar = text.grammar_of(prompt_of(text, tools=TOOLS))
    begin = "\n\n<｜DSML｜tool_calls>\n"
    for said in ("", "Let me see <｜DSML｜.\n"):
        assert accepts(tokenizer, text, grammar, said)
        assert [
            calls for calls in CALLS_GOOD if not accepts(tokenizer, text, grammar, said + begin + calls + END)
        ] == []
        assert [calls for calls in CALLS_BAD if accepts(tokenizer, text, grammar, said + begin + calls + END)] == []


def test_calls_that_follow_the_grammar_are_read_as_calls(text: Text) -> None:
    prompt = prompt_of(text, tools=TOOLS, tool_choice="required")
    answer = Chat(Header(answer_id="x", model=MODEL, prompt_ids=prompt.ids), prompt, text)
    usage = Usage(prompt_tokens=1, completion_tokens=0, cached_tokens=0)
    answer.opening(usage)
    ids = text.encode(CALLS_GOOD[2] + INVOKE.format("stop", "") + END, add_special_tokens=False)
    answer.push([TokenEvent(index=i, token_id=token) for i, token in enumerate(ids)])
    answer.close(FinishReason.STOP, usage)
    (choice,) = answer.response(usage)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    first, second = choice["message"]["tool_calls"]
    assert first["function"]["name"] == "get_weather"
    assert json.loads(first["function"]["arguments"]) == {
        "city": "x",
        "unit": "F",
        "zip": "01234",
        "note": "abc",
        "where": [1.5, -2],
        "any": "free",
    }
    assert (second["function"]["name"], json.loads(second["function"]["arguments"])) == ("stop", {})


# Bad ones


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_is_not(model_dir: Path, facts: ModelFacts) -> None:
    slow = GrammarChecker(model_dir, facts.vocab_size, facts.eos_token_ids, compile_s=0.0)
    try:
        with pytest.raises(InvalidRequest, match="takes more than 0 s"):
            slow.check('start: "a"')
        assert slow._child is None
        slow._compile_s = 30.0
        slow.check('start: "b"')
    finally:
        slow.close()


def test_a_checker_whose_child_died_starts_another(checker: GrammarChecker) -> None:
    checker.check('start: "a"')
    child = checker._child
    assert child is not None
    child.kill()
    child.wait()
    checker.check('start: "b"')
    assert checker._child is not child


def test_verdicts_are_remembered_but_not_for_ever(checker: GrammarChecker) -> None:
    for i in range(KEPT_VERDICTS + 50):
        checker.check(f'start: "{i}"')
    assert len(checker._verdicts) == KEPT_VERDICTS
    with pytest.raises(InvalidRequest, match="unclosed group"):
        checker.check("start: /(/")
    child, checker._child = checker._child, None
    with pytest.raises(InvalidRequest, match="unclosed group"):
        checker.check("start: /(/")
    checker._child = child


def test_the_child_ends_with_the_checker(model_dir: Path, facts: ModelFacts) -> None:
    made = GrammarChecker(model_dir, facts.vocab_size, facts.eos_token_ids)
    made.check('start: "a"')
    child = made._child
    assert child is not None
    made.close()
    assert child.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def schema_format(schema: Any) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


BAD: dict[str, tuple[Json, str]] = {
    "a type that is none": (schema_format({"type": "strin"}), "response_format"),
    "a pattern that is none": (schema_format({"type": "string", "pattern": "("}), "response_format"),
    "a schema nothing satisfies": (schema_format({"type": "integer", "minimum": 2, "maximum": 1}), "response_format"),
    "a schema that is only itself": (schema_format({"$ref": "#"}), "response_format"),
    "a schema elsewhere": (schema_format({"$ref": "http://169.254.169.254/"}), "response_format"),
    "a word no grammar knows": (schema_format({"type": "array", "uniqueItems": True}), "response_format"),
    "a regex that is none": ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
    "a regex that looks around": ({"response_format": {"type": "regex", "regex": "(?=a)b"}}, "response_format"),
    "a regex of 100 kB": ({"response_format": {"type": "regex", "regex": "a" * 100_000}}, "response_format"),
    "a tool's schema that is none": (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}},
                    },
                }
            ]
        },
        "tools",
    ),
    "a parameter's name that can not be written": (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {"type": "object", "properties": {'a"b': {"type": "integer"}}},
                    },
                }
            ]
        },
        "tools",
    ),
}


@pytest.fixture
async def front(start_router: RouterStarter, redis_url: str):
    async with cluster(start_router, redis_url, "grammar", saying("{}")) as (client, p0, d0):
        yield client, p0, d0


@pytest.mark.parametrize("kind", ["json", "regex", "tool_call"])
def test_a_constraint_is_refused_by_its_length_before_anything_is_made_of_it(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="at most 65536 are allowed"):
        grammar_of(kind, "[" * 100_000, thinking_end=None)


async def test_what_can_not_be_followed_is_a_400_with_the_reason_and_no_worker_notices(front: Any) -> None:
    client, p0, d0 = front
    good: Json = {"model": MODEL, "messages": [{"role": "user", "content": "json"}], "max_tokens": 50}
    for name, (change, param) in BAD.items():
        answer: httpx.Response = await client.post("/v1/chat/completions", json=good | change)
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        assert error["param"] in (param, None), (name, error)
        assert len(error["message"]) < 1000, name
    assert p0.requests == d0.requests == []
    answer = await client.post("/v1/chat/completions", json=good | schema_format({"type": "object"}))
    assert answer.json()["choices"][0]["message"]["content"] == "{}"
    for worker in (p0, d0):
        assert worker.requests[0].sampling.grammar.startswith("start: answer\nanswer: %json ")


def test_a_regex_that_makes_others_backtrack_for_ever_is_just_a_regex(checker: GrammarChecker) -> None:
    checker.check(grammar_of("regex", "(a+)+b$", thinking_end=None))
