"""From a body to a request that can be placed: what every protocol needs on the way, and the threads it happens on."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from router.answers import Answer, Json
from router.config import ModelFacts, RouterConfig
from router.fleet import Fleet
from router.placement import capacity
from router.quarantine import fingerprint
from router.relay import RelayRequest
from router.tenants import ANYONE, Tenant
from router.text import ChatPrompt, Text
from router.timeline import PromptProgress
from wire.errors import InvalidRequest, ModelNotFound
from wire.events import cut
from wire.prefix import namespace, pack_tokens, packed_page_hashes
from wire.types import SamplingParams

LONG_BODY_BYTES = 64 << 10
"""Bodies above this are prepared on threads of their own, so that short requests never queue behind a long one."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request ready to be placed: for each choice ids for the workers, and the answer that turns theirs into text."""

    choices: tuple[tuple[RelayRequest, Answer], ...]
    stream: bool
    include_usage: bool = False  # a last chunk of the stream tells what was used, as OpenAI's do when asked
    return_timeline: bool = False  # and with it where the time went
    progress: Callable[[PromptProgress], Json] | None = None  # what a stream shows of its prompt's, when asked


class Intake:
    """What preparing a request takes: the model's text, its facts and its names.

    A protocol's `prepare(intake, raw, context)` runs on one of the threads here.
    """

    def __init__(self, config: RouterConfig, facts: ModelFacts, text: Text, fleet: Fleet) -> None:
        self.facts = facts
        self.text = text
        self.model_names = config.model_names
        self._max_context = config.max_context
        self._fleet = fleet
        self.tenant = ANYONE
        self.request_id = ""
        self.created = 0
        self._lanes = {
            long: ThreadPoolExecutor(2, thread_name_prefix="prepare-long" if long else "prepare")
            for long in (False, True)
        }

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        self.text.close()

    def of(self, tenant: Tenant, *, request_id: str = "", created: int = 0) -> Intake:
        """The same for requests of this tenant: it knows no other models, and shares no prefix with others.

        With `request_id` and `created` it prepares a request that has been before, by the names it had then.
        """
        own = copy.copy(self)
        own.tenant = tenant
        own.request_id, own.created = request_id, created or int(time.time())
        own.model_names = tuple(name for name in self.model_names if tenant.may_use(name))
        return own

    async def run(self, prepare: Callable[[Intake, bytes, int], T], raw: bytes) -> T:
        """`prepare` on a thread: it may take seconds."""
        lane = self._lanes[len(raw) > LONG_BODY_BYTES]
        return await asyncio.get_running_loop().run_in_executor(lane, prepare, self, raw, self.context())

    def context(self) -> int:
        """Tokens, prompt and answer together, that a request may have: the model's limit, or the fleet's room."""
        limit = self._max_context or self.facts.max_context
        room = capacity(self._fleet.snapshot())
        return limit if room is None else min(limit, room)

    # For protocols, on their thread

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

    def answer_tokens(self, prompt: ChatPrompt, context: int) -> int:
        """Tokens that the answer to a conversation may have. Raises InvalidRequest as `fit` does."""
        fit(len(prompt.ids), None, context, default=1)
        return fit(len(prompt.ids), prompt.max_tokens(context), context, default=1)

    def requests(
        self, prompt: tuple[int, ...], sampling: SamplingParams, *, cache_salt: str | None, n: int | None = None
    ) -> list[RelayRequest]:
        """One request to the workers for each choice: they share the prompt and its pages, and differ in their
        noise.
        """
        salt, packed = cache_salt or "", pack_tokens(prompt)
        request = RelayRequest(
            # An id of our own: two clients may well send the same x-request-id at the same time.
            request_id=self.request_id or uuid.uuid4().hex,
            prompt=prompt,
            sampling=sampling,
            vocab_size=self.facts.vocab_size,
            packed=packed,
            alike=fingerprint(packed, sampling.grammar),
            cache_salt=salt,
            tenant=self.tenant.tenant_id,
            # As a rule there is one model; there are two while a fleet changes from one to the next.
            digests={
                model: cut(packed_page_hashes(packed, namespace(model, self.tenant.tenant_id, salt)))
                for model in self._fleet.models()
            },
        )
        return [
            replace(request, request_id=f"{request.request_id}-{i}" if i else request.request_id, sampling=drawn)
            for i, drawn in enumerate(replace(sampling, choice=i) for i in range(n or 1))
        ]


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
