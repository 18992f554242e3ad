from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import native
from engine.kernels.checksum import item_checksums


def regions(*item_bytes: int, items: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(item_bytes))
    return [torch.randint(0, 256, (items, n), dtype=torch.uint8, generator=generator) for n in item_bytes]


def by_definition(parts: list[torch.Tensor], item: int) -> int:
    """The definition in plain integers."""
    data = b"".join(bytes(part[item].tolist()) for part in parts)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(w * ((2 * i + 1) * 0x9E3779B97F4A7C15) for i, w in enumerate(words)) % 2**64


@pytest.mark.parametrize("sizes", [(8,), (64, 8, 72), (1728, 8448), (248, 256, 264, 520)])
def test_words_are_counted_on_across_regions(engine: str, sizes: tuple[int, ...]) -> None:
    parts = regions(*sizes)
    assert item_checksums(parts, [2, 0, 2]) == [by_definition(parts, i) for i in (2, 0, 2)]


def test_the_largest_words_wrap_alike(engine: str) -> None:
    parts = [torch.full((1, 1024), 255, dtype=torch.uint8)]
    assert item_checksums(parts, [0]) == [by_definition(parts, 0)]


def test_an_item_of_zeros_sums_to_zero_and_no_items_to_nothing(engine: str) -> None:
    assert item_checksums([torch.zeros(2, 64, dtype=torch.uint8)], [1]) == [0]
    assert item_checksums(regions(64), []) == []


@settings(max_examples=100, deadline=None)
@given(data=st.data(), reference=st.booleans())
def test_any_flipped_bit_shows(data: st.DataObject, reference: bool) -> None:
    parts = regions(264, 520, items=1)
    region = data.draw(st.sampled_from(parts))
    byte, bit = data.draw(st.integers(0, region.shape[1] - 1)), data.draw(st.integers(0, 7))
    native.use_reference(reference)
    try:
        before = item_checksums(parts, [0])
        region[0, byte] ^= 1 << bit
        assert item_checksums(parts, [0]) != before
    finally:
        native.use_reference(False)


@settings(max_examples=100, deadline=None)
@given(a=st.integers(0, 97), b=st.integers(0, 97))
def test_words_that_change_places_show(a: int, b: int) -> None:
    (part,) = regions(784, items=1)
    words = part.view(torch.int64)
    before = item_checksums([part], [0])
    words[0, a], words[0, b] = words[0, b].clone(), words[0, a].clone()
    assert (item_checksums([part], [0]) != before) == (a != b)


def test_rows_of_a_wider_table_are_read_where_they_lie(engine: str) -> None:
    wide = regions(256)[0]
    assert item_checksums([wide[:, 64:128]], [3]) == item_checksums([wide[:, 64:128].contiguous()], [3])


def test_what_can_not_be_read_as_words_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        item_checksums(regions(12), [0])
    with pytest.raises(ValueError, match="region of 4 items"):
        item_checksums(regions(64), [1, 4])
    with pytest.raises(ValueError, match="region of 4 items"):
        item_checksums(regions(64), [-1])
