"""Dataclass <-> protobuf, both ways, and nothing else.

Every message of `wire.types` has a pair `x_to_wire` / `x_from_wire`. What comes in is checked here, once, so
the code behind it never meets a half-formed message: a bad one raises InvalidRequest naming the field. What
goes out is ours; protobuf itself raises ValueError when one of our numbers does not fit its field.
"""

from __future__ import annotations

import math
import re
import sys
from array import array
from typing import NoReturn

from wire.errors import InvalidRequest, PenumbraError
from wire.prefix import MAX_NAMESPACE_BYTES, pack_tokens
from wire.types import (
    PAGE_TOKENS,
    Admitted,
    Attached,
    AttachRequest,
    ClaimRequest,
    Failed,
    Fetching,
    Finished,
    FinishReason,
    FirstTokenTimes,
    OwnerCard,
    PageClass,
    PageGroup,
    PageOffer,
    PrefillTimes,
    ProbeReply,
    Progress,
    PromptScores,
    Region,
    RegionClass,
    Replaying,
    RunEvent,
    RunFinished,
    RunRequest,
    SamplingParams,
    StartEvent,
    StartRequest,
    Tail,
    TokenEvent,
    Tokens,
    WorkerRef,
)
from wire.v1 import kv_pb2, worker_pb2

SECRET_BYTES = 16
MAX_TOP_LOGPROBS = 20
MAX_GRAMMAR_CHARS = 256 << 10
MAX_ID_CHARS = 256
MAX_KEEP_S = 600
WORKER_ID = re.compile(r"[a-z0-9-]{1,63}")

# array("I") is 4 bytes on every platform CPython supports, but C only promises 2.
_UINT32 = next(code for code in "IL" if array(code).itemsize == 4)
_MEMORY_KINDS = ("DRAM", "VRAM")


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {problem}.", param=field)


def _text(field: str, value: str) -> str:
    if not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
        _refuse(field, f"must be 1 to {MAX_ID_CHARS} printable characters, got {len(value)}")
    return value


def _worker_id(field: str, value: str) -> str:
    if not WORKER_ID.fullmatch(value):
        _refuse(field, f"{value[:80]!r} is not a worker id; use 1 to 63 of a-z, 0-9 and '-'")
    return value


def _secret(field: str, value: bytes) -> bytes:
    if len(value) != SECRET_BYTES:
        _refuse(field, f"must be {SECRET_BYTES} bytes, got {len(value)}")
    return value


def _namespace(value: bytes) -> bytes:
    if len(value) > MAX_NAMESPACE_BYTES:
        _refuse("namespace", f"must be at most {MAX_NAMESPACE_BYTES} bytes, got {len(value)}")
    return value


def _page_aligned(field: str, value: int) -> int:
    if value % PAGE_TOKENS:
        _refuse(field, f"{value} is not a multiple of {PAGE_TOKENS}; pages are held whole or not at all")
    return value


# Token ids


def unpack_tokens(field: str, data: bytes) -> tuple[int, ...]:
    if len(data) % 4:
        _refuse(field, f"{len(data)} bytes are not whole little-endian uint32 token ids")
    unpacked = array(_UINT32)
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return tuple(unpacked)


def _prompt(data: bytes) -> tuple[int, ...]:
    if not data:
        _refuse("prompt", "is empty; send at least one token id")
    return unpack_tokens("prompt", data)


# Shared parts


def sampling_to_wire(sampling: SamplingParams) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        choice=sampling.choice,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=[worker_pb2.LogitBias(id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        min_tokens=sampling.min_tokens,
        grammar=sampling.grammar,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_wire(message: worker_pb2.Sampling) -> SamplingParams:
    if message.max_tokens < 1:
        _refuse("max_tokens", "must be at least 1")
    if not (math.isfinite(message.temperature) and message.temperature >= 0):
        _refuse("temperature", f"must be finite and not negative, got {message.temperature}")
    if not 0 < message.top_p <= 1:
        _refuse("top_p", f"must be above 0 and at most 1, got {message.top_p}")
    if not 0 <= message.min_p <= 1:
        _refuse("min_p", f"must be 0 to 1, got {message.min_p}")
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        if not math.isfinite(getattr(message, name)):
            _refuse(name, f"must be finite, got {getattr(message, name)}")
    if message.repetition_penalty < 0:
        _refuse("repetition_penalty", f"must be above 0, got {message.repetition_penalty}")
    if not all(math.isfinite(entry.bias) for entry in message.logit_bias):
        _refuse("logit_bias", "holds a value that is not finite")
    for name in ("top_logprobs", "prompt_logprobs"):
        if getattr(message, name) > MAX_TOP_LOGPROBS:
            _refuse(name, f"must be at most {MAX_TOP_LOGPROBS}, got {getattr(message, name)}")
    if len(message.grammar) > MAX_GRAMMAR_CHARS:
        _refuse("grammar", f"must be at most {MAX_GRAMMAR_CHARS} characters, got {len(message.grammar)}")
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        logprobs=message.logprobs,
        top_logprobs=message.top_logprobs,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        choice=message.choice,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        logit_bias=tuple((entry.id, entry.bias) for entry in message.logit_bias),
        min_tokens=message.min_tokens,
        grammar=message.grammar,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def worker_ref_to_wire(ref: WorkerRef) -> worker_pb2.WorkerRef:
    return worker_pb2.WorkerRef(worker_id=ref.worker_id, address=ref.address, epoch=ref.epoch)


def worker_ref_from_wire(message: worker_pb2.WorkerRef) -> WorkerRef:
    return WorkerRef(
        worker_id=_worker_id("worker_id", message.worker_id),
        address=_text("address", message.address),
        epoch=message.epoch,
    )


def token_to_wire(token: TokenEvent) -> kv_pb2.Token:
    return kv_pb2.Token(
        index=token.index,
        id=token.token_id,
        logprob=token.logprob,
        top=[kv_pb2.TopLogprob(id=token_id, logprob=logprob) for token_id, logprob in token.top],
        prompt=None
        if token.prompt is None
        else kv_pb2.PromptScores(
            logprobs=token.prompt.logprobs, top_ids=token.prompt.top_ids, top_logprobs=token.prompt.top_logprobs
        ),
    )


def token_from_wire(message: kv_pb2.Token) -> TokenEvent:
    # -inf is a legal logprob (a token the grammar or top-p ruled out); NaN, which is not itself, never is.
    index, logprob, entries = message.index, message.logprob, message.top
    top = tuple([(entry.id, entry.logprob) for entry in entries]) if entries else ()
    if logprob != logprob or (top and any(math.isnan(other) for _, other in top)):
        _refuse("logprob", f"token {index} carries NaN")
    prompt = _prompt_scores(message.prompt) if message.HasField("prompt") else None
    return TokenEvent(index=index, token_id=message.id, logprob=logprob, top=top, prompt=prompt)


def _prompt_scores(message: kv_pb2.PromptScores) -> PromptScores:
    scores = PromptScores(
        logprobs=tuple(message.logprobs),
        top_ids=tuple(message.top_ids),
        top_logprobs=tuple(message.top_logprobs),
    )
    if any(math.isnan(logprob) for logprob in (*scores.logprobs, *scores.top_logprobs)):
        _refuse("prompt", "carries a log probability that is NaN")
    if len(scores.top_ids) != len(scores.top_logprobs) or len(scores.top_ids) % max(1, len(scores.logprobs)):
        _refuse("prompt", "carries unequally many alternatives for its tokens")
    return scores


# Pages


def owner_card_to_wire(card: OwnerCard) -> kv_pb2.OwnerCard:
    return kv_pb2.OwnerCard(
        worker_id=card.worker_id,
        epoch=card.epoch,
        transport=card.transport,
        agent=card.agent,
        metadata=card.metadata,
        memory=card.memory,
        device=card.device,
        signature=card.signature,
        classes=[
            kv_pb2.RegionClass(
                name=region_class.name.value,
                regions=[
                    kv_pb2.Region(
                        name=region.name,
                        address=region.address,
                        item_bytes=region.item_bytes,
                        num_items=region.num_items,
                    )
                    for region in region_class.regions
                ],
            )
            for region_class in card.classes
        ],
    )


def owner_card_from_wire(message: kv_pb2.OwnerCard) -> OwnerCard:
    if message.memory not in _MEMORY_KINDS:
        _refuse("memory", f"{message.memory[:80]!r} is not one of {', '.join(_MEMORY_KINDS)}")
    classes = tuple(_region_class_from_wire(region_class) for region_class in message.classes)
    names = [region_class.name for region_class in classes]
    if len(set(names)) != len(names):
        _refuse("classes", f"a page class appears twice in {', '.join(names)}")
    return OwnerCard(
        worker_id=_worker_id("worker_id", message.worker_id),
        epoch=message.epoch,
        transport=_text("transport", message.transport),
        agent=_text("agent", message.agent),
        metadata=message.metadata,
        memory=message.memory,
        device=message.device,
        signature=_text("signature", message.signature),
        classes=classes,
    )


def _region_class_from_wire(message: kv_pb2.RegionClass) -> RegionClass:
    return RegionClass(
        name=_page_class_from_wire(message.name),
        regions=tuple(_region_from_wire(region) for region in message.regions),
    )


def _region_from_wire(message: kv_pb2.Region) -> Region:
    name = _text("region.name", message.name)
    if message.item_bytes < 1 or message.num_items < 1:
        _refuse("region", f"{name} has {message.num_items} items of {message.item_bytes} bytes")
    if message.address + message.item_bytes * message.num_items >= 1 << 64:
        _refuse("region", f"{name} reaches beyond the address space")
    return Region(name=name, address=message.address, item_bytes=message.item_bytes, num_items=message.num_items)


def _page_class_from_wire(name: str) -> PageClass:
    try:
        return PageClass(name)
    except ValueError:
        _refuse("page_class", f"{name[:80]!r} is not one of {', '.join(PageClass)}")


def page_group_to_wire(group: PageGroup) -> kv_pb2.PageGroup:
    return kv_pb2.PageGroup(
        page_class=group.page_class.value,
        positions=group.positions,
        items=group.items,
        generations=group.generations,
        checksums=group.checksums,
    )


def page_group_from_wire(message: kv_pb2.PageGroup) -> PageGroup:
    group = PageGroup(
        page_class=_page_class_from_wire(message.page_class),
        positions=tuple(message.positions),
        items=tuple(message.items),
        generations=tuple(message.generations),
        checksums=tuple(message.checksums),
    )
    lengths = [len(group.positions), len(group.items), len(group.generations), len(group.checksums)]
    if lengths[0] == 0 or len(set(lengths)) != 1:
        names = "positions, items, generations and checksums"
        _refuse("groups", f"{lengths} {group.page_class} {names}; the four must be equal and not 0")
    return group


def prefill_times_to_wire(times: PrefillTimes) -> kv_pb2.PrefillTimes:
    return kv_pb2.PrefillTimes(queue_us=times.queue_us, compute_us=times.compute_us)


def prefill_times_from_wire(message: kv_pb2.PrefillTimes) -> PrefillTimes:
    return PrefillTimes(queue_us=message.queue_us, compute_us=message.compute_us)


def tail_to_wire(tail: Tail) -> kv_pb2.Tail:
    return kv_pb2.Tail(
        prompt_tokens=tail.prompt_tokens,
        cached_tokens=tail.cached_tokens,
        first=token_to_wire(tail.first),
        total_pages=tail.total_pages,
        times=prefill_times_to_wire(tail.times),
    )


def tail_from_wire(message: kv_pb2.Tail) -> Tail:
    if not message.HasField("first"):
        _refuse("tail.first", "the last offer must bring the first token")
    if message.prompt_tokens < 1 or message.cached_tokens > message.prompt_tokens:
        _refuse("tail", f"{message.cached_tokens} cached of {message.prompt_tokens} prompt tokens")
    return Tail(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        first=token_from_wire(message.first),
        total_pages=message.total_pages,
        times=prefill_times_from_wire(message.times),
    )


def page_offer_to_wire(offer: PageOffer) -> kv_pb2.PageOffer:
    return kv_pb2.PageOffer(
        seq=offer.seq,
        claim_id=offer.claim_id,
        owner=None if offer.owner is None else owner_card_to_wire(offer.owner),
        groups=[page_group_to_wire(group) for group in offer.groups],
        tail=None if offer.tail is None else tail_to_wire(offer.tail),
    )


def page_offer_from_wire(message: kv_pb2.PageOffer) -> PageOffer:
    if (message.seq == 0) != message.HasField("owner"):
        _refuse("owner", f"offer {message.seq}: offer 0 carries the owner's card, and only offer 0 does")
    if message.seq == 0 and (message.groups or message.HasField("tail")):
        _refuse("groups", "offer 0 carries the owner's card alone")
    return PageOffer(
        seq=message.seq,
        claim_id=_text("claim_id", message.claim_id),
        owner=owner_card_from_wire(message.owner) if message.HasField("owner") else None,
        groups=tuple(page_group_from_wire(group) for group in message.groups),
        tail=tail_from_wire(message.tail) if message.HasField("tail") else None,
    )


def claim_request_to_wire(claim: ClaimRequest) -> kv_pb2.ClaimRequest:
    return kv_pb2.ClaimRequest(
        request_id=claim.request_id,
        attempt=claim.attempt,
        from_token=claim.from_token,
        secret=claim.secret,
        reader_id=claim.reader_id,
        reader_epoch=claim.reader_epoch,
        signature=claim.signature,
    )


def claim_request_from_wire(message: kv_pb2.ClaimRequest) -> ClaimRequest:
    return ClaimRequest(
        request_id=_text("request_id", message.request_id),
        attempt=message.attempt,
        from_token=_page_aligned("from_token", message.from_token),
        secret=_secret("secret", message.secret),
        reader_id=_worker_id("reader_id", message.reader_id),
        reader_epoch=message.reader_epoch,
        signature=_text("signature", message.signature),
    )


# Decode.Start and Prefill.Run


def start_request_to_wire(request: StartRequest, packed: bytes | None = None) -> worker_pb2.StartRequest:
    """`packed` is the prompt after `pack_tokens`, from who has it already."""
    return worker_pb2.StartRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        prompt=pack_tokens(request.prompt) if packed is None else packed,
        sampling=sampling_to_wire(request.sampling),
        source=None if request.source is None else worker_ref_to_wire(request.source),
        resume=worker_pb2.Resume(tokens=pack_tokens(request.emitted)) if request.emitted else None,
        namespace=request.namespace,
        keep_s=request.keep_s,
        context=request.context,
    )


def start_request_from_wire(message: worker_pb2.StartRequest) -> StartRequest:
    return StartRequest(
        request_id=_text("request_id", message.request_id),
        attempt=message.attempt,
        prompt=_prompt(message.prompt),
        sampling=sampling_from_wire(message.sampling),
        source=worker_ref_from_wire(message.source) if message.HasField("source") else None,
        emitted=unpack_tokens("resume", message.resume.tokens),
        namespace=_namespace(message.namespace),
        keep_s=min(message.keep_s, MAX_KEEP_S),
        context=message.context,
    )


def attach_request_to_wire(request: AttachRequest) -> worker_pb2.AttachRequest:
    return worker_pb2.AttachRequest(request_id=request.request_id, attempt=request.attempt, epoch=request.epoch)


def attach_request_from_wire(message: worker_pb2.AttachRequest) -> AttachRequest:
    return AttachRequest(
        request_id=_text("request_id", message.request_id), attempt=message.attempt, epoch=message.epoch
    )


def run_request_to_wire(request: RunRequest, packed: bytes | None = None) -> worker_pb2.RunRequest:
    """`packed` is the prompt after `pack_tokens`, from who has it already."""
    return worker_pb2.RunRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        prompt=pack_tokens(request.prompt) if packed is None else packed,
        sampling=sampling_to_wire(request.sampling),
        skip=request.skip,
        secret=request.secret,
        namespace=request.namespace,
        hold=request.hold,
    )


def run_request_from_wire(message: worker_pb2.RunRequest) -> RunRequest:
    prompt = _prompt(message.prompt)
    if message.skip > len(prompt):
        _refuse("skip", f"{message.skip} tokens to skip of a prompt of {len(prompt)}")
    return RunRequest(
        request_id=_text("request_id", message.request_id),
        attempt=message.attempt,
        prompt=prompt,
        sampling=sampling_from_wire(message.sampling),
        skip=_page_aligned("skip", message.skip),
        secret=_secret("secret", message.secret),
        namespace=_namespace(message.namespace),
        hold=message.hold,
    )


def failed_from_error(error: PenumbraError) -> Failed:
    """The event that ends a stream with `error`; `wire.rpc.error_from_code` turns it back into one."""
    return Failed(code=error.code, message=str(error), retryable=error.retryable)


def _failed_to_wire(event: Failed) -> worker_pb2.Failed:
    return worker_pb2.Failed(code=event.code, message=event.message, retryable=event.retryable)


def _failed_from_wire(message: worker_pb2.Failed) -> Failed:
    return Failed(code=_text("code", message.code), message=message.message, retryable=message.retryable)


def first_token_times_to_wire(times: FirstTokenTimes) -> worker_pb2.FirstTokenTimes:
    return worker_pb2.FirstTokenTimes(
        admit_us=times.admit_us,
        pages_us=times.pages_us,
        transfer_us=times.transfer_us,
        emit_us=times.emit_us,
        prefill=prefill_times_to_wire(times.prefill),
    )


def first_token_times_from_wire(message: worker_pb2.FirstTokenTimes) -> FirstTokenTimes:
    return FirstTokenTimes(
        admit_us=message.admit_us,
        pages_us=message.pages_us,
        transfer_us=message.transfer_us,
        emit_us=message.emit_us,
        prefill=prefill_times_from_wire(message.prefill),
    )


def _progress_to_wire(progress: Progress) -> worker_pb2.Progress:
    return worker_pb2.Progress(done=progress.done, total=progress.total, cached=progress.cached)


def _progress_from_wire(message: worker_pb2.Progress) -> Progress:
    if message.done > message.total or message.cached > message.total:
        _refuse("progress", f"{message.done} done and {message.cached} cached of {message.total}")
    return Progress(done=message.done, total=message.total, cached=message.cached)


def start_event_to_wire(event: StartEvent) -> worker_pb2.StartEvent:
    match event:
        case Admitted():
            return worker_pb2.StartEvent(
                admitted=worker_pb2.Admitted(resident_prefix=event.resident_prefix, secret=event.secret)
            )
        case Fetching():
            return worker_pb2.StartEvent(fetching=worker_pb2.Fetching(pages=event.pages))
        case Replaying():
            return worker_pb2.StartEvent(replaying=worker_pb2.Replaying(done=event.done, total=event.total))
        case Tokens():
            tokens = [token_to_wire(token) for token in event.tokens]
            times = None if event.times is None else first_token_times_to_wire(event.times)
            return worker_pb2.StartEvent(tokens=worker_pb2.Tokens(attempt=event.attempt, tokens=tokens, times=times))
        case Finished():
            finished = worker_pb2.Finished(
                reason=event.reason.value,
                prompt_tokens=event.prompt_tokens,
                cached_tokens=event.cached_tokens,
                completion_tokens=event.completion_tokens,
            )
            return worker_pb2.StartEvent(finished=finished)
        case Progress():
            return worker_pb2.StartEvent(progress=_progress_to_wire(event))
        case Attached():
            return worker_pb2.StartEvent(attached=worker_pb2.Attached(context=event.context))
        case Failed():
            return worker_pb2.StartEvent(failed=_failed_to_wire(event))


def start_event_from_wire(message: worker_pb2.StartEvent) -> StartEvent:
    match message.WhichOneof("event"):
        case "tokens":  # the one that comes often
            return _tokens_from_wire(message.tokens)
        case "admitted":
            return Admitted(
                resident_prefix=_page_aligned("resident_prefix", message.admitted.resident_prefix),
                secret=_secret("secret", message.admitted.secret),
            )
        case "fetching":
            return Fetching(pages=message.fetching.pages)
        case "replaying":
            replaying = message.replaying
            if replaying.done > replaying.total:
                _refuse("replaying", f"{replaying.done} done of {replaying.total}")
            return Replaying(done=replaying.done, total=replaying.total)
        case "finished":
            return _finished_from_wire(message.finished)
        case "progress":
            return _progress_from_wire(message.progress)
        case "attached":
            return Attached(context=message.attached.context)
        case "failed":
            return _failed_from_wire(message.failed)
        case _:
            _refuse("event", "the message carries no event this version knows")


def _tokens_from_wire(message: worker_pb2.Tokens) -> Tokens:
    tokens = tuple([token_from_wire(token) for token in message.tokens])
    if not tokens:
        _refuse("tokens", "a Tokens event must carry at least one token")
    for index, token in enumerate(tokens, start=tokens[0].index):
        if token.index != index:
            _refuse("tokens", f"indices {[token.index for token in tokens]} are not consecutive")
    times = first_token_times_from_wire(message.times) if message.HasField("times") else None
    return Tokens(attempt=message.attempt, tokens=tokens, times=times)


def _finished_from_wire(message: worker_pb2.Finished) -> Finished:
    try:
        reason = FinishReason(message.reason)
    except ValueError:
        _refuse("reason", f"{message.reason[:80]!r} is not one of {', '.join(FinishReason)}")
    return Finished(
        reason=reason,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
    )


def run_event_to_wire(event: RunEvent) -> worker_pb2.RunEvent:
    match event:
        case Progress():
            return worker_pb2.RunEvent(progress=_progress_to_wire(event))
        case RunFinished():
            return worker_pb2.RunEvent(
                finished=worker_pb2.RunFinished(prompt_tokens=event.prompt_tokens, cached_tokens=event.cached_tokens)
            )
        case Failed():
            return worker_pb2.RunEvent(failed=_failed_to_wire(event))


def run_event_from_wire(message: worker_pb2.RunEvent) -> RunEvent:
    match message.WhichOneof("event"):
        case "progress":
            return _progress_from_wire(message.progress)
        case "finished":
            return RunFinished(
                prompt_tokens=message.finished.prompt_tokens,
                cached_tokens=message.finished.cached_tokens,
            )
        case "failed":
            return _failed_from_wire(message.failed)
        case _:
            _refuse("event", "the message carries no event this version knows")


# Probes


def probe_reply_to_wire(reply: ProbeReply) -> worker_pb2.ProbeReply:
    return worker_pb2.ProbeReply(
        num_bytes=reply.num_bytes,
        page_bytes=reply.page_bytes,
        window_bytes=reply.window_bytes,
        page_us=reply.page_us,
        large_us=reply.large_us,
        connect_us=reply.connect_us,
        carrier=reply.carrier,
        device=reply.device,
    )


def probe_reply_from_wire(message: worker_pb2.ProbeReply) -> ProbeReply:
    return ProbeReply(
        num_bytes=message.num_bytes,
        page_bytes=message.page_bytes,
        window_bytes=message.window_bytes,
        page_us=tuple(message.page_us),
        large_us=tuple(message.large_us),
        connect_us=message.connect_us,
        carrier=message.carrier,
        device=message.device,
    )
