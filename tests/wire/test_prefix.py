"""Page digests: equal exactly where tokens and namespace are equal, and the same in every process."""

from __future__ import annotations

import itertools
import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.prefix import namespace, pack_tokens, packed_page_hashes, page_hashes, root
from wire.types import PAGE_TOKENS

SPACE = namespace("model")
prompts = st.builds(
    lambda num_tokens, seed: [(seed * 2_654_435_761 + i * 40_503) % 2**32 for i in range(num_tokens)],
    st.integers(0, 5 * PAGE_TOKENS),
    st.integers(0, 2**32 - 1),
)


def test_digests_are_what_the_definition_says() -> None:
    prompt = list(range(2 * PAGE_TOKENS + 10))
    first = blake2b(root(SPACE) + pack_tokens(prompt[:256]), digest_size=16).digest()
    second = blake2b(first + pack_tokens(prompt[256:512]), digest_size=16).digest()
    assert page_hashes(prompt, SPACE) == [first, second]


def test_digests_never_change_between_versions() -> None:
    """Processes of two versions share pages during a rollout: a change here is a change of the protocol."""
    assert namespace("model", "default", "").hex() == "c3c578606f4b8ecf1d8411b5f1a84e9b"
    assert [digest.hex() for digest in page_hashes(range(512), SPACE)] == [
        "e2482a83757d36d4201f4bbf92d2d10a",
        "da446100184c7a4262bf5f2897f531cc",
    ]


@given(prompts, st.integers(0, 5 * PAGE_TOKENS), st.integers(1, 2**32 - 1))
def test_a_changed_token_changes_its_page_and_all_later_ones_only(prompt: list[int], at: int, by: int) -> None:
    before = page_hashes(prompt, SPACE)
    assert len(before) == len(set(before)) == len(prompt) // PAGE_TOKENS
    if at >= len(prompt):
        return
    changed = [*prompt[:at], (prompt[at] + by) % 2**32, *prompt[at + 1 :]]
    after = page_hashes(changed, SPACE)
    page = at // PAGE_TOKENS
    assert after[:page] == before[:page]
    assert not set(after[page:]) & set(before)


@given(prompts, st.integers(0, 6))
def test_digests_continue_from_known_ones(prompt: list[int], num_known: int) -> None:
    whole = page_hashes(prompt, SPACE)
    assert page_hashes(tuple(prompt), SPACE, known=whole[:num_known]) == whole


@given(prompts)
def test_a_packed_prompt_has_the_same_digests(prompt: list[int]) -> None:
    assert packed_page_hashes(pack_tokens(prompt), SPACE) == page_hashes(prompt, SPACE)


def test_a_prompt_longer_than_one_block_is_packed_whole() -> None:
    prompt = range(40_000)
    assert pack_tokens(prompt) == struct.pack("<40000I", *prompt)
    assert page_hashes(prompt, SPACE)[-1] == page_hashes(prompt, SPACE, known=page_hashes(prompt[:20_000], SPACE))[-1]


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8)), max_size=6, unique=True))
def test_nothing_aliases_across_models_tenants_or_salts(parts: list[tuple[str, str, str]]) -> None:
    prompt = range(PAGE_TOKENS)
    digests = [page_hashes(prompt, namespace(*part))[0] for part in parts]
    assert len(set(digests)) == len(parts)


def test_moving_a_character_between_the_parts_of_a_namespace_changes_it() -> None:
    spaces = {namespace(*parts) for parts in itertools.product(("", "a", "ab"), ("", "b", "ab"), ("", "a", "b"))}
    assert len(spaces) == 27


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_uint32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        page_hashes([token] * PAGE_TOKENS, SPACE)


def test_a_namespace_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes, got 65"):
        page_hashes([], b"x" * 65)
