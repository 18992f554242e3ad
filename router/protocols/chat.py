"""/v1/chat/completions: OpenAI's and DeepSeek's conversations, by deepseek-recipe both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import deepseek_recipe as recipe
from pydantic import Field, model_validator

from router.answers import Header, Json, Usage
from router.intake import Intake, Prepared
from router.schema import MAX_TOP_LOGPROBS, Generating, kind_of, parse_body
from router.text import ChatPrompt, Text
from wire.errors import InvalidRequest
from wire.types import FinishReason, TokenEvent

ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")

RECIPE_FIELDS = (
    *("model", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "response_format", "thinking", "reasoning_effort"),
)


class ChatBody(Generating):
    """`messages`, tools and the like are checked by deepseek-recipe, which also renders them."""

    messages: list[Json] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, gt=0, lt=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Json] | None = Field(default=None, max_length=512)
    tool_choice: str | Json | None = None
    response_format: Json | None = None
    thinking: Json | None = None
    reasoning_effort: str | None = None

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
    prompt = intake.text.convert_chat(body.for_recipe())
    options = body.options(intake.facts.vocab_size, intake.answer_tokens(prompt, context))
    options["grammar"] = intake.text.grammar_of(prompt)
    sampling = prompt.sampling(options, body.temperature, body.top_p)
    requests = intake.requests(tuple(prompt.ids), sampling, cache_salt=body.cache_salt, n=body.n)
    header = Header(
        answer_id=f"chatcmpl-{requests[0].request_id}",
        model=body.model,
        prompt_ids=prompt.ids,
        return_token_ids=bool(body.return_token_ids),
    )
    return Prepared(
        choices=tuple(
            (request, Chat(replace(header, choice=i), prompt, intake.text)) for i, request in enumerate(requests)
        ),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


class Chat:
    """An Answer of /v1/chat/completions, parsed by deepseek-recipe."""

    def __init__(self, header: Header, prompt: ChatPrompt, text: Text) -> None:
        request = prompt.request
        self._header = header
        self._eos = text.eos_token_ids
        self._logprobs = request.inference_options.logprobs
        generator = recipe.ChatCompletionRequest.chunk_generator(request, header.answer_id, header.model)
        self._processor = recipe.StreamProcessor(generator, request.parsing_options, text.tokenizer)
        self._whole = recipe.ChatCompletionResponse(header.answer_id, header.model, header.created, 0, 0)
        self._ids: list[int] = []
        self._reported = 0
        self.num_tokens = 0
        self.stopped = False

    def opening(self) -> list[Json]:
        chunks = self._emit(self._processor.push(recipe.InferenceChunk.ready()))
        if self._header.return_token_ids and chunks:
            chunks[0]["prompt_token_ids"] = self._header.prompt_ids
        return chunks

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        chunks: list[Json] = []
        for token in tokens:
            self._ids.append(token.token_id)
            if token.token_id in self._eos:
                continue  # the parser would show its spelling
            logprobs = [(token.logprob, list(token.top))] if self._logprobs else None
            chunks += self._emit(self._processor.push(recipe.InferenceChunk.tokens([token.token_id], logprobs)))
            if self._processor.finished:
                self.stopped = True
                break
        self.num_tokens = len(self._ids)
        return chunks

    def close(self, reason: FinishReason, usage: Usage) -> list[Json]:
        if self.stopped:
            return []  # the parser closed the answer with the stop string
        ending = recipe.InferenceFinishReason.Length
        if reason is FinishReason.STOP:
            ending = recipe.InferenceFinishReason.Stop
        chunks = self._processor.push(recipe.InferenceChunk.finish(ending)) + self._processor.finish()
        return self._emit(chunks)

    def response(self, usage: Usage) -> Json:
        body: Json = json.loads(self._whole.to_json())
        parsed = body.get("usage") or {}
        body["usage"] = usage.to_json()
        if details := parsed.get("completion_tokens_details"):
            body["usage"]["completion_tokens_details"] = details
        body["choices"][0]["index"] = self._header.choice
        if self._header.return_token_ids:
            body["prompt_token_ids"] = self._header.prompt_ids
            body["choices"][0]["token_ids"] = self._ids
        return body

    def _emit(self, parsed: Sequence[Any]) -> list[Json]:
        chunks = []
        for chunk in parsed:
            data: Json = json.loads(chunk.to_json())
            self._whole.accumulate(chunk)
            # Usage is counted from the workers' tokens, not from what was parsed, and sent when asked for.
            data.pop("usage", None)
            data["created"] = self._header.created
            data["choices"][0]["index"] = self._header.choice
            if self._header.return_token_ids:
                data["choices"][0]["token_ids"] = self._ids[self._reported :]
                self._reported = len(self._ids)
            chunks.append(data)
        return chunks
