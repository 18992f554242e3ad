"""/v1/chat/completions: OpenAI's and DeepSeek's conversations, by deepseek-recipe both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import deepseek_recipe as recipe
from pydantic import Field, WithJsonSchema, model_validator

from router.answers import Header, Json, progress_chunk
from router.intake import Intake, Prepared
from router.protocols.parsed import Parsed
from router.schema import (
    MAX_TOP_LOGPROBS,
    TEXT,
    Choices,
    Effort,
    Label,
    an_object,
    characters,
    kind_of,
    only,
    parse_body,
    text_or,
)
from router.text import ChatPrompt, Text
from wire.errors import InvalidRequest

ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")

CALL = an_object(id=TEXT, type={"const": "function"}, function=an_object(name=TEXT, arguments=TEXT))
Message = Annotated[
    Json,
    WithJsonSchema(
        an_object(
            *("name", "tool_calls", "tool_call_id", "reasoning_content", "prefix"),
            role={"enum": [*ROLES]},
            content={"anyOf": [text_or(an_object(type={"const": "text"}, text=TEXT)), {"type": "null"}]},
            name=TEXT,
            reasoning_content=TEXT,
            tool_calls={"type": "array", "items": CALL},
            tool_call_id=TEXT,
            prefix={"type": "boolean"},
        )
    ),
]
FUNCTION = an_object(
    *("description", "parameters", "strict"),
    name=TEXT,
    description=TEXT,
    parameters={"type": "object"},
    strict={"type": "boolean"},
)
Tool = Annotated[Json, WithJsonSchema(an_object(type={"const": "function"}, function=FUNCTION))]
ToolChoice = Annotated[
    str | Json,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                an_object(type={"const": "function"}, function=an_object(name=TEXT)),
            ]
        }
    ),
]
ResponseFormat = Annotated[
    Json,
    WithJsonSchema(
        {
            "anyOf": [
                an_object(type={"enum": ["text", "json_object"]}),
                an_object(
                    type={"const": "json_schema"},
                    json_schema=an_object("strict", name=TEXT, schema={"type": "object"}, strict={"type": "boolean"}),
                ),
                an_object(type={"const": "regex"}, regex=TEXT),
            ]
        }
    ),
]
Thinking = Annotated[Json, WithJsonSchema(an_object(type={"enum": ["enabled", "disabled"]}))]

RECIPE_FIELDS = (
    *("model", "max_tokens", "temperature", "top_p", "stop", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "response_format", "thinking", "reasoning_effort"),
)


class ChatBody(Choices):
    """`messages`, tools and the like are checked by deepseek-recipe, which also renders them."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, gt=0, lt=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=512)
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[str] | None, *only(["text"])] = None
    verbosity: Label | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed with logprobs=true.", param="top_logprobs")
        return self

    def for_recipe(self) -> Json:
        """The body in the form deepseek-recipe reads: the fields it knows, nulls left out."""
        body = {name: value for name in RECIPE_FIELDS if (value := getattr(self, name)) is not None}
        body["messages"] = checked_messages(self.messages)
        if self.max_completion_tokens is not None:
            body["max_tokens"] = self.max_completion_tokens
        return body


def checked_messages(messages: list[Json]) -> list[Json]:
    """Messages whose roles and content are of known kinds; what they must hold besides, deepseek-recipe checks."""
    checked = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "developer":  # OpenAI's later name for the same role
            message = message | {"role": "system"}
        elif not isinstance(role, str) or role not in ROLES:
            raise InvalidRequest(f"messages[{i}].role must be one of {', '.join(ROLES)}.", param=f"messages[{i}].role")
        content = message.get("content")
        if isinstance(content, list):
            for j, part in enumerate(content):
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise InvalidRequest(
                        f"messages[{i}].content[{j}] must be a text part; images, audio and files are not supported.",
                        param=f"messages[{i}].content[{j}]",
                    )
        elif not isinstance(content, str) and not (content is None and role == "assistant"):
            raise InvalidRequest(
                f"messages[{i}].content must be a string or an array of text parts, not {kind_of(content)}.",
                param=f"messages[{i}].content",
            )
        checked.append(message)
    return checked


def prepare(intake: Intake, raw: bytes, context: int) -> Prepared:
    body = parse_body(ChatBody, raw)
    intake.check_model(body.model)
    intake.check_length(characters(body.messages), context)
    text = intake.text
    prompt = intake.convert(text.read(recipe.ChatCompletionRequest, body.for_recipe()))
    options = body.options(intake.facts.vocab_size, intake.answer_tokens(prompt, context))
    options["grammar"] = text.grammar_of(prompt, one_call=body.parallel_tool_calls is False)
    sampling = prompt.sampling(options, body.temperature, body.top_p, seed=body.seed)
    requests = intake.requests(prompt.ids, sampling, cache_salt=body.cache_salt, n=body.n)
    header = Header(
        created=intake.created,
        answer_id=f"chatcmpl-{requests[0].request_id}",
        model=body.model,
        prompt_ids=prompt.ids,
        return_token_ids=bool(body.return_token_ids),
    )
    return Prepared(
        choices=tuple((request, Chat(replace(header, choice=i), prompt, text)) for i, request in enumerate(requests)),
        stream=bool(body.stream),
        include_usage=body.include_usage,
        return_timeline=bool(body.return_timeline),
        priority=body.priority,
        progress=progress_chunk(header, "chat.completion.chunk") if body.return_progress else None,
    )


class Chat(Parsed):
    """An Answer of /v1/chat/completions."""

    def __init__(self, header: Header, prompt: ChatPrompt, text: Text) -> None:
        super().__init__(
            header,
            prompt,
            text,
            recipe.ChatCompletionRequest.chunk_generator(prompt.request, header.answer_id, header.model),
            recipe.ChatCompletionResponse(header.answer_id, header.model, header.created, 0, 0),
        )
        self._reported = 0  # tokens whose ids were sent
        self._opened = False

    def shape(self, chunk: Json) -> Json:
        header, (choice,) = self.header, chunk["choices"]
        chunk.pop("usage", None)  # sent when asked for, behind all choices
        chunk["created"] = header.created
        choice["index"] = header.choice
        if header.return_token_ids:
            if not self._opened:
                chunk["prompt_token_ids"] = list(header.prompt_ids)
            choice["token_ids"] = self.ids[self._reported :]
            self._reported = len(self.ids)
        self._opened = True
        return chunk

    def shape_whole(self, body: Json) -> Json:
        header, (choice,) = self.header, body["choices"]
        details = (body.get("usage") or {}).get("completion_tokens_details")
        body["usage"] = self.usage().to_json() | ({"completion_tokens_details": details} if details else {})
        choice["index"] = header.choice
        if header.return_token_ids:
            body["prompt_token_ids"] = list(header.prompt_ids)
            choice["token_ids"] = self.ids
        return body
