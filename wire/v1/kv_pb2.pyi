from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Region(_message.Message):
    __slots__ = ("name", "address", "item_bytes", "num_items")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ITEM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ITEMS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: int
    item_bytes: int
    num_items: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[int] = ..., item_bytes: _Optional[int] = ..., num_items: _Optional[int] = ...) -> None: ...

class RegionClass(_message.Message):
    __slots__ = ("name", "regions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, name: _Optional[str] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class OwnerCard(_message.Message):
    __slots__ = ("worker_id", "epoch", "transport", "agent", "metadata", "memory", "device", "signature", "classes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    transport: str
    agent: str
    metadata: bytes
    memory: str
    device: int
    signature: str
    classes: _containers.RepeatedCompositeFieldContainer[RegionClass]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., transport: _Optional[str] = ..., agent: _Optional[str] = ..., metadata: _Optional[bytes] = ..., memory: _Optional[str] = ..., device: _Optional[int] = ..., signature: _Optional[str] = ..., classes: _Optional[_Iterable[_Union[RegionClass, _Mapping]]] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "from_token", "secret", "reader_id", "reader_epoch", "signature")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    READER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    from_token: int
    secret: bytes
    reader_id: str
    reader_epoch: int
    signature: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., from_token: _Optional[int] = ..., secret: _Optional[bytes] = ..., reader_id: _Optional[str] = ..., reader_epoch: _Optional[int] = ..., signature: _Optional[str] = ...) -> None: ...

class PageGroup(_message.Message):
    __slots__ = ("page_class", "positions", "items", "generations", "checksums")
    PAGE_CLASS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    page_class: str
    positions: _containers.RepeatedScalarFieldContainer[int]
    items: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, page_class: _Optional[str] = ..., positions: _Optional[_Iterable[int]] = ..., items: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("index", "id", "logprob", "top", "prompt")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    prompt: PromptScores
    def __init__(self, index: _Optional[int] = ..., id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., prompt: _Optional[_Union[PromptScores, _Mapping]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("logprobs", "top_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PrefillTimes(_message.Message):
    __slots__ = ("queue_us", "compute_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class Tail(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "first", "total_pages", "times")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    first: Token
    total_pages: int
    times: PrefillTimes
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., first: _Optional[_Union[Token, _Mapping]] = ..., total_pages: _Optional[int] = ..., times: _Optional[_Union[PrefillTimes, _Mapping]] = ...) -> None: ...

class PageOffer(_message.Message):
    __slots__ = ("seq", "claim_id", "owner", "groups", "tail")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CLAIM_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    seq: int
    claim_id: str
    owner: OwnerCard
    groups: _containers.RepeatedCompositeFieldContainer[PageGroup]
    tail: Tail
    def __init__(self, seq: _Optional[int] = ..., claim_id: _Optional[str] = ..., owner: _Optional[_Union[OwnerCard, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[PageGroup, _Mapping]]] = ..., tail: _Optional[_Union[Tail, _Mapping]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("claim_id", "secret")
    CLAIM_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    claim_id: str
    secret: bytes
    def __init__(self, claim_id: _Optional[str] = ..., secret: _Optional[bytes] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("valid",)
    VALID_FIELD_NUMBER: _ClassVar[int]
    valid: bool
    def __init__(self, valid: _Optional[bool] = ...) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("num_bytes", "reader_id", "signature")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    reader_id: str
    signature: str
    def __init__(self, num_bytes: _Optional[int] = ..., reader_id: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...
