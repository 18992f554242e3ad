"""Messages survive the wire unchanged, and half-formed ones are refused by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import convert
from wire.errors import InvalidRequest, WorkerLost
from wire.types import (
    PAGE_TOKENS,
    Admitted,
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
    Progress,
    PromptScores,
    Region,
    RegionClass,
    RunFinished,
    RunRequest,
    SamplingParams,
    StartRequest,
    Tail,
    TokenEvent,
    Tokens,
    WorkerRef,
)
from wire.v1 import kv_pb2, worker_pb2

ROOT = Path(__file__).parents[2]

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ids = st.text("abcXYZ019-_:é", min_size=1, max_size=40)
worker_ids = st.from_regex(convert.WORKER_ID, fullmatch=True)
secrets = st.binary(min_size=16, max_size=16)
logprobs = st.floats(allow_nan=False, width=32)
pages = st.integers(0, 2**40).map(lambda n: n * PAGE_TOKENS)

scores = st.integers(0, 5).flatmap(
    lambda n: st.builds(
        PromptScores,
        logprobs=st.tuples(*[logprobs] * n),
        top_ids=st.tuples(*[u32] * 2 * n),
        top_logprobs=st.tuples(*[logprobs] * 2 * n),
    )
)
tokens = st.builds(
    TokenEvent,
    index=u32,
    token_id=u32,
    logprob=logprobs,
    top=st.lists(st.tuples(u32, logprobs)).map(tuple),
    prompt=st.none() | scores,
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**64 - 1),
    seed=u64,
    choice=u32,
    temperature=st.floats(0, 100),
    top_k=u32,
    top_p=st.floats(2**-10, 1),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(2**-10, 100),
    logit_bias=st.lists(st.tuples(u32, st.floats(-100, 100))).map(tuple),
    min_tokens=st.integers(0, 2**64 - 1),
    grammar=st.text(max_size=50),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(u32).map(tuple),
    ignore_eos=st.booleans(),
)
prompts = st.lists(u32, min_size=1, max_size=50).map(tuple)
refs = st.builds(WorkerRef, worker_id=worker_ids, address=ids, epoch=u64)
regions = st.builds(
    Region,
    name=ids,
    address=st.integers(0, 2**62),
    item_bytes=st.integers(1, 2**30),
    num_items=st.integers(1, 2**30),
)
cards = st.builds(
    OwnerCard,
    worker_id=worker_ids,
    epoch=u64,
    transport=ids,
    agent=ids,
    metadata=st.binary(),
    memory=st.sampled_from(["DRAM", "VRAM"]),
    device=u32,
    signature=ids,
    classes=st.lists(
        st.builds(
            RegionClass,
            name=st.sampled_from(PageClass),
            regions=st.lists(regions, max_size=3).map(tuple),
        ),
        max_size=3,
        unique_by=lambda c: c.name,
    ).map(tuple),
)


@st.composite
def groups(draw: st.DrawFn) -> PageGroup:
    n = draw(st.integers(1, 5))
    column = lambda values: tuple(draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    return PageGroup(
        page_class=draw(st.sampled_from(PageClass)),
        positions=column(u32),
        items=column(u32),
        generations=column(u64),
        checksums=column(u64),
    )


prefill_times = st.builds(PrefillTimes, queue_us=u64, compute_us=u64)
first_token_times = st.builds(
    FirstTokenTimes, admit_us=u64, pages_us=u64, transfer_us=u64, emit_us=u64, prefill=prefill_times
)
tails = st.integers(1, 2**40).flatmap(
    lambda n: st.builds(
        Tail,
        prompt_tokens=st.just(n),
        cached_tokens=st.integers(0, n),
        first=tokens,
        total_pages=u64,
        times=prefill_times,
    )
)
offers = st.one_of(
    st.builds(PageOffer, seq=st.just(0), claim_id=ids, owner=cards),
    st.builds(
        PageOffer,
        seq=st.integers(1, 2**32 - 1),
        claim_id=ids,
        groups=st.lists(groups(), max_size=3).map(tuple),
        tail=st.none() | tails,
    ),
)
claims = st.builds(
    ClaimRequest,
    request_id=ids,
    attempt=u32,
    from_token=pages,
    secret=secrets,
    reader_id=worker_ids,
    reader_epoch=u64,
    signature=ids,
)
starts = st.builds(
    StartRequest,
    request_id=ids,
    attempt=u32,
    prompt=prompts,
    sampling=sampling,
    source=refs,
    emitted=st.lists(u32, max_size=20).map(tuple),
    namespace=st.binary(max_size=64),
)
runs = st.builds(
    RunRequest,
    request_id=ids,
    attempt=u32,
    prompt=prompts,
    sampling=sampling,
    skip=st.just(0),
    secret=secrets,
    namespace=st.binary(max_size=64),
)
failures = st.builds(Failed, code=ids, message=st.text(), retryable=st.booleans())
start_events = st.one_of(
    st.builds(Admitted, resident_prefix=pages, secret=secrets),
    st.builds(Fetching, pages=u64),
    st.builds(
        lambda attempt, batch, times: Tokens(
            attempt=attempt,
            times=times,
            tokens=tuple(replace(t, index=i) for i, t in enumerate(batch)),
        ),
        u32,
        st.lists(tokens, min_size=1, max_size=4),
        st.none() | first_token_times,
    ),
    st.builds(
        Finished,
        reason=st.sampled_from(FinishReason),
        prompt_tokens=u64,
        cached_tokens=u64,
        completion_tokens=u64,
    ),
    failures,
)
run_events = st.one_of(
    st.integers(0, 2**60).flatmap(
        lambda n: st.builds(Progress, done=st.integers(0, n), total=st.just(n), cached=st.integers(0, n))
    ),
    st.builds(RunFinished, prompt_tokens=u64, cached_tokens=u64),
    failures,
)

PAIRS = {
    "owner_card": (cards, kv_pb2.OwnerCard),
    "page_offer": (offers, kv_pb2.PageOffer),
    "claim_request": (claims, kv_pb2.ClaimRequest),
    "start_request": (starts, worker_pb2.StartRequest),
    "run_request": (runs, worker_pb2.RunRequest),
    "start_event": (start_events, worker_pb2.StartEvent),
    "run_event": (run_events, worker_pb2.RunEvent),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire_unchanged(name: str, data: st.DataObject) -> None:
    strategy, message_type = PAIRS[name]
    value = data.draw(strategy)
    to_wire, from_wire = getattr(convert, f"{name}_to_wire"), getattr(convert, f"{name}_from_wire")
    sent = to_wire(value).SerializeToString()
    assert from_wire(message_type.FromString(sent)) == value


def test_token_ids_are_packed_as_little_endian_uint32() -> None:
    assert convert.pack_tokens([1, 0x01020304]) == b"\x01\x00\x00\x00\x04\x03\x02\x01"
    with pytest.raises(OverflowError):
        convert.pack_tokens([2**32])


def good_start() -> worker_pb2.StartRequest:
    return convert.start_request_to_wire(
        StartRequest(
            request_id="r1",
            attempt=0,
            prompt=(5, 6, 7),
            sampling=SamplingParams(max_tokens=4, seed=1),
            source=WorkerRef(worker_id="prefill-0", address="127.0.0.1:1", epoch=3),
        )
    )


@pytest.mark.parametrize(
    ("spoil", "param"),
    [
        (lambda m: m.ClearField("prompt"), "prompt"),
        (lambda m: setattr(m, "prompt", b"\x01\x02\x03"), "prompt"),
        (lambda m: setattr(m, "request_id", ""), "request_id"),
        (lambda m: setattr(m, "request_id", "a\nb"), "request_id"),
        (lambda m: setattr(m, "request_id", "a" * 257), "request_id"),
        (lambda m: setattr(m.sampling, "max_tokens", 0), "max_tokens"),
        (lambda m: setattr(m.sampling, "temperature", -1.0), "temperature"),
        (lambda m: setattr(m.sampling, "temperature", float("nan")), "temperature"),
        (lambda m: setattr(m.sampling, "top_p", 0.0), "top_p"),
        (lambda m: setattr(m.sampling, "top_p", 1.5), "top_p"),
        (lambda m: setattr(m.sampling, "min_p", 1.5), "min_p"),
        (lambda m: setattr(m.sampling, "min_p", float("nan")), "min_p"),
        (lambda m: setattr(m.sampling, "presence_penalty", float("inf")), "presence_penalty"),
        (lambda m: setattr(m.sampling, "frequency_penalty", float("nan")), "frequency_penalty"),
        (lambda m: setattr(m.sampling, "repetition_penalty", -1.0), "repetition_penalty"),
        (lambda m: m.sampling.logit_bias.add(id=1, bias=float("nan")), "logit_bias"),
        (lambda m: setattr(m.sampling, "grammar", "a" * (256 * 1024 + 1)), "grammar"),
        (lambda m: setattr(m.sampling, "top_logprobs", 21), "top_logprobs"),
        (lambda m: setattr(m.sampling, "prompt_logprobs", 21), "prompt_logprobs"),
        (lambda m: setattr(m.source, "worker_id", "Prefill:0"), "worker_id"),
        (lambda m: setattr(m.source, "address", ""), "address"),
        (lambda m: setattr(m.resume, "tokens", b"\x01"), "resume"),
        (lambda m: setattr(m, "namespace", bytes(65)), "namespace"),
    ],
)
def test_a_bad_start_request_is_refused_naming_the_field(spoil, param: str) -> None:
    message = good_start()
    spoil(message)
    with pytest.raises(InvalidRequest) as refused:
        convert.start_request_from_wire(message)
    assert refused.value.param == param


def good_claim() -> kv_pb2.ClaimRequest:
    return convert.claim_request_to_wire(
        ClaimRequest(
            request_id="r1",
            attempt=0,
            from_token=512,
            secret=bytes(16),
            reader_id="decode-0",
            reader_epoch=1,
            signature="s",
        )
    )


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_secret_that_is_not_16_bytes_is_refused(length: int) -> None:
    message = good_claim()
    message.secret = bytes(length)
    with pytest.raises(InvalidRequest, match=f"secret: must be 16 bytes, got {length}"):
        convert.claim_request_from_wire(message)


def test_a_claim_inside_a_page_is_refused() -> None:
    message = good_claim()
    message.from_token = 100
    with pytest.raises(InvalidRequest, match="from_token: 100 is not a multiple of 256"):
        convert.claim_request_from_wire(message)


def test_a_skip_beyond_the_prompt_is_refused() -> None:
    message = convert.run_request_to_wire(
        RunRequest(
            request_id="r",
            attempt=0,
            prompt=(1,) * 300,
            sampling=SamplingParams(max_tokens=1, seed=0),
            skip=256,
            secret=bytes(16),
        )
    )
    assert convert.run_request_from_wire(message).skip == 256
    message.skip = 512
    with pytest.raises(InvalidRequest, match="skip: 512 tokens to skip of a prompt of 300"):
        convert.run_request_from_wire(message)


def test_page_lists_of_unequal_length_are_refused() -> None:
    message = kv_pb2.PageOffer(seq=1, claim_id="c")
    message.groups.add(page_class="full", positions=[0, 1], items=[4], generations=[1, 1], checksums=[9, 9])
    with pytest.raises(InvalidRequest, match=r"groups: \[2, 1, 2, 2\]"):
        convert.page_offer_from_wire(message)


def test_an_unknown_page_class_is_refused() -> None:
    message = kv_pb2.PageOffer(seq=1, claim_id="c")
    message.groups.add(page_class="disk", positions=[0], items=[4], generations=[1], checksums=[9])
    with pytest.raises(InvalidRequest, match="'disk' is not one of full, swa, state"):
        convert.page_offer_from_wire(message)


def test_an_owner_card_travels_on_offer_0_and_nowhere_else() -> None:
    with pytest.raises(InvalidRequest, match="offer 0 carries the owner's card"):
        convert.page_offer_from_wire(kv_pb2.PageOffer(seq=0, claim_id="c"))
    late = kv_pb2.PageOffer(seq=3, claim_id="c", owner=kv_pb2.OwnerCard(worker_id="w"))
    with pytest.raises(InvalidRequest, match="offer 3"):
        convert.page_offer_from_wire(late)


def test_a_region_beyond_the_address_space_is_refused() -> None:
    card = kv_pb2.OwnerCard(worker_id="w", transport="nixl", agent="a", memory="DRAM", signature="s")
    card.classes.add(name="full").regions.add(name="c4", address=2**64 - 10, item_bytes=11, num_items=1)
    with pytest.raises(InvalidRequest, match="c4 reaches beyond the address space"):
        convert.owner_card_from_wire(card)


def test_tokens_out_of_order_are_refused() -> None:
    event = worker_pb2.StartEvent(tokens=worker_pb2.Tokens(tokens=[kv_pb2.Token(index=4), kv_pb2.Token(index=6)]))
    with pytest.raises(InvalidRequest, match=r"\[4, 6\] are not consecutive"):
        convert.start_event_from_wire(event)


def test_an_event_of_a_later_version_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no event this version knows"):
        convert.start_event_from_wire(worker_pb2.StartEvent())


def test_an_unknown_finish_reason_is_refused() -> None:
    event = worker_pb2.StartEvent(finished=worker_pb2.Finished(reason="tired"))
    with pytest.raises(InvalidRequest, match="'tired' is not one of stop, length"):
        convert.start_event_from_wire(event)


def test_a_failure_keeps_its_code_and_whether_to_retry() -> None:
    assert convert.failed_from_error(WorkerLost("gone")) == Failed(code="worker_lost", message="gone", retryable=True)


def test_the_committed_stubs_are_what_the_contracts_generate(tmp_path: Path) -> None:
    contracts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto/wire/v1").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, *contracts],
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / "wire/v1").iterdir()}
    committed = {name: (ROOT / "wire/v1" / name).read_text() for name in fresh}
    assert len(fresh) == 3 * len(contracts)
    assert fresh == committed, "run `make stubs` and commit wire/v1"
