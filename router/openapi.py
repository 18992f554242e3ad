"""The document of our routes: what each takes, every status it may answer with, and the shape of each answer.

Bodies are described by the very models that check them. Answers are made elsewhere; here they are described, and tests
hold the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.answers import Json
from router.dialects import ANTHROPIC, dialect_of
from router.protocols.chat import ChatBody
from router.protocols.completions import CompletionBody
from router.protocols.messages import CountTokensBody, MessagesBody
from router.protocols.responses import ResponsesBody
from router.protocols.tokenize import DetokenizeBody, TokenizeBody

SCHEMAS = "#/components/schemas/"

COUNT: Json = {"type": "integer", "minimum": 0}
TEXT: Json = {"type": "string"}
MAYBE_TEXT: Json = {"type": ["string", "null"]}
ANY_OBJECT: Json = {"type": "object"}


def shape(*optional: str, **fields: Json) -> Json:
    """An object that has all of `fields` but the optional ones, and may have more."""
    return {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}


def listing(items: Json) -> Json:
    return {"type": "array", "items": items}


def ref(name: str) -> Json:
    return {"$ref": SCHEMAS + name}


CHOICE: Json = shape(index=COUNT, finish_reason=MAYBE_TEXT, logprobs={"type": ["object", "null"]})

ANSWERS: Mapping[str, Json] = {
    "Error": shape(
        error=shape(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=TEXT) | {"additionalProperties": False},
    )
    | {"additionalProperties": False},
    "AnthropicError": shape(type={"const": "error"}, error=shape(type=TEXT, message=TEXT)),
    # One event of a stream; its data is JSON, or [DONE].
    "Event": shape("event", "id", data=TEXT, event=TEXT, id=TEXT),
    "Usage": shape(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=shape(cached_tokens=COUNT),
        prompt_cache_hit_tokens=COUNT,
        prompt_cache_miss_tokens=COUNT,
    ),
    "Completion": shape(
        id=TEXT,
        object={"const": "text_completion"},
        created=COUNT,
        model=TEXT,
        choices=listing({"allOf": [CHOICE, shape(text=TEXT)]}),
        usage=ref("Usage"),
    ),
    "ChatCompletion": shape(
        id=TEXT,
        object={"const": "chat.completion"},
        created=COUNT,
        model=TEXT,
        choices=listing(
            {"allOf": [CHOICE, shape("content", message=shape(role={"const": "assistant"}, content=MAYBE_TEXT))]}
        ),
        usage=ref("Usage"),
    ),
    "Response": shape(
        id=TEXT,
        object={"const": "response"},
        created_at=COUNT,
        status={"enum": ["completed", "incomplete"]},
        model=TEXT,
        output=listing(shape(type={"enum": ["message", "reasoning", "function_call", "custom_tool_call"]})),
        usage=shape(
            input_tokens=COUNT,
            input_tokens_details=shape(cached_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=shape(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        ),
    ),
    "Message": shape(
        id=TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=TEXT,
        content=listing(shape(type={"enum": ["text", "thinking", "tool_use"]})),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        stop_sequence=MAYBE_TEXT,
        usage=shape(
            input_tokens=COUNT,
            cache_creation_input_tokens=COUNT,
            cache_read_input_tokens=COUNT,
            output_tokens=COUNT,
        ),
    ),
    "TokenCount": shape(input_tokens=COUNT),
    "Tokens": shape(count=COUNT, max_model_len=COUNT, tokens=listing(COUNT)),
    "Text": shape(prompt=TEXT),
    "Model": shape(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT),
    "Models": shape(object={"const": "list"}, data=listing(ref("Model"))),
    "Health": shape(status={"enum": ["ok", "draining"]}),
    "Readiness": shape(
        status={"enum": ["ready", "not ready"]}, prefill=COUNT, decode=COUNT, registry_stale_s={"type": "number"}
    ),
    "Workers": shape(
        workers=listing(shape(worker_id=TEXT, role=TEXT, state=TEXT)),
        num_pairs=shape(usable=COUNT, unusable=COUNT, incompatible=COUNT),
        pairs=ANY_OBJECT,
        registry_stale_s={"type": "number"},
    ),
    "Fleet": ANY_OBJECT,
    "Version": shape(version=TEXT),
}

STATUSES = {
    400: "The request is wrong; the message says how.",
    401: "No valid API key came with the request.",
    403: "The API key does not allow this.",
    404: "There is no such model, or no such stream any more.",
    408: "The body stopped arriving, or the request waited too long for room.",
    409: "The Idempotency-Key was used for another request.",
    412: "There is no room now, and the request does not want to wait for it.",
    413: "The body is too large.",
    415: "The body is not JSON in UTF-8.",
    429: "A limit of the API key is used up; `retry-after` says for how long.",
    431: "The headers are too large.",
    500: "The request failed here, and would fail again.",
    503: "No worker can serve the request now; `retry-after` says when to try again.",
    504: "A worker took too long.",
    529: "Too much is going on; `retry-after` says when to try again.",
}
LOOKING = (400, 401, 403, 408, 431)
READING = (*LOOKING, 404, 413, 415)
GENERATING = (*READING, 409, 412, 429, 500, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route: its method, what it takes and gives. `statuses` are those besides `gives`."""

    method: str = "get"
    does: str
    takes: type[BaseModel] | None = None
    gives: Mapping[int, str | None]  # status -> schema; None is not JSON
    media: str = "application/json"  # of what it gives
    streams: bool = False  # where `stream` is true
    statuses: tuple[int, ...] = LOOKING
    parameters: tuple[Json, ...] = ()


def generating(does: str, takes: type[BaseModel], gives: str, *more: int) -> Operation:
    return Operation(
        method="post", does=does, takes=takes, gives={200: gives}, streams=True, statuses=(*GENERATING, *more)
    )


def converting(does: str, takes: type[BaseModel], gives: str) -> Operation:
    return Operation(method="post", does=does, takes=takes, gives={200: gives}, statuses=READING)


NAME: Json = {"name": "name", "in": "path", "required": True, "schema": TEXT}
STREAM_ID: Json = {"name": "stream_id", "in": "path", "required": True, "schema": TEXT}
HEALTH = Operation(does="Whether the process lives.", gives={200: "Health"})
READINESS = Operation(does="Whether a request could be placed now.", gives={200: "Readiness", 503: "Readiness"})

OPERATIONS: Mapping[str, Operation] = {
    "/v1/completions": generating("Go on with a text.", CompletionBody, "Completion"),
    "/v1/chat/completions": generating("Answer a conversation, as OpenAI does.", ChatBody, "ChatCompletion"),
    "/v1/responses": generating("Answer items, as OpenAI does. Nothing is stored.", ResponsesBody, "Response"),
    "/v1/messages": generating("Answer a conversation, as Anthropic does.", MessagesBody, "Message", 529),
    "/v1/messages/count_tokens": converting("Count a conversation's tokens.", CountTokensBody, "TokenCount"),
    "/tokenize": converting("A text or a conversation in token ids.", TokenizeBody, "Tokens"),
    "/detokenize": converting("Token ids as text.", DetokenizeBody, "Text"),
    "/v1/streams/{stream_id}": Operation(
        does="The rest of a kept answer, behind the event that bears the id.",
        gives={200: None},
        media="text/event-stream",
        statuses=(*LOOKING, 404, 503, 504),
        parameters=(STREAM_ID,),
    ),
    "/v1/models": Operation(does="The models served.", gives={200: "Models"}),
    "/v1/models/{name}": Operation(
        does="One model.", gives={200: "Model"}, statuses=(*LOOKING, 404), parameters=(NAME,)
    ),
    **dict.fromkeys(("/health", "/healthz", "/liveness", "/livez", "/live"), HEALTH),
    **dict.fromkeys(("/readiness", "/readyz"), READINESS),
    "/workers": Operation(does="The workers known.", gives={200: "Workers"}),
    "/version": Operation(does="The version that runs.", gives={200: "Version"}),
    "/metrics": Operation(does="Metrics, for Prometheus.", gives={200: None}, media="text/plain"),
    "/openapi.json": Operation(does="This document.", gives={200: None}),
    "/": Operation(does="The front page.", gives={200: None}, media="text/html"),
    "/page/{name}": Operation(
        does="A part of the front page.",
        gives={200: None, 304: None},
        media="*/*",
        statuses=(*LOOKING, 404),
        parameters=(NAME,),
    ),
    "/fleet": Operation(does="Workers, requests and times of this router, now.", gives={200: "Fleet"}),
    "/fleet/events": Operation(
        does="The same, and what changes from then on, without an end.",
        gives={200: None},
        media="text/event-stream",
        statuses=(*LOOKING, 503),
    ),
}


def document(version: str, operations: Mapping[str, Operation] = OPERATIONS) -> Json:
    """The OpenAPI 3.1 document of `operations`."""
    bodies = {operation.takes for operation in operations.values() if operation.takes is not None}
    _, definitions = models_json_schema(
        [(body, "validation") for body in sorted(bodies, key=lambda body: body.__name__)],
        ref_template=SCHEMAS + "{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penumbra", "version": version},
        "paths": {
            path: {operation.method: _operation(path, operation)} for path, operation in sorted(operations.items())
        },
        "components": {
            "schemas": {**definitions["$defs"], **ANSWERS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(path: str, operation: Operation) -> Json:
    dialect = dialect_of(path)
    error = "AnthropicError" if dialect is ANTHROPIC else "Error"
    answers = {
        str(status): {"description": STATUSES[status], "content": _content({"application/json": ref(error)})}
        for status in operation.statuses
        if status not in operation.gives
    }
    for status, name in operation.gives.items():
        kinds: dict[str, Json] = {operation.media: {} if name is None else ref(name)}
        if operation.streams:
            kinds["text/event-stream"] = ref("Event")
        answers[str(status)] = {"description": operation.does, "content": _content(kinds)}
    described: Json = {
        "summary": operation.does,
        "security": [{"bearer": []}, {"x-api-key": []}, {}],
        "responses": dict(sorted(answers.items())),
    }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.takes is not None:
        described["requestBody"] = {
            "required": True,
            "content": _content({"application/json": ref(operation.takes.__name__)}),
        }
    return described


def _content(kinds: Mapping[str, Json]) -> Json:
    return {media: {"schema": schema} for media, schema in kinds.items()}
