"""/v1/completions: text or token ids in, exactly the text of the tokens out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from router.answers import Header, Json, Usage, progress_chunk
from router.intake import Intake, Prepared, fit
from router.schema import MAX_TOP_LOGPROBS, Choices, only, parse_body, token_ids
from router.text import Vocabulary, draw_seed
from wire.errors import InvalidRequest
from wire.types import FinishReason, PromptScores, SamplingParams, TokenEvent

MAX_SCORED_TOKENS = 4096
"""The longest prompt whose log probabilities are told: with 20 alternatives each they are many times its size."""

DEFAULT_MAX_TOKENS = 16
"""What OpenAI generates for a completion that does not say."""


Prompt = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]}
    ),
]


class CompletionBody(Choices):
    prompt: Prompt  # `one_prompt` checks it: a million ids are too many for a model's field
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool = True
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: Annotated[int | None, *only(1)] = None
    suffix: Annotated[str | None, *only("")] = None


def one_prompt(value: Any, vocab_size: int) -> str | tuple[int, ...]:
    """A completion's `prompt` as text or as token ids. Several prompts in one request are not supported."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        if not value:
            raise InvalidRequest(
                "The prompt is empty. Send at least one character.", param="prompt", code="empty_prompt"
            )
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(part, str | list) for part in value[:2]):
        raise InvalidRequest(
            f"prompt holds {len(value)} prompts; one request takes one. Send one request for each.",
            param="prompt",
            code="unsupported_parameter",
        )
    return token_ids(value, vocab_size, param="prompt")


def prepare(intake: Intake, raw: bytes, context: int) -> Prepared:
    body = parse_body(CompletionBody, raw)
    intake.check_model(body.model)
    vocab_size, text = intake.facts.vocab_size, intake.text
    prompt: str | Sequence[int] = one_prompt(body.prompt, vocab_size)
    if intake.known is not None:
        prompt = intake.known.prompt
    elif isinstance(prompt, str):
        intake.check_length(len(prompt), context)
        prompt = tuple(text.encode(prompt, add_special_tokens=body.add_special_tokens))
    max_tokens = fit(len(prompt), body.max_tokens, context, default=DEFAULT_MAX_TOKENS)
    # Echoed tokens are told like the answer's own.
    asked = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    if asked is not None and len(prompt) > MAX_SCORED_TOKENS:
        raise InvalidRequest(
            f"Log probabilities are told of prompts of at most {MAX_SCORED_TOKENS} tokens, and this one has "
            f"{len(prompt)}. Shorten it, or leave out prompt_logprobs, and echo with logprobs.",
            param="prompt_logprobs" if body.prompt_logprobs is not None else "echo",
        )
    sampling = SamplingParams(
        **body.options(vocab_size, max_tokens),
        seed=draw_seed() if body.seed is None else body.seed,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=asked,
    )
    tell_prompt = body.prompt_logprobs is not None
    said = ""
    if body.echo:
        said = intake.known.said if intake.known is not None else text.decode(prompt, skip_special_tokens=True)
    requests = intake.requests(prompt, sampling, cache_salt=body.cache_salt, n=body.n)
    header = Header(
        created=intake.created,
        answer_id=f"cmpl-{requests[0].request_id}",
        model=body.model,
        prompt_ids=prompt,
        return_token_ids=bool(body.return_token_ids),
    )
    return Prepared(
        choices=tuple(
            (
                request,
                Completion(
                    replace(header, choice=i),
                    sampling,
                    body.stop or (),
                    text.vocabulary,
                    said=said if body.echo else None,
                    tell_prompt=tell_prompt,
                ),
            )
            for i, request in enumerate(requests)
        ),
        stream=bool(body.stream),
        include_usage=body.include_usage,
        return_timeline=bool(body.return_timeline),
        priority=body.priority,
        progress=progress_chunk(header, "text_completion") if body.return_progress else None,
    )


class StopStrings:
    """Holds text back for as long as it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string matched); the match itself and what follows is dropped."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain, False

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Completion:
    """An Answer of /v1/completions: exactly the text of the tokens, special tokens left out."""

    def __init__(
        self,
        header: Header,
        sampling: SamplingParams,
        stop: Sequence[str],
        vocabulary: Vocabulary,
        *,
        said: str | None = None,
        tell_prompt: bool = False,
    ) -> None:
        """The answer begins with `said`, if it is to repeat its prompt; `tell_prompt` tells the prompt's log
        probabilities beside it.
        """
        self._header = header
        self.said = said
        self._tell_prompt = tell_prompt
        self._prompt_scores: PromptScores | None = None
        self._logprobs = sampling.logprobs
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = StopStrings(stop)
        self._parts: list[str] = []
        self._tokens: list[TokenEvent] = []
        self._sent = 0  # tokens that chunks already reported
        self._reason: FinishReason | None = None
        self._name_offset = 0
        self.num_tokens = 0
        self.stopped = False

    def opening(self, usage: Usage) -> list[Json]:
        return []

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        certain = ""
        if not self._tokens and tokens:
            self._prompt_scores = tokens[0].prompt
            certain = self.said or ""
        for token in tokens:
            self._tokens.append(token)
            raw = b"" if self._is_special(token.token_id) else self._vocabulary.bytes_of(token.token_id)
            text, self.stopped = self._stop.push(self._decoder.decode(raw))
            certain += text
            if self.stopped:
                break
        self.num_tokens = len(self._tokens)
        if not certain and not self._header.return_token_ids and not self._logprobs:
            return []
        return [self._chunk(certain)]

    def _is_special(self, token_id: int) -> bool:
        return token_id in self._vocabulary.specials

    def close(self, reason: FinishReason, usage: Usage) -> list[Json]:
        rest = ""
        if not self.stopped:
            text, self.stopped = self._stop.push(self._decoder.decode(b"", final=True))
            rest = text + self._stop.rest()
        self._reason = FinishReason.STOP if self.stopped else reason
        return [self._chunk(rest)]

    def response(self, usage: Usage) -> Json:
        self._sent = self._name_offset = 0
        choice = self._choice("".join(self._parts))
        return self._envelope([choice]) | {"usage": usage.to_json()}

    def _chunk(self, text: str) -> Json:
        self._parts.append(text)
        return self._envelope([self._choice(text)])

    def _choice(self, text: str) -> Json:
        first, self._sent = self._sent, len(self._tokens)
        choice: Json = {
            "index": self._header.choice,
            "text": text,
            "logprobs": self._logprobs_of(first) if self._logprobs else None,
            "finish_reason": self._reason,
        }
        if self._tell_prompt and first == 0 and self._tokens:
            choice["prompt_logprobs"] = self._of_prompt()
        if self._header.return_token_ids:
            choice["token_ids"] = [token.token_id for token in self._tokens[first:]]
            if first == 0:
                choice["prompt_token_ids"] = list(self._header.prompt_ids)
        return choice

    def _prompt_tokens(self) -> list[TokenEvent]:
        """The prompt's tokens from the second on, told like the answer's. Nothing comes before the first."""
        scores, ids = self._prompt_scores, self._header.prompt_ids
        if scores is None or len(scores.logprobs) != len(ids) - 1:
            return []
        return [
            TokenEvent(index=0, token_id=token_id, logprob=scores.logprobs[n], top=scores.top(n))
            for n, token_id in enumerate(ids[1:])
        ]

    def _of_prompt(self) -> list[Json | None]:
        """For each token of the prompt its log probability and those of the alternatives, by id; null for the first."""
        told: list[Json | None] = [None]
        for token in self._prompt_tokens():
            entries = dict(token.top) | {token.token_id: token.logprob}
            told.append(
                {
                    str(token_id): {"logprob": logprob, "decoded_token": self._vocabulary.name_of(token_id)}
                    for token_id, logprob in entries.items()
                }
            )
        return told

    def _logprobs_of(self, first: int) -> Json:
        tokens = self._tokens[first:]
        begin = []
        if self.said is not None and first == 0 and tokens:
            begin = [self._header.prompt_ids[0]]
            tokens = [*self._prompt_tokens(), *tokens]
        names = [self._vocabulary.name_of(token_id) for token_id in (*begin, *(token.token_id for token in tokens))]
        offsets = []
        for name in names:
            offsets.append(self._name_offset)
            self._name_offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [*(None for _ in begin), *(token.logprob for token in tokens)],
            "top_logprobs": [*(None for _ in begin), *(self._top(token) for token in tokens)],
            "text_offset": offsets,
        }

    def _top(self, token: TokenEvent) -> dict[str, float]:
        # Two ids may share a name (ids that stand for nothing); the likelier one keeps it.
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(self._vocabulary.name_of(token_id), logprob)
        return top

    def _envelope(self, choices: list[Json]) -> Json:
        return {
            "id": self._header.answer_id,
            "object": "text_completion",
            "created": self._header.created,
            "model": self._header.model,
            "choices": choices,
        }
