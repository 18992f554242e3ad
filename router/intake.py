"""From a body to a request that can be placed: what every protocol needs on the way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router.answers import Answer, Json
from router.attempts import RelayRequest
from router.config import ModelFacts
from router.quarantine import fingerprint
from router.text import ChatPrompt, ProtocolRequest, Text, with_stage
from router.timeline import PromptProgress
from wire.errors import InvalidRequest, ModelNotFound
from wire.events import cut
from wire.prefix import DEFAULT_TENANT, namespace, pack_tokens, packed_page_hashes, token_view
from wire.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request ready to be placed: for each choice ids for the workers, and the answer that turns theirs into text."""

    choices: tuple[tuple[RelayRequest, Answer], ...]
    stream: bool
    include_usage: bool = False  # a last chunk of the stream tells what was used, as OpenAI's do when asked
    return_timeline: bool = False  # and with it where the time went
    progress: Callable[[PromptProgress], Json] | None = None  # what a stream shows of its prompt's, when asked
    priority: int | None = None  # what the body says of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a prompt came to where it was read. The body at hand has a word in its place."""

    packed: bytes = field(repr=False)  # its ids, by `pack_tokens`
    digests: Mapping[str, Sequence[bytes]] = field(repr=False)
    alike: bytes
    stage: str  # where reading a conversation's answer begins, as `text.stage_of` has it
    said: str = field(repr=False)  # the prompt's own text, of a completion that repeats it
    instructions: str = field(repr=False)  # those that a response repeats

    @property
    def prompt(self) -> Sequence[int]:
        return token_view(self.packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """What preparing one request takes: the model's text, its facts and its names, and whose request it is.

    A protocol's `prepare(intake, raw, context)` runs on a thread, or in another process.
    """

    facts: ModelFacts
    text: Text
    model_names: tuple[str, ...]  # that the tenant may use
    models: frozenset[str] = frozenset()  # fingerprints of those that workers serve
    tenant_id: str = DEFAULT_TENANT
    request_id: str = ""  # with `created`, of a request that has been before
    created: int = 0
    known: Known | None = None

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            raise ModelNotFound(
                f"The model '{name[:80]}' does not exist; this cluster serves {', '.join(self.model_names)}."
            )

    def check_length(self, chars: int, context: int) -> None:
        """Refuse a text that can not fit by its length alone, before it costs seconds to tokenize."""
        least = -(-chars // self.text.vocabulary.longest_bytes)
        if least >= context:
            raise InvalidRequest(
                f"The maximum context length is {context} tokens, but the prompt alone has at least {least}: no token "
                f"is longer than {self.text.vocabulary.longest_bytes} bytes. Shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )

    def convert(self, request: ProtocolRequest, **demands: Any) -> ChatPrompt:
        """`Text.convert`, or what it came to already."""
        prompt = self.text.convert(request, **demands)
        if self.known is None:
            return prompt
        return replace(prompt, ids=self.known.prompt, parsing=with_stage(prompt.parsing, self.known.stage))

    def answer_tokens(self, prompt: ChatPrompt, context: int) -> int:
        """Tokens that the answer to a conversation may have. Raises InvalidRequest as `fit` does."""
        fit(len(prompt.ids), None, context, default=1)
        return fit(len(prompt.ids), prompt.max_tokens(context), context, default=1)

    def requests(
        self, prompt: Sequence[int], sampling: SamplingParams, *, cache_salt: str | None, n: int | None = None
    ) -> list[RelayRequest]:
        """One request to the workers for each choice: they share the prompt and its pages, and differ in their
        noise.
        """
        salt = cache_salt or ""
        known = self.known or self._known(prompt, sampling, salt)
        request = RelayRequest(
            # An id of our own: two clients may well send the same x-request-id at the same time.
            request_id=self.request_id or uuid.uuid4().hex,
            prompt=prompt,
            sampling=sampling,
            vocab_size=self.facts.vocab_size,
            packed=known.packed,
            alike=known.alike,
            cache_salt=salt,
            tenant=self.tenant_id,
            digests=known.digests,
        )
        return [
            replace(request, request_id=f"{request.request_id}-{i}" if i else request.request_id, sampling=drawn)
            for i, drawn in enumerate(replace(sampling, choice=i) for i in range(n or 1))
        ]

    def _known(self, prompt: Sequence[int], sampling: SamplingParams, salt: str) -> Known:
        packed = pack_tokens(prompt)
        return Known(
            packed=packed,
            alike=fingerprint(packed, sampling.grammar),
            # As a rule there is one model; there are two while a fleet changes from one to the next.
            digests={
                model: cut(packed_page_hashes(packed, namespace(model, self.tenant_id, salt))) for model in self.models
            },
            stage="",
            said="",
            instructions="",
        )


def fit(prompt_tokens: int, max_tokens: int | None, context: int, *, default: int) -> int:
    """Tokens to generate. Raises InvalidRequest when prompt and answer do not fit the context."""
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > context:
        raise InvalidRequest(
            f"The maximum context length is {context} tokens, but the request needs {prompt_tokens + wanted}: "
            f"{prompt_tokens} in the prompt and {wanted} to generate. Shorten the prompt or lower max_tokens.",
            param="prompt",
            code="context_length_exceeded",
        )
    return min(default, context - prompt_tokens) if max_tokens is None else max_tokens
