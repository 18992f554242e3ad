"""Text stops here: prompts become token ids, token ids become text again.

Conversations go through deepseek-recipe, which renders and encodes them; plain text is encoded by the same tokenizer.
How ids become an answer again, each protocol knows (`router/protocols`). Everything here is synchronous and may take
seconds on long input: call it on a thread.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import deepseek_recipe as recipe

from router.config import ModelFacts
from router.grammar import GrammarChecker, grammar_of
from wire.errors import ConfigError, InvalidRequest
from wire.types import SamplingParams

Json = dict[str, Any]

ProtocolRequest = recipe.ChatCompletionRequest | recipe.ResponsesRequest | recipe.MessagesRequest
R = TypeVar("R", recipe.ChatCompletionRequest, recipe.ResponsesRequest, recipe.MessagesRequest)

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
        self.longest_bytes = max(map(len, self._bytes.values()), default=1)
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

    def __init__(
        self,
        directory: Path,
        facts: ModelFacts,
        model_names: Sequence[str],
        *,
        thinking: bool,
        check_grammars: bool = True,
    ) -> None:
        """Without `check_grammars`, somebody else finds out whether a grammar compiles.

        Raises ConfigError naming the file and what is missing from it."""
        path = directory / "tokenizer.json"
        try:
            raw = path.read_text(encoding="utf-8")
            self.vocabulary = Vocabulary(path, json.loads(raw), facts)
            self.tokenizer = recipe.Tokenizer.from_str(raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{path} is not a usable tokenizer ({type(error).__name__}: {error}). Restore the checkpoint's file."
            ) from error
        self._facts = facts
        self.eos_token_ids = frozenset(facts.eos_token_ids)
        self._checker = GrammarChecker(directory, facts.vocab_size, facts.eos_token_ids) if check_grammars else None
        self._check_specials(path)
        self._bos = self.vocabulary.added[recipe.SpecialToken.Bos.default_str()]
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(self.tokenizer)
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
            if self.tokenizer.encode(spelling) != [declared]:
                raise ConfigError(
                    f"{path} declares {spelling} as id {declared}, but the tokenizer encodes it as "
                    f"{self.tokenizer.encode(spelling)}: an added token before it is missing. Restore the file."
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
        ids = self.tokenizer.encode(text)
        if add_special_tokens and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        return ids

    def read(self, kind: type[R], body: Json) -> R:
        """A body as deepseek-recipe understands its protocol. Raises InvalidRequest with what it says is wrong."""
        try:
            return kind(body)
        except (ValueError, OverflowError) as error:  # the latter of an integer beyond 64 bits
            reason = str(error).removeprefix("invalid request body: ")
            raise InvalidRequest(f"The conversation can not be read: {reason}.") from error

    def namespaces(self, request: recipe.ResponsesRequest) -> dict[str, tuple[str, str]]:
        """Functions of tools that are declared in groups, as the model knows them -> (group, name)."""
        try:
            return request.namespace_tool_map(self._options)
        except recipe.ConversionError as error:
            raise InvalidRequest(_conversion_message(error)) from error

    def convert(
        self, request: ProtocolRequest, *, call_required: bool = False, schema: Json | None = None
    ) -> ChatPrompt:
        """A conversation in ids. User text that spells a special token stays text.

        `call_required` and `schema` demand of the answer what its protocol has words for and deepseek-recipe passes
        over. Raises InvalidRequest with what it says is wrong.
        """
        try:
            converted = request.convert(self._options)
            conversation, parsing = converted.conversation, converted.parsing_options
            constraint = converted.inference_options.output_constraint
            demand = None if constraint is None else (constraint.kind, constraint.schema)
            if call_required or schema is not None:
                if call_required and conversation.thinking_mode:
                    raise InvalidRequest("Thinking mode does not support this tool_choice.", param="tool_choice")
                conversation = recipe.Conversation(
                    conversation.messages,
                    thinking_mode=conversation.thinking_mode,
                    tools=conversation.tools,
                    tool_choice="required" if call_required else conversation.tool_choice,
                    reasoning_effort=conversation.reasoning_effort,
                    response_schema=schema,
                )
                if call_required:
                    parsing.starts_in_tool_calls = True
                    demand = None if demand is None else ("tool_call_required", demand[1])
                elif demand is None:
                    demand = ("json", json.dumps(schema))
            return ChatPrompt(
                ids=self._encoding.encode(conversation), request=converted, parsing=parsing, demand=demand
            )
        except recipe.ConversionError as error:
            raise InvalidRequest(_conversion_message(error)) from error
        except ValueError as error:
            raise InvalidRequest(f"The conversation can not be read: {error}.") from error

    def grammar_of(self, prompt: ChatPrompt, *, one_call: bool = False) -> str:
        """The grammar its answer must follow, known to compile; empty when it may be anything.

        Raises InvalidRequest with the reason for one that can not be followed.
        """
        if prompt.demand is None:
            return ""
        kind, source = prompt.demand
        thinking = prompt.ids[-1] == self.vocabulary.added[recipe.SpecialToken.ThinkingStart.default_str()]
        end = self.vocabulary.added[recipe.SpecialToken.ThinkingEnd.default_str()] if thinking else None
        try:
            grammar = grammar_of(kind, source, thinking_end=end, one_call=one_call)
            if self._checker is not None:
                self._checker.check(grammar)
        except InvalidRequest as error:
            what = "tools" if kind.startswith("tool") else "response_format"
            raise InvalidRequest(f"{what} can not be followed: {error}.", param=what, code="invalid_grammar") from error
        return grammar

    def close(self) -> None:
        if self._checker is not None:
            self._checker.close()

    # Ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        skipped = self.vocabulary.specials if skip_special_tokens else frozenset[int]()
        raw = b"".join(self.vocabulary.bytes_of(token_id) for token_id in ids if token_id not in skipped)
        return raw.decode(errors="replace")


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
        message = str(json.loads(error.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = str(error)
    return message if message.endswith(".") else f"{message}."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation as the model gets it, and how to read what it says."""

    ids: Sequence[int] = field(repr=False)
    request: recipe.ConversationRequest = field(repr=False)
    parsing: recipe.ParsingOptions = field(repr=False)
    demand: tuple[str, str] | None = field(repr=False)  # kind and source of what the answer must follow

    def max_tokens(self, context: int) -> int:
        """What the client asked for, else deepseek-recipe's default, within a context that holds the prompt."""
        asked = self.request.inference_options.max_tokens
        return asked if asked is not None else self.request.resolve_max_tokens(len(self.ids), context)

    def sampling(
        self, shared: Json, temperature: float | None, top_p: float | None, *, seed: int | None
    ) -> SamplingParams:
        """`shared`: the fields that all protocols take as they are; then what the client asked for."""
        options = self.request.inference_options
        return SamplingParams(
            **shared,
            seed=draw_seed() if seed is None else seed,
            temperature=_resolved(options.temperature, temperature),
            top_p=_resolved(options.top_p, top_p),
            logprobs=options.logprobs,
            top_logprobs=options.top_logprobs or 0,
        )


STAGES = {
    "": None,
    "reasoning": recipe.ThinkingInitialStage.ReasoningStart,
    "more reasoning": recipe.ThinkingInitialStage.ReasoningContinuation,
    "more content": recipe.ThinkingInitialStage.ContentContinuation,
}
"""Where reading an answer begins, which is all that it takes from the conversation before it."""


def stage_of(parsing: recipe.ParsingOptions) -> str:
    return next(name for name, stage in STAGES.items() if stage == parsing.thinking_initial_stage)


def with_stage(parsing: recipe.ParsingOptions, stage: str) -> recipe.ParsingOptions:
    parsing.thinking_initial_stage = STAGES[stage]
    return parsing


def _resolved(value: float | None, asked: float | None) -> float:
    """deepseek-recipe's decision. It keeps 32 bits of a number; where it left the client's as it was, all are kept."""
    if value is None:
        return 1.0
    return asked if asked is not None and abs(asked - value) < 1e-6 else value


def draw_seed() -> int:
    return secrets.randbits(63)
