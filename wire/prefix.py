"""What a page of a prompt is called, by every process that has to agree: a digest of all tokens up to its end.

A page's digest covers its 256 token ids and the digest of the page before it; the first page's parent is drawn
from a namespace. So one 128-bit digest stands for a whole prefix within one namespace: equal digests mean equal
tokens from the start, of the same model, tenant and cache salt, and nothing is compared token by token.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from wire.types import PAGE_TOKENS

DIGEST_BYTES = 16
MAX_NAMESPACE_BYTES = 64
DEFAULT_TENANT = "default"

_PAGE_BYTES = 4 * PAGE_TOKENS
_BLOCK_TOKENS = 1 << 14
"""Ids converted in one call: enough to make calls cheap, little enough (0.2 ms) to let other threads run in between."""
# array("I") is 4 bytes on every platform CPython supports, but C only promises 2.
_UINT32 = next(code for code in "IL" if array(code).itemsize == 4)


def namespace(model_fingerprint: str, tenant: str = DEFAULT_TENANT, cache_salt: str = "") -> bytes:
    """The 16 bytes that keep prefixes of different models, tenants or salts apart.

    It does not tell the salt, and stands in for it in messages and events.
    """
    parts = b"".join(
        len(part).to_bytes(4, "little") + part  # lengths, so that no two lists of parts spell the same bytes
        for part in (text.encode() for text in (model_fingerprint, tenant, cache_salt))
    )
    return blake2b(parts, digest_size=DIGEST_BYTES, person=b"penumbra-space").digest()


def root(namespace: bytes) -> bytes:
    """The parent of a namespace's first pages. Raises ValueError for more than 64 bytes."""
    if len(namespace) > MAX_NAMESPACE_BYTES:
        raise ValueError(f"a namespace has at most {MAX_NAMESPACE_BYTES} bytes, got {len(namespace)}")
    return blake2b(namespace, digest_size=DIGEST_BYTES, person=b"penumbra-root").digest()


def page_hashes(tokens: Sequence[int], namespace: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """The digest of every whole page of `tokens`, first page first; a last part of a page has none.

    tokens     ids in [0, 2**32), from position 0; OverflowError for others
    namespace  at most 64 bytes
    known      digests of the leading pages from an earlier call, which are not computed again
    ->         len(tokens) // 256 digests of 16 bytes
    """
    num_pages = len(tokens) // PAGE_TOKENS
    digests = list(known[:num_pages])
    return _extend(digests, pack_tokens(tokens[len(digests) * PAGE_TOKENS : num_pages * PAGE_TOKENS]), namespace)


def packed_page_hashes(ids: bytes, namespace: bytes) -> list[bytes]:
    """`page_hashes` of ids packed by `pack_tokens`: who sends a prompt anyway need not convert it twice."""
    return _extend([], ids, namespace)


def _extend(digests: list[bytes], ids: bytes, namespace: bytes) -> list[bytes]:
    parent = digests[-1] if digests else root(namespace)
    for start in range(0, len(ids) // _PAGE_BYTES * _PAGE_BYTES, _PAGE_BYTES):
        parent = blake2b(parent + ids[start : start + _PAGE_BYTES], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return digests


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32. Raises OverflowError for an id outside [0, 2**32)."""
    return b"".join(_pack(tokens[at : at + _BLOCK_TOKENS]) for at in range(0, len(tokens), _BLOCK_TOKENS))


def token_view(packed: bytes) -> Sequence[int]:
    """The ids that `pack_tokens` packed, each made an integer only when it is asked for."""
    if sys.byteorder == "little":
        return memoryview(packed).cast("I" if _UINT32 == "I" else "L")
    unpacked = array(_UINT32, packed)
    unpacked.byteswap()
    return unpacked


def _pack(tokens: Sequence[int]) -> bytes:
    packed = array(_UINT32, tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
