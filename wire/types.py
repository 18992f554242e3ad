"""Types that cross a process boundary. Frozen; no torch, no I/O.

A *position* is a page's index within its request (token position // PAGE_TOKENS); an *item* is a page's
place in one worker's pool. Readers and owners pair pages by position, never by each other's items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

PAGE_TOKENS = 256
"""Virtual slots in a page, on every worker: a multiple of both compression ratios (4 and 128)."""

PROTOCOL_VERSION = 1


class PageClass(StrEnum):
    """Pools addressed together by one list of item ids."""

    FULL = "full"  # C4, C4 index and C128 rows of 256 tokens
    SWA = "swa"  # window rows of every layer and both C4 rings of 256 tokens
    STATE = "state"  # half a request slot's C128 rings: 128 raw rows of every C128 layer


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class AttemptId(NamedTuple):
    """One try of one request: what claims, runs and pages are held for. Later tries count up."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}/{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens of one request are drawn. `seed` is always set: the router draws one when the client gives none.

    Together with the prompt and the tokens emitted so far this is all that another worker needs to go on.
    """

    max_tokens: int
    seed: int
    choice: int = 0  # which of the answers to one prompt; part of the key of the noise
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what to add to its logit)
    min_tokens: int = 0  # neither EOS nor a stop token before
    logprobs: bool = False
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: str = field(default="", repr=False)  # llguidance grammar the answer must follow; empty: none
    prompt_logprobs: int | None = None  # alternatives for each token of the prompt; None: not even its log probability


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRef:
    worker_id: str
    address: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a decode worker has measured on its reads from one other worker, of late: verification included."""

    source: str  # worker id
    bytes_per_s: int
    p50_us: int  # of one read job
    reads: int  # ever, those of this life of the reader
    read_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker's record in the registry. A hint for placement, never the authority on anything."""

    worker_id: str
    role: Role
    address: str  # gRPC host:port
    http_address: str = ""  # health and metrics, host:port
    epoch: int
    model: str  # fingerprint of the checkpoint
    signature: str  # layout signature of its pages
    protocol: int = PROTOCOL_VERSION
    draining: bool = False
    max_context: int = 0
    free_tokens: int = 0  # full-pool tokens not spoken for
    total_tokens: int = 0
    running: int = 0
    waiting: int = 0
    max_requests: int = 0  # running at once, at most; 0: it does not say
    queued_tokens: int = 0
    queued_depth: int = 0  # of prompts being computed: tokens in front of what comes next, on average
    # What the worker has measured on itself; 0 while it has not.
    prefill_token_ns: int = 0  # computing one prompt token at the start of a prompt
    prefill_depth_ns: int = 0  # and so much more for each 1,024 tokens in front of it
    transfer_bytes_per_s: int = 0  # reading pages from others
    exposed_us: int = 0  # from the last offer of a prompt's pages to its first token
    kv_token_bytes: int = 0  # page bytes of one token
    local_prefill: bool = False  # a decode worker that computes prompts itself when asked to
    computing_tokens: int = 0  # of such prompts, not computed yet
    # For people who look: nothing is decided by these.
    free_pages: int = 0  # of the full pool, by state
    used_pages: int = 0
    cached_pages: int = 0
    quarantined_pages: int = 0
    read_bytes: int = 0  # ever, from other workers
    reading_bytes: int = 0  # submitted and not yet verified
    links: tuple[Link, ...] = ()  # the pairs it has read over last
    rdma_ports: int = 0  # active ones of its host

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(worker_id=self.worker_id, address=self.address, epoch=self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One address range of `num_items` items of `item_bytes`, back to back."""

    name: str
    address: int
    item_bytes: int
    num_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionClass:
    """Regions that one list of item ids addresses together, in an order both sides share."""

    name: PageClass
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerCard:
    """What a reader needs to reach an owner's memory."""

    worker_id: str
    epoch: int
    transport: str
    agent: str
    metadata: bytes = field(repr=False)
    memory: str = "DRAM"
    device: int = 0
    signature: str
    classes: tuple[RegionClass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Pages of one class that are ready to be read; the tuples run in parallel."""

    page_class: PageClass
    positions: tuple[int, ...]
    items: tuple[int, ...]
    generations: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Log probabilities of a prompt's tokens from the second on: the model's own, whatever the sampling options.

    Flat, since there may be many: as many alternatives stand beside each, the most likely first.
    """

    logprobs: tuple[float, ...] = field(repr=False)
    top_ids: tuple[int, ...] = field(default=(), repr=False)
    top_logprobs: tuple[float, ...] = field(default=(), repr=False)

    def top(self, n: int) -> tuple[tuple[int, float], ...]:
        """(id, logprob) of the alternatives beside the n-th of `logprobs`."""
        width = len(self.top_ids) // len(self.logprobs)
        part = slice(n * width, (n + 1) * width)
        return tuple(zip(self.top_ids[part], self.top_logprobs[part], strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token. `index` 0 is the first; `top` holds (id, logprob), most likely first."""

    index: int
    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    prompt: PromptScores | None = None  # with the first, if they were asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTimes:
    """Where a prompt's time went on the worker that computed it: microseconds on that worker's own clock."""

    queue_us: int = 0  # from Run to its first step
    compute_us: int = 0  # from there to the last offer, turns given to other prompts included


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenTimes:
    """Where the time to token 0 went, part after part: microseconds on the decode worker's own clock."""

    admit_us: int = 0  # from Start to Admitted
    pages_us: int = 0  # from there to the last offer: prefill, as it is waited for
    transfer_us: int = 0  # from there to the last verified page: what prefill did not hide
    emit_us: int = 0  # from there to the message with token 0
    prefill: PrefillTimes = PrefillTimes()  # as the last offer told them


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What decoding needs besides pages; comes with the last offer."""

    prompt_tokens: int
    cached_tokens: int
    first: TokenEvent
    total_pages: int
    times: PrefillTimes = PrefillTimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOffer:
    """One message of a claim. `seq` 0 carries the owner's card and no pages; the last carries the tail."""

    seq: int
    claim_id: str
    owner: OwnerCard | None = None
    groups: tuple[PageGroup, ...] = ()
    tail: Tail | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRequest:
    request_id: str
    attempt: int
    from_token: int
    secret: bytes = field(repr=False)
    reader_id: str
    reader_epoch: int
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """Decode this request; pull its pages from `source`, or compute them here if there is none. `emitted` tokens are
    replayed, not sampled again.
    """

    request_id: str
    attempt: int
    prompt: Sequence[int] = field(repr=False)
    sampling: SamplingParams
    source: WorkerRef | None
    emitted: tuple[int, ...] = ()
    namespace: bytes = b""  # `wire.prefix.namespace`: pages are shared within one only
    keep_s: int = 0  # how long the answer outlives the last call that reads it
    context: bytes = field(default=b"", repr=False)  # for whoever attaches to it then


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """Prefill this request; whoever shows `secret` may claim its pages from token `skip` on.

    With `hold` the call goes on after the result: while it does, and while there is room, the pages stay for a later
    attempt of the request, with another secret and reader.
    """

    request_id: str
    attempt: int
    prompt: Sequence[int] = field(repr=False)
    sampling: SamplingParams
    skip: int
    secret: bytes = field(repr=False)
    namespace: bytes = b""  # as in StartRequest
    hold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReply:
    """How reads from one other worker went. Times are microseconds and include verification."""

    num_bytes: int  # of each large read
    page_bytes: int  # of one full page
    window_bytes: int  # of what a request moves besides its full pages
    page_us: tuple[int, ...]  # each read of a single page
    large_us: tuple[int, ...]
    connect_us: int  # the first read, which also makes the connection
    carrier: str  # "rdma", "tcp", "memory" or "unknown": whose counters on the reader's host moved
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """Read the answer of a run that was started with `keep_s` in this life of the worker."""

    request_id: str
    attempt: int
    epoch: int


# Events of Decode.Start, Decode.Attach and Prefill.Run streams.


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The first event of an Attach; all tokens from index 0 on follow, those drawn elsewhere as ids only."""

    context: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    resident_prefix: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaying:
    """The prompt's pages are here; `done` of the `total` tokens emitted elsewhere have been computed again."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    attempt: int
    tokens: tuple[TokenEvent, ...]
    times: FirstTokenTimes | None = None  # with token 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The attempt ended without an answer. `code` is a `wire.errors` code; a retryable one may go elsewhere."""

    code: str
    message: str
    retryable: bool


StartEvent = Admitted | Fetching | Progress | Replaying | Tokens | Finished | Failed | Attached
RunEvent = Progress | RunFinished | Failed


# What a worker's prefix cache tells about itself; digests are those of `wire.prefix`.


@dataclass(frozen=True, slots=True)
class Stored:
    """These pages can be matched now, each the child of the one before; `parent` is the first one's."""

    digests: tuple[bytes, ...] = field(repr=False)
    parent: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Removed:
    """These pages can not be matched any more."""

    digests: tuple[bytes, ...] = field(repr=False)


PrefixEvent = Stored | Removed
