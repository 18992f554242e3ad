"""/tokenize and /detokenize: what a prompt is in ids, and what ids are in text."""

from __future__ import annotations

from collections.abc import Sequence

import deepseek_recipe as recipe
from pydantic import Field, model_validator

from router.answers import Json
from router.intake import Intake
from router.protocols.chat import Message, Tool, checked_messages
from router.schema import Strict, TokenIds, parse_body, token_ids


class TokenizeBody(Strict):
    """Text, or a conversation as /v1/chat/completions would render it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=10_000)
    tools: list[Tool] | None = Field(default=None, max_length=512)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def for_recipe(self, model: str) -> Json:
        body: Json = {"model": model, "messages": checked_messages(self.messages or [])}
        return body | ({"tools": self.tools} if self.tools else {})


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


def tokenize(intake: Intake, raw: bytes, context: int) -> Json:
    body = parse_body(TokenizeBody, raw)
    intake.check_model(body.model)
    if body.prompt is not None:
        ids: Sequence[int] = intake.text.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        request = intake.text.read(recipe.ChatCompletionRequest, body.for_recipe(intake.model_names[0]))
        ids = intake.text.convert(request).ids
    return {"count": len(ids), "max_model_len": context, "tokens": ids}


def detokenize(intake: Intake, raw: bytes, context: int) -> Json:
    body = parse_body(DetokenizeBody, raw)
    intake.check_model(body.model)
    ids = token_ids(body.tokens, intake.facts.vocab_size, param="tokens") if body.tokens != [] else ()
    return {"prompt": intake.text.decode(ids, skip_special_tokens=body.skip_special_tokens)}
