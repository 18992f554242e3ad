"""/v1/responses: OpenAI's items, by deepseek-recipe both ways. Nothing is stored: each request brings all it needs."""

from __future__ import annotations

from typing import Annotated, Any

import deepseek_recipe as recipe
from pydantic import Field, WithJsonSchema

from router.answers import Header, Json
from router.intake import Intake, Prepared
from router.protocols.parsed import Parsed
from router.schema import (
    EFFORT,
    MAX_TOP_LOGPROBS,
    TEXT,
    Label,
    OpenAI,
    an_object,
    characters,
    kind_of,
    only,
    parse_body,
    text_or,
)
from router.text import ChatPrompt, Text
from wire.errors import InvalidRequest

RECIPE_FIELDS = (
    *("model", "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "user"),
    *("tools", "tool_choice", "text", "reasoning"),
)

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text")
ITEMS = (
    *("message", "reasoning", "function_call", "function_call_output"),
    *("custom_tool_call", "custom_tool_call_output"),
)
TOOLS = ("function", "custom", "namespace", "web_search", "web_search_2025_08_26")
"""What deepseek-recipe renders. A web search is declared by some clients always; the model never sees it."""
INCLUDABLE = ("reasoning.encrypted_content", "message.output_text.logprobs")


PART = an_object(type={"enum": [*TEXTS]}, text=TEXT)
Item = Annotated[
    Json,
    WithJsonSchema(
        {
            "anyOf": [
                an_object("type", type={"const": "message"}, role={"enum": [*ROLES]}, content=text_or(PART)),
                an_object(
                    *("id", "summary", "content"),
                    type={"const": "reasoning"},
                    id=TEXT,
                    summary={"type": "array"},
                    content={"type": "array", "items": an_object(type={"const": "reasoning_text"}, text=TEXT)},
                ),
                an_object(type={"const": "function_call"}, call_id=TEXT, name=TEXT, arguments=TEXT),
                an_object(type={"const": "function_call_output"}, call_id=TEXT, output=text_or(PART)),
                an_object(type={"const": "custom_tool_call"}, call_id=TEXT, name=TEXT, input=TEXT),
                an_object(type={"const": "custom_tool_call_output"}, call_id=TEXT, output=text_or(PART)),
            ]
        }
    ),
]
Tool = Annotated[
    Json,
    WithJsonSchema(
        an_object(
            *("name", "description", "parameters", "strict"),
            type={"enum": [*TOOLS]},
            name=TEXT,
            description=TEXT,
            parameters={"type": "object"},
            strict={"type": "boolean"},
        )
    ),
]
ToolChoice = Annotated[
    str | Json,
    WithJsonSchema(
        {"anyOf": [{"enum": ["none", "auto", "required"]}, an_object(type={"const": "function"}, name=TEXT)]}
    ),
]
Format = {
    "anyOf": [
        an_object(type={"enum": ["text", "json_object"]}),
        an_object("strict", type={"const": "json_schema"}, name=TEXT, schema={"type": "object"}, strict={}),
    ]
}
TextOptions = Annotated[Json, WithJsonSchema(an_object("format", "verbosity", format=Format, verbosity=TEXT))]
Reasoning = Annotated[
    Json, WithJsonSchema(an_object("effort", "summary", effort=EFFORT, summary={"type": ["string", "null"]}))
]


class ResponsesBody(OpenAI):
    """Everything in it that only a converter can check, deepseek-recipe checks."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, gt=0, lt=1 << 31)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=512)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = Field(default=None, max_length=16)

    previous_response_id: Annotated[str | None, *only(None)] = None
    conversation: Annotated[str | Json | None, *only(None)] = None
    prompt: Annotated[Json | None, *only(None)] = None
    background: Annotated[bool | None, *only(False)] = None
    truncation: Annotated[Label | None, *only("disabled")] = None
    max_tool_calls: int | None = Field(default=None, gt=0)  # of built-in tools, of which there are none

    def for_recipe(self) -> Json:
        """The body in the form deepseek-recipe reads: the fields it knows, nulls left out."""
        body = {name: value for name in RECIPE_FIELDS if (value := getattr(self, name)) is not None}
        body["input"] = self.input
        if isinstance(self.input, list):
            for i, item in enumerate(self.input):
                _check_item(item, f"input[{i}]")
        for i, tool in enumerate(self.tools or ()):
            if tool.get("type") not in TOOLS:
                raise InvalidRequest(
                    f"tools[{i}].type must be one of {', '.join(TOOLS)}; other tools do not run here.",
                    param=f"tools[{i}].type",
                )
        for i, what in enumerate(self.include or ()):
            if what not in INCLUDABLE:
                raise InvalidRequest(f"include[{i}] must be one of {', '.join(INCLUDABLE)}.", param=f"include[{i}]")
        return body


def prepare(intake: Intake, raw: bytes, context: int) -> Prepared:
    body = parse_body(ResponsesBody, raw)
    intake.check_model(body.model)
    intake.check_length(characters(body.input), context)
    text = intake.text
    request = text.read(recipe.ResponsesRequest, body.for_recipe())
    echo, names = request.echo(), text.namespaces(request)
    prompt = intake.convert(request)
    options = body.options(intake.facts.vocab_size, intake.answer_tokens(prompt, context))
    options["grammar"] = text.grammar_of(prompt, one_call=body.parallel_tool_calls is False)
    sampling = prompt.sampling(options, body.temperature, body.top_p, seed=body.seed)
    (relayed,) = intake.requests(prompt.ids, sampling, cache_salt=body.cache_salt)
    header = Header(
        created=intake.created, answer_id=f"resp_{relayed.request_id}", model=body.model, prompt_ids=prompt.ids
    )
    generator = recipe.ResponsesRequest.chunk_generator(prompt.request, header.answer_id, header.model)
    answer = ResponseItems(header, prompt, text, generator.with_namespace_tool_map(names).with_echo(echo), body)
    if intake.known is not None and body.instructions is not None:
        answer.asked["instructions"] = intake.known.instructions
    return Prepared(
        choices=((relayed, answer),),
        stream=bool(body.stream),
        return_timeline=bool(body.return_timeline),
        priority=body.priority,
    )


def _check_item(item: Json, where: str) -> None:
    kind = item.get("type", "message")
    if kind not in ITEMS:
        raise InvalidRequest(f"{where}.type must be one of {', '.join(ITEMS)}.", param=f"{where}.type")
    if kind == "message":
        role = item.get("role")
        if role not in ROLES:
            raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
        _check_texts(item.get("content"), f"{where}.content")
    elif kind.endswith("_output"):
        _check_texts(item.get("output"), f"{where}.output")


def _check_texts(content: Any, where: str) -> None:
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
                raise InvalidRequest(
                    f"{where}[{i}] must be a text part; images, audio and files are not supported.",
                    param=f"{where}[{i}]",
                )
    elif not isinstance(content, str):
        raise InvalidRequest(
            f"{where} must be a string or an array of text parts, not {kind_of(content)}.", param=where
        )


class ResponseItems(Parsed):
    """An Answer of /v1/responses."""

    def __init__(self, header: Header, prompt: ChatPrompt, text: Text, generator: Any, body: ResponsesBody) -> None:
        super().__init__(
            header,
            prompt,
            text,
            generator,
            recipe.ResponsesResponse(header.answer_id, header.model, header.created, 0, 0),
        )
        # What was asked, where deepseek-recipe reports what it takes for granted.
        self.asked: Json = {"created_at": header.created, "metadata": body.metadata or {}}
        if body.parallel_tool_calls is not None:
            self.asked["parallel_tool_calls"] = body.parallel_tool_calls

    def shape(self, chunk: Json) -> Json:
        if "response" in chunk:
            self.shape_whole(chunk["response"])
        return chunk

    def shape_whole(self, body: Json) -> Json:
        body |= self.asked
        if (parsed := body.get("usage")) is not None:
            usage = self.usage()
            body["usage"] = parsed | {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        return body
