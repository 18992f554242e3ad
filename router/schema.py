"""Bodies as clients send them: strict JSON, then one model per route. Whatever is wrong becomes an InvalidRequest."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wire.errors import InvalidRequest

MAX_DEPTH = 64
MAX_KEYS = 100_000
MAX_NUMBER_CHARS = 400
"""The longest decimal form of a double has 309 digits before the point; nothing longer is a number we can use."""
SHORT_BYTES = 64 << 10
"""Numbers of so short a body may be read at once, without letting others run in between; see `_integer`."""
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 8
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_SALT_BYTES = 256

Json = dict[str, Any]


# JSON


def parse_json(raw: bytes) -> Json:
    """One JSON object, strictly: UTF-8, no duplicate keys, no NaN, no lone surrogates, at most 64 levels deep."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not UTF-8. Encode it as UTF-8.", code="invalid_encoding") from error
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=None if len(raw) <= SHORT_BYTES and not _has_long_number(raw) else _integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"The body must be a JSON object, not {kind_of(value)}.",
            code="invalid_type",
        )
    # A token-id prompt of a million numbers has two brackets: most bodies need no walk.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if b"\\u" in raw:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. Remove it.",
                code="invalid_unicode",
            ) from error
    return value


_DIGITS_ALIKE = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else ord("x") for byte in range(256))


def _has_long_number(raw: bytes) -> bool:
    """Whether so many digits follow each other anywhere, be it in a string: then each number is looked at."""
    return b"0" * (MAX_NUMBER_CHARS + 1) in raw.translate(_DIGITS_ALIKE)


def _object(pairs: list[tuple[str, Any]]) -> Json:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"An object has more than {MAX_KEYS} keys.", code="too_many_keys")
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"The key '{twice[:80]}' appears twice in one object.", code="duplicate_key")
    return made


# A Python function on purpose: the parser calls it for each number, which lets other threads run in between. The
# built-in int would hold the interpreter, and with it every stream, for a tenth of a second on a million ids.
def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        raise InvalidRequest(f"A number has {len(digits)} digits.", code="invalid_number")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise InvalidRequest(f"The number {digits[:40]} is too large.", code="invalid_number")
    return value


def _constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not a JSON number.", code="invalid_number")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep.", code="json_too_deep")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return depth


def kind_of(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# Models

TYPES_OF_UNIONS = ("str", "constrained-str", "list[dict[str,any]]", "dict[str,any]", "[key]")

TEXT: Json = {"type": "string"}


def an_object(*optional: str, **fields: Json) -> Json:
    """The schema of an object of `fields`; it may have more."""
    return {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}


def text_or(part: Json) -> Json:
    """The schema of a string, or an array of parts of a message."""
    return {"anyOf": [TEXT, {"type": "array", "items": part}]}


# Fields that something else checks, as they are documented.
TokenIds = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})]
EFFORT: Json = {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]}
Effort = Annotated[str, WithJsonSchema(EFFORT)]

Label = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Words that are only taken note of: short, and safe to show."""
Tags = Annotated[dict[Annotated[Label, Field(max_length=64)], Label], Field(max_length=16)]


def only(value: Any) -> Any:
    """A field's metadata: it may say what happens anyway, and nothing else."""

    def check(given: Any) -> Any:
        if given is not None and given != value:
            raise PydanticCustomError("unsupported", f"is only supported as {json.dumps(value)}")
        return given

    return AfterValidator(check), Field(json_schema_extra={"enum": [value, None]})


class Strict(BaseModel):
    """A body, or a part of one, with nothing in it that we do not know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted and not done: nothing here pads chunks


class Sampled(Strict):
    """What every protocol takes besides its own fields: the model, and how tokens are drawn from it."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=MAX_BIASES)
    min_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=MAX_STOP_TOKENS)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_SALT_BYTES)
    """Prefixes are shared only among requests that say the same."""
    priority: int | None = Field(default=None, ge=-1000, le=1000)
    """How the request stands in the queue: lower goes first. The header, which a proxy may set, goes before it."""
    return_timeline: bool | None = None
    """`usage.timeline`: where the time to first token went."""

    @field_validator("cache_salt")
    @classmethod
    def _salt(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > MAX_SALT_BYTES:
            raise ValueError(f"must have 1 to {MAX_SALT_BYTES} bytes; leave it out to share with everyone")
        return value

    def options(self, vocab_size: int, max_tokens: int) -> Json:
        """The fields of `SamplingParams` that all protocols take as they are. Raises InvalidRequest for ids outside
        the vocabulary and a `min_tokens` above `max_tokens`.
        """
        if (self.min_tokens or 0) > max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} is more than the {max_tokens} tokens the answer may have.",
                param="min_tokens",
            )
        stops = token_ids(self.stop_token_ids, vocab_size, param="stop_token_ids") if self.stop_token_ids else ()
        return {
            "max_tokens": max_tokens,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": _biases(self.logit_bias or {}, vocab_size),
            "min_tokens": self.min_tokens or 0,
            "stop_token_ids": stops,
            "ignore_eos": bool(self.ignore_eos),
        }


class OpenAI(Sampled):
    """What OpenAI's protocols share. The second half changes nothing here, and its clients need no special case."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream_options: StreamOptions | None = None

    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    service_tier: Label | None = None
    metadata: Tags | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream=true.", param="stream_options")
        return self


class Choices(OpenAI):
    """What its older protocols share, whose answers are choices."""

    max_tokens: int | None = Field(default=None, gt=0, lt=1 << 31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    return_token_ids: bool | None = None
    return_progress: bool | None = None
    """`prompt_progress` in a stream, in llama.cpp's words."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> list[str] | None:
        return None if value is None else stop_strings([value] if isinstance(value, str) else value)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage) or bool(self.return_timeline)


def characters(messages: Any) -> int:
    """Of the text that a conversation is certain to have when it is rendered."""
    if isinstance(messages, str):
        return len(messages)
    contents = [message.get("content") for message in messages]
    return sum(
        len(content)
        if isinstance(content, str)
        else sum(len(part["text"]) for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
        for content in contents
        if isinstance(content, str | list)
    )


def stop_strings(stops: Any) -> list[str]:
    """Raises ValueError for other things than strings, and for more or longer ones than we look for."""
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"holds {len(stops)} strings, at most {MAX_STOPS} are allowed")
    if any(not 0 < len(stop.encode()) <= MAX_STOP_BYTES for stop in stops):
        raise ValueError(f"strings must have 1 to {MAX_STOP_BYTES} bytes")
    return stops


Body = TypeVar("Body", bound=Strict)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """A body's bytes as `kind`. Raises InvalidRequest naming the field and what it must be."""
    try:
        return kind.model_validate(parse_json(raw))
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InvalidRequest:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a field that takes several types: what is wrong with the type it has, not what is wrong with its type.
    same = [found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    first = next((found for found in same if not found["type"].endswith("_type")), errors[0])
    param = ""
    for part in first["loc"]:
        if part in TYPES_OF_UNIONS:  # what pydantic puts behind a field that takes several
            break
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    param = param[:200]
    match first["type"]:
        case "extra_forbidden":
            return InvalidRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        case "missing":
            return InvalidRequest(f"{param} is required.", param=param, code="missing_parameter")
        case "unsupported":
            return InvalidRequest(f"{param} {first['msg']}.", param=param, code="unsupported_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param=param or None)


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for key, bias in biases.items():
        # As JSON writes a number: "007" or "+7" would let one id appear twice.
        token_id = int(key) if re.fullmatch("0|[1-9][0-9]{0,9}", key) else vocab_size
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"logit_bias has the key {key[:40]!r}; its keys are token ids, 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        found[token_id] = bias
    return tuple(found.items())


def token_ids(value: Any, vocab_size: int, *, param: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be a string or an array of token ids, not {kind_of(value)}.", param=param)
    if not value:
        raise InvalidRequest(f"{param} is empty. Send at least one token id.", param=param, code="empty_prompt")
    if set(map(type, value)) != {int}:  # bool is an int to Python, not to JSON
        at = next(i for i, item in enumerate(value) if type(item) is not int)
        raise InvalidRequest(
            f"{param}[{at}] is {kind_of(value[at])} that is no integer; token ids are integers.", param=f"{param}[{at}]"
        )
    if min(value) < 0 or max(value) >= vocab_size:
        at = next(i for i, item in enumerate(value) if not 0 <= item < vocab_size)
        raise InvalidRequest(
            f"{param}[{at}] is outside the vocabulary; token ids are 0 to {vocab_size - 1}.", param=f"{param}[{at}]"
        )
    return tuple(value)
