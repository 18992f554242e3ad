"""/v1/messages and its /count_tokens: Anthropic's conversations, by deepseek-recipe both ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import deepseek_recipe as recipe
from pydantic import Field, WithJsonSchema, field_validator

from router.answers import Header, Json, Usage
from router.intake import Intake, Prepared
from router.protocols.parsed import Parsed
from router.schema import (
    TEXT,
    Effort,
    Label,
    Sampled,
    Strict,
    an_object,
    characters,
    kind_of,
    only,
    parse_body,
    stop_strings,
    text_or,
)
from router.text import ChatPrompt, Text
from wire.errors import InvalidRequest

RECIPE_FIELDS = ("model", "messages", "system", "tools", "thinking", "output_config")

BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
    "tool_result": ("text",),
}
"""Content blocks that each role may hold. deepseek-recipe would turn others into a note or nothing."""


BLOCK = {
    "anyOf": [
        an_object(type={"const": "text"}, text=TEXT),
        an_object("signature", type={"const": "thinking"}, thinking=TEXT, signature=TEXT),
        an_object(type={"const": "tool_use"}, id=TEXT, name=TEXT, input={"type": "object"}),
        an_object(
            "content",
            type={"const": "tool_result"},
            tool_use_id=TEXT,
            content=text_or(an_object(type={"const": "text"}, text=TEXT)),
        ),
    ]
}
Turn = Annotated[Json, WithJsonSchema(an_object(role={"enum": ["user", "assistant"]}, content=text_or(BLOCK)))]
TextBlock = Annotated[Json, WithJsonSchema(an_object(type={"const": "text"}, text=TEXT))]
Tool = Annotated[
    Json,
    WithJsonSchema(an_object("description", name=TEXT, description=TEXT, input_schema={"type": "object"})),
]
ToolChoice = Annotated[
    Json,
    WithJsonSchema(
        {
            "anyOf": [
                an_object(type={"enum": ["auto", "any", "none"]}),
                an_object(type={"const": "tool"}, name=TEXT),
            ]
        }
    ),
]
Thinking = Annotated[
    Json,
    WithJsonSchema(
        an_object(
            "budget_tokens", type={"enum": ["enabled", "disabled", "adaptive"]}, budget_tokens={"type": "integer"}
        )
    ),
]


class Metadata(Strict):
    user_id: Label | None = None


class OutputConfig(Strict):
    effort: Effort | None = None
    format: OutputFormat | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class CountTokensBody(Strict):
    """What makes up the prompt. Everything in it that only a converter can check, deepseek-recipe checks."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[Turn] = Field(min_length=1, max_length=10_000)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=512)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Json | None = None  # prefixes are cached without being asked
    mcp_servers: Annotated[list[Json] | None, *only([])] = None

    @property
    def answer_schema(self) -> Json | None:
        form = self.output_config.format if self.output_config else None
        return None if form is None else form.schema_

    @property
    def call_required(self) -> bool:
        """`any` tool must be called; deepseek-recipe itself knows how to require the one that is named."""
        return (self.tool_choice or {}).get("type") == "any"

    @property
    def one_call(self) -> bool:
        return (self.tool_choice or {}).get("disable_parallel_tool_use") is True

    def for_recipe(self) -> Json:
        """The body in the form deepseek-recipe reads: the fields it knows, nulls left out."""
        body = {name: value for name in RECIPE_FIELDS if (value := getattr(self, name)) is not None}
        body["messages"] = [_checked(message, f"messages[{i}]") for i, message in enumerate(self.messages)]
        if isinstance(self.system, list):
            _check_blocks(self.system, "system", "system")
        if self.output_config is not None:
            body["output_config"] = {"effort": self.output_config.effort} if self.output_config.effort else {}
        if self.tool_choice is not None:
            body["tool_choice"] = self.tool_choice
        return body


class MessagesBody(Sampled, CountTokensBody):
    max_tokens: int | None = Field(default=None, gt=0, lt=1 << 31)
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    metadata: Metadata | None = None
    service_tier: Label | None = None
    container: Annotated[str | None, *only(None)] = None

    @field_validator("stop_sequences", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> list[str] | None:
        return None if value is None else stop_strings(value)

    def for_recipe(self) -> Json:
        body = super().for_recipe()
        for name in ("max_tokens", "stop_sequences", "temperature", "top_p"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        return body


def prepare(intake: Intake, raw: bytes, context: int) -> Prepared:
    body = parse_body(MessagesBody, raw)
    intake.check_model(body.model)
    intake.check_length(characters(body.messages), context)
    text = intake.text
    prompt = _prompt(intake, body)
    options = body.options(intake.facts.vocab_size, intake.answer_tokens(prompt, context))
    options["grammar"] = text.grammar_of(prompt, one_call=body.one_call)
    sampling = prompt.sampling(options, body.temperature, body.top_p, seed=body.seed)
    (request,) = intake.requests(prompt.ids, sampling, cache_salt=body.cache_salt)
    header = Header(
        created=intake.created, answer_id=f"msg_{request.request_id}", model=body.model, prompt_ids=prompt.ids
    )
    return Prepared(
        choices=((request, Message(header, prompt, text)),),
        stream=bool(body.stream),
        return_timeline=bool(body.return_timeline),
        priority=body.priority,
    )


def count_tokens(intake: Intake, raw: bytes, context: int) -> Json:
    body = parse_body(CountTokensBody, raw)
    intake.check_model(body.model)
    return {"input_tokens": len(_prompt(intake, body).ids)}


def _prompt(intake: Intake, body: CountTokensBody) -> ChatPrompt:
    request = intake.text.read(recipe.MessagesRequest, body.for_recipe())
    return intake.convert(request, call_required=body.call_required, schema=body.answer_schema)


def _checked(message: Json, where: str) -> Json:
    role = message.get("role")
    if role not in ("user", "assistant"):
        raise InvalidRequest(f"{where}.role must be user or assistant.", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        _check_blocks(content, role, f"{where}.content")
    elif not isinstance(content, str):
        raise InvalidRequest(
            f"{where}.content must be a string or an array of blocks, not {kind_of(content)}.",
            param=f"{where}.content",
        )
    return message


def _check_blocks(blocks: list[Any], holder: str, where: str) -> None:
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in BLOCKS[holder]:
            raise InvalidRequest(
                f"{where}[{i}] must be a block of type {' or '.join(BLOCKS[holder])}; images and documents are not "
                "supported.",
                param=f"{where}[{i}]",
            )
        if kind == "tool_result" and isinstance(block.get("content"), list):
            _check_blocks(block["content"], "tool_result", f"{where}[{i}].content")


class Message(Parsed):
    """An Answer of /v1/messages."""

    def __init__(self, header: Header, prompt: ChatPrompt, text: Text) -> None:
        super().__init__(
            header,
            prompt,
            text,
            recipe.MessagesRequest.chunk_generator(prompt.request, header.answer_id, header.model),
            recipe.MessagesResponse(header.answer_id, header.model, header.created, 0, 0),
        )

    def shape(self, chunk: Json) -> Json:
        if chunk["type"] == "message_start":
            self.shape_whole(chunk["message"])
        elif chunk["type"] == "message_delta":
            self.shape_whole(chunk)
        return chunk

    def shape_whole(self, body: Json) -> Json:
        body["usage"] |= _counts(self.usage())
        return body


def _counts(usage: Usage) -> Json:
    """As Anthropic counts: what came from the cache is not part of the input, and nothing is paid for writing it."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
