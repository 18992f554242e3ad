"""Text stops here: prompts become token ids, token ids become text again.

Chat goes through deepseek-recipe both ways; it renders and encodes the conversation and parses what comes back
into content, reasoning and tool calls. Completions are plain text: encoded by the same tokenizer, decoded byte by
byte. Everything here is synchronous and may take seconds on long input: call it on a thread.
"""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import deepseek_recipe as recipe

from router.config import ModelFacts
from router.grammar import GrammarChecker, grammar_of
from wire.errors import ConfigError, InvalidRequest
from wire.types import FinishReason, SamplingParams, TokenEvent

Json = dict[str, Any]

NEEDED_SPECIALS = (
    recipe.SpecialToken.Bos,
    recipe.SpecialToken.Eos,
    recipe.SpecialToken.User,
    recipe.SpecialToken.Assistant,
    recipe.SpecialToken.ThinkingStart,
    recipe.SpecialToken.ThinkingEnd,
    recipe.SpecialToken.LatestReminder,
    recipe.SpecialToken.Dsml,
)
"""Tokens a V4 prompt may use. A tokenizer without one would fail, or shift ids, only in the middle of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


class Answer(Protocol):
    """One answer on its way to the client: fed with tokens, read as streamed chunks or as one response."""

    num_tokens: int  # tokens the answer counts; a stop string may leave later ones out
    stopped: bool  # a stop string matched: no further token is wanted

    def opening(self) -> list[Json]:
        """Chunks to send before the first token."""

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        """Chunks that became certain with these tokens. Never called again after `stopped`."""

    def close(self, reason: FinishReason, usage: Usage) -> list[Json]:
        """The last chunks, finish reason included, usage not."""

    def response(self, usage: Usage) -> Json:
        """The whole answer as one body; after `close`."""


class Vocabulary:
    """What each token id stands for, straight from tokenizer.json: ids that stand for nothing decode to nothing."""

    def __init__(self, path: Path, data: Json, facts: ModelFacts) -> None:
        decoder = data.get("decoder") or {}
        parts = decoder.get("decoders") or [decoder]
        if not any(part.get("type") == "ByteLevel" for part in parts):
            raise ConfigError(
                f"{path}: the decoder is {decoder.get('type')!r}, expected ByteLevel, which is what DeepSeek-V4's "
                "tokenizer has. Restore the checkpoint's tokenizer.json."
            )
        plain: dict[str, int] = data["model"]["vocab"]
        added: dict[str, int] = {token["content"]: token["id"] for token in data.get("added_tokens", ())}
        highest = max([*plain.values(), *added.values()], default=-1)
        if highest >= facts.vocab_size:
            raise ConfigError(
                f"{path} holds token id {highest}, but config.json says vocab_size={facts.vocab_size}. The files are "
                "of different checkpoints; take both from one."
            )
        byte_of = {char: byte for byte, char in _byte_alphabet()}
        self._bytes: dict[int, bytes] = {
            token_id: bytes(byte_of[char] for char in text)
            for text, token_id in plain.items()
            if all(char in byte_of for char in text)
        }
        self._bytes |= {token_id: text.encode() for text, token_id in added.items()}
        self.added = added
        self.specials = frozenset(token["id"] for token in data.get("added_tokens", ()) if token.get("special"))

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def name_of(self, token_id: int) -> str:
        r"""How logprobs show a token: its text, or `\xNN` for each byte where it is only part of a character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in raw)


class Text:
    """The model's text: one tokenizer, checked at start, shared by every request. `close` ends its child process."""

    def __init__(self, directory: Path, facts: ModelFacts, model_names: Sequence[str], *, thinking: bool) -> None:
        """Raises ConfigError naming the file and what is missing from it."""
        path = directory / "tokenizer.json"
        try:
            raw = path.read_text(encoding="utf-8")
            self.vocabulary = Vocabulary(path, json.loads(raw), facts)
            self._tokenizer = recipe.Tokenizer.from_str(raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{path} is not a usable tokenizer ({type(error).__name__}: {error}). Restore the checkpoint's file."
            ) from error
        self._facts = facts
        self._checker = GrammarChecker(directory, facts.vocab_size, facts.eos_token_ids)
        self._check_specials(path)
        self._bos = self.vocabulary.added[recipe.SpecialToken.Bos.default_str()]
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(self._tokenizer)
        self._options = recipe.ConversionOptions(
            default_thinking_mode=thinking,
            thinking_max_tokens_upper_bound=max(1, facts.max_context),
            non_thinking_max_tokens_upper_bound=max(1, facts.max_context),
        ).with_model_versions_by_name({name: recipe.ModelVersion.DeepseekV4Pro for name in model_names})

    def _check_specials(self, path: Path) -> None:
        for special in NEEDED_SPECIALS:
            spelling = special.default_str()
            declared = self.vocabulary.added.get(spelling)
            if declared is None:
                raise ConfigError(f"{path} lacks the token {spelling}. Restore the checkpoint's tokenizer.json.")
            # The library numbers added tokens by their order and ignores a declared id that disagrees.
            if self._tokenizer.encode(spelling) != [declared]:
                raise ConfigError(
                    f"{path} declares {spelling} as id {declared}, but the tokenizer encodes it as "
                    f"{self._tokenizer.encode(spelling)}: an added token before it is missing. Restore the file."
                )
        eos = self.vocabulary.added[recipe.SpecialToken.Eos.default_str()]
        if eos not in self._facts.eos_token_ids:
            raise ConfigError(
                f"{path} has the end-of-sentence token at id {eos}, config.json says "
                f"{list(self._facts.eos_token_ids)}. The files are of different checkpoints; take both from one."
            )

    # Text to ids

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Plain text to ids. Spelled-out special tokens count as such; `add_special_tokens` puts BOS in front."""
        ids = self._tokenizer.encode(text)
        if add_special_tokens and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        return ids

    def convert_chat(self, body: Json) -> ChatPrompt:
        """An OpenAI or DeepSeek chat body to ids. User text that spells a special token stays text.

        Raises InvalidRequest with what deepseek-recipe says is wrong.
        """
        try:
            request = recipe.ChatCompletionRequest(body).convert(self._options)
            return ChatPrompt(ids=self._encoding.encode(request.conversation), request=request)
        except recipe.ConversionError as error:
            raise InvalidRequest(_conversion_message(error)) from error
        except ValueError as error:
            reason = str(error).removeprefix("invalid request body: ")
            raise InvalidRequest(f"The conversation can not be read: {reason}.") from error

    def grammar_of(self, prompt: ChatPrompt) -> str:
        """The grammar its answer must follow, known to compile; empty when it may be anything.

        Raises InvalidRequest with the reason for one that can not be followed.
        """
        constraint = prompt.request.inference_options.output_constraint
        if constraint is None:
            return ""
        thinking = prompt.ids[-1] == self.vocabulary.added[recipe.SpecialToken.ThinkingStart.default_str()]
        end = self.vocabulary.added[recipe.SpecialToken.ThinkingEnd.default_str()] if thinking else None
        try:
            grammar = grammar_of(constraint.kind, constraint.schema, thinking_end=end)
            self._checker.check(grammar)
        except InvalidRequest as error:
            what = "tools" if constraint.kind.startswith("tool") else "response_format"
            raise InvalidRequest(f"{what} can not be followed: {error}.", param=what, code="invalid_grammar") from error
        return grammar

    def close(self) -> None:
        self._checker.close()

    # Ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        skipped = self.vocabulary.specials if skip_special_tokens else frozenset[int]()
        raw = b"".join(self.vocabulary.bytes_of(token_id) for token_id in ids if token_id not in skipped)
        return raw.decode(errors="replace")

    def completion(self, header: Header, sampling: SamplingParams, stop: Sequence[str]) -> Completion:
        return Completion(header, sampling, stop, self.vocabulary)

    def chat(self, header: Header, prompt: ChatPrompt) -> Chat:
        return Chat(header, prompt, self._tokenizer, self._facts.eos_token_ids)


def _byte_alphabet() -> Iterator[tuple[int, str]]:
    """GPT-2's: every byte as one printable character."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = 256
    for byte in range(256):
        if byte in printable:
            yield byte, chr(byte)
        else:
            yield byte, chr(spare)
            spare += 1


def _conversion_message(error: recipe.ConversionError) -> str:
    try:
        return str(json.loads(error.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    ids: list[int] = field(repr=False)
    request: recipe.ConversationRequest = field(repr=False)

    def max_tokens(self, context: int) -> int:
        """What the client asked for, else deepseek-recipe's default, within a context that holds the prompt."""
        asked = self.request.inference_options.max_tokens
        return asked if asked is not None else self.request.resolve_max_tokens(len(self.ids), context)

    def sampling(self, shared: Json, temperature: float | None, top_p: float | None) -> SamplingParams:
        """`shared`: the fields that both generating routes take as they are; then what the client asked for."""
        options = self.request.inference_options
        return SamplingParams(
            **shared,
            seed=draw_seed() if options.seed is None else options.seed,
            temperature=_resolved(options.temperature, temperature),
            top_p=_resolved(options.top_p, top_p),
            logprobs=options.logprobs,
            top_logprobs=options.top_logprobs or 0,
        )


def _resolved(value: float | None, asked: float | None) -> float:
    """deepseek-recipe's decision. It keeps 32 bits of a number; where it left the client's as it was, all are kept."""
    if value is None:
        return 1.0
    return asked if asked is not None and abs(asked - value) < 1e-6 else value


def draw_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every chunk of one answer repeats."""

    answer_id: str
    model: str
    prompt_ids: Sequence[int] = field(repr=False)
    return_token_ids: bool = False
    choice: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class StopStrings:
    """Holds text back for as long as it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string matched); the match itself and what follows is dropped."""
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

    def __init__(self, header: Header, sampling: SamplingParams, stop: Sequence[str], vocabulary: Vocabulary) -> None:
        self._header = header
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

    def opening(self) -> list[Json]:
        return []

    def push(self, tokens: Sequence[TokenEvent]) -> list[Json]:
        certain = ""
        for token in tokens:
            self._tokens.append(token)
            raw = b"" if token.token_id in self._vocabulary.specials else self._vocabulary.bytes_of(token.token_id)
            text, self.stopped = self._stop.push(self._decoder.decode(raw))
            certain += text
            if self.stopped:
                break
        self.num_tokens = len(self._tokens)
        if not certain and not self._header.return_token_ids and not self._logprobs:
            return []
        return [self._chunk(certain)]

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
            "logprobs": self._logprobs_of(self._tokens[first:]) if self._logprobs else None,
            "finish_reason": self._reason,
        }
        if self._header.return_token_ids:
            choice["token_ids"] = [token.token_id for token in self._tokens[first:]]
            if first == 0:
                choice["prompt_token_ids"] = self._header.prompt_ids
        return choice

    def _logprobs_of(self, tokens: Sequence[TokenEvent]) -> Json:
        names = [self._vocabulary.name_of(token.token_id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._name_offset)
            self._name_offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
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


class Chat:
    """An Answer of /v1/chat/completions, parsed by deepseek-recipe."""

    def __init__(
        self, header: Header, prompt: ChatPrompt, tokenizer: recipe.Tokenizer, eos_token_ids: Sequence[int]
    ) -> None:
        request = prompt.request
        self._header = header
        self._eos = frozenset(eos_token_ids)
        self._logprobs = request.inference_options.logprobs
        generator = recipe.ChatCompletionRequest.chunk_generator(request, header.answer_id, header.model)
        self._processor = recipe.StreamProcessor(generator, request.parsing_options, tokenizer)
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
