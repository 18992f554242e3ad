"""Answers to conversations: deepseek-recipe parses tokens into content, reasoning and tool calls as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

from router.answers import Header, Json, Usage
from router.text import ChatPrompt, Text, stage_of
from wire.types import FinishReason, TokenEvent

Whole = recipe.ChatCompletionResponse | recipe.ResponsesResponse | recipe.MessagesResponse


class Parsed:
    """An Answer in the form of one protocol: `generator` makes its chunks, `whole` adds them up.

    Tokens are counted here, as they come from the workers, and not by the parser, which never sees the last one.
    """

    def __init__(self, header: Header, prompt: ChatPrompt, text: Text, generator: Any, whole: Any) -> None:
        self.header = header
        self._eos = text.eos_token_ids
        self._logprobs = prompt.request.inference_options.logprobs
        self.stage = stage_of(prompt.parsing)
        self._processor = recipe.StreamProcessor(generator, prompt.parsing, text.tokenizer)
        self._whole = whole
        self._prompt_usage = Usage(prompt_tokens=len(prompt.ids), completion_tokens=0, cached_tokens=0)
        self.ids: list[int] = []
        self.num_tokens = 0
        self.stopped = False

    # What differs

    def shape(self, chunk: Json) -> Json:
        """A chunk as it is sent, from what the parser made of it."""
        return chunk

    def shape_whole(self, body: Json) -> Json:
        """The same for the whole answer."""
        return body

    # What does not

    def opening(self, usage: Usage) -> list[Json]:
        self._prompt_usage = usage
        return self._emit(self._processor.push(recipe.InferenceChunk.ready()))

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        chunks: list[Json] = []
        for token in tokens:
            self.ids.append(token.token_id)
            self.num_tokens += 1
            if token.token_id in self._eos:
                continue  # the parser would show its spelling
            logprobs = [(token.logprob, list(token.top))] if self._logprobs else None
            chunks += self._emit(self._processor.push(recipe.InferenceChunk.tokens([token.token_id], logprobs)))
            if self._processor.finished:
                self.stopped = True
                break
        return chunks

    def close(self, reason: FinishReason, usage: Usage) -> list[Json]:
        if self.stopped:
            return []  # the parser closed the answer with the stop string
        self._prompt_usage = usage
        ending = recipe.InferenceFinishReason.Length
        if reason is FinishReason.STOP:
            ending = recipe.InferenceFinishReason.Stop
        return self._emit(self._processor.push(recipe.InferenceChunk.finish(ending)) + self._processor.finish())

    def response(self, usage: Usage) -> Json:
        self._prompt_usage = usage
        return self.shape_whole(json.loads(self._whole.to_json()))

    def usage(self) -> Usage:
        """So far."""
        prompt = self._prompt_usage
        return Usage(
            prompt_tokens=prompt.prompt_tokens,
            completion_tokens=self.num_tokens,
            cached_tokens=prompt.cached_tokens,
        )

    def _emit(self, parsed: Sequence[Any]) -> list[Json]:
        chunks = []
        for chunk in parsed:
            data = json.loads(chunk.to_json())
            self._whole.accumulate(chunk)
            chunks.append(self.shape(data))
        return chunks
