"""The row codec, byte for byte against an encoder of its own, on both engines."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import native
from engine.kernels.rows import Kind, Layout, RowPool, read_rows, write_rows

CODES = [
    (-1 if code & 0x80 else 1)
    * ((code & 7) * 2.0**-9 if (code >> 3 & 15) == 0 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7))
    for code in range(256)
]
POSITIVE = CODES[:0x7F]  # 0 to 448, ascending; 0x7f is NaN


def make_pool(kind: Kind, layout: Layout, rows_per_item: int, items: int = 4, dim: int | None = None) -> RowPool:
    dim = dim or {"latent": 512, "index": 128}[kind]
    item_bytes = RowPool.item_bytes_for(rows_per_item, kind, layout, dim, 64)
    data = torch.full((items, item_bytes), 0xAB, dtype=torch.uint8)
    return RowPool(data, rows_per_item, kind, layout, dim, 64)


def scale_exponent(values: list[float]) -> int:
    """The smallest e with max(amax, 1e-4) <= 448 * 2^e, in exact arithmetic."""
    amax = max(max(abs(v) for v in values), float(np.float32(1e-4)))
    exponent = math.frexp(amax)[1] - 10
    while amax > math.ldexp(448.0, exponent):
        exponent += 1
    return exponent


def nearest_code(value: float) -> int:
    """The e4m3 code nearest to |value| <= 448, the even one of two equally near, with the sign of value."""
    size = abs(value)
    best = min(range(len(POSITIVE)), key=lambda code: (abs(POSITIVE[code] - size), code & 1))
    return best | (0x80 if math.copysign(1, value) < 0 else 0)


def bfloat16_bits(value: float) -> bytes:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low, high = bits & 0xFFFF, bits >> 16
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high & 1)))


def latent_bytes(row: list[float]) -> tuple[bytes, bytes]:
    codes, scales = bytearray(), bytearray()
    for start in range(0, 448, 64):
        group = row[start : start + 64]
        exponent = scale_exponent(group)
        codes += bytes(nearest_code(math.ldexp(v, -exponent)) for v in group)
        scales.append(exponent + 127)
    return bytes(codes) + b"".join(bfloat16_bits(v) for v in row[448:]), bytes(scales) + b"\0"


def lively_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    """Rows whose groups span twenty powers of ten, with zeros, halves of a code's step and exact powers of two."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator)
    groups = rows.view(count, -1, 64)
    groups *= 10.0 ** (torch.rand(count, dim // 64, 1, generator=generator) * 20 - 8)
    groups[torch.rand(groups.shape, generator=generator) < 0.05] = 0.0
    rows[0] = 0.0
    rows[1] = 1e-30
    rows[2] = -3e38
    for i, amax in enumerate([448.0, 224.0, 1.75, 1.0, 2.0, 0.5, 2.0**-20, 2.0**40], start=3):
        rows[i] = rows[i].clamp(-1, 1) * (amax * 0.999)
        rows[i, ::64] = amax
    rows[11] = torch.arange(dim) % 64 * 7.0 + 3.5  # many ties between neighbouring codes under scale 1
    rows[11, ::64] = 448.0
    rows[12, ::64] = float(np.nextafter(np.float32(448), np.float32(1e3)))  # one step too much for its power of two
    rows[12, 1::64] = 2.0**-9 * 1.5
    return rows


@pytest.mark.parametrize(("rows_per_item", "item_bytes"), [(256, 149_760), (64, 37_440), (2, 1_728)])
def test_a_v4_latent_item_has_the_production_stride(rows_per_item, item_bytes):
    assert RowPool.item_bytes_for(rows_per_item, "latent", "v4", 512, 64) == item_bytes


def test_a_v4_index_item_has_the_production_stride():
    assert RowPool.item_bytes_for(64, "index", "v4", 128, 64) == 8_448


def test_v4_latents_are_the_bytes_an_encoder_written_apart_gives(engine):
    pool = make_pool("latent", "v4", rows_per_item=64)
    values = lively_rows(24, 512, seed=3)
    ids = torch.randperm(192, generator=torch.Generator().manual_seed(4))[:24] + 64
    write_rows(pool, ids, values)
    for row, value in zip(ids.tolist(), values.tolist(), strict=True):
        item = bytes(pool.data[row // 64].tolist())
        data, scales = latent_bytes(value)
        assert item[row % 64 * 576 :][:576] == data
        assert item[64 * 576 + row % 64 * 8 :][:8] == scales


def test_v4_index_rows_are_the_bytes_an_encoder_written_apart_gives(engine):
    pool = make_pool("index", "v4", rows_per_item=64)
    values = lively_rows(24, 128, seed=5)
    ids = torch.randperm(192, generator=torch.Generator().manual_seed(6))[:24] + 64
    write_rows(pool, ids, values)
    for row, value in zip(ids.tolist(), values.tolist(), strict=True):
        item = bytes(pool.data[row // 64].tolist())
        exponent = scale_exponent(value)
        assert item[row % 64 * 128 :][:128] == bytes(nearest_code(math.ldexp(v, -exponent)) for v in value)
        assert item[64 * 128 + row % 64 * 4 :][:4] == struct.pack("<f", math.ldexp(1.0, exponent))


def test_writing_a_row_touches_no_byte_of_another(engine):
    for kind, layout in [("latent", "v4"), ("index", "v4"), ("latent", "exact")]:
        pool = make_pool(kind, layout, rows_per_item=64)
        write_rows(pool, torch.tensor([64 + 5]), torch.ones(1, pool.dim))
        row_bytes = {"latent": 584, "index": 132}[kind] if layout == "v4" else 2048
        assert 0 < int((pool.data != 0xAB).sum()) <= row_bytes
        assert torch.all(pool.data[[0, 2, 3]] == 0xAB)


def test_every_code_and_scale_reads_back_as_the_number_it_stands_for(engine):
    pool = make_pool("latent", "v4", rows_per_item=2)
    for exponent in (105, 120, 127, 150, 240):
        codes = [code for code in range(256) if code & 0x7F != 0x7F] + [0] * (448 - 254)
        pool.data[1, :448] = torch.tensor(codes, dtype=torch.uint8)
        pool.data[1, 448:576] = torch.tensor([1.5, -2.0] * 32, dtype=torch.bfloat16).view(torch.uint8)
        pool.data[1, 1152:1159] = exponent
        expected = [math.ldexp(CODES[code], exponent - 127) for code in codes] + [1.5, -2.0] * 32
        assert read_rows(pool, torch.tensor([2]))[0].tolist() == expected


def test_exact_rows_come_back_bit_for_bit_at_any_width(engine):
    for dim in (1, 12, 128, 512):
        pool = make_pool("latent", "exact", rows_per_item=3, dim=dim)
        values = torch.randn(9, dim)
        write_rows(pool, torch.arange(3, 12), values)
        assert torch.equal(read_rows(pool, torch.arange(3, 12)), values)


def test_no_rows_are_written_and_read_without_fuss(engine):
    for kind, layout in [("latent", "v4"), ("index", "v4"), ("latent", "exact")]:
        pool = make_pool(kind, layout, rows_per_item=64)
        none = torch.empty(0, dtype=torch.int64)
        write_rows(pool, none, torch.empty(0, pool.dim))
        assert torch.all(pool.data == 0xAB)
        assert read_rows(pool, none).shape == (0, pool.dim)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_value_stays_visible_and_spoils_only_its_scale_group(engine, broken):
    latent, index = make_pool("latent", "v4", 64), make_pool("index", "v4", 64)
    values = torch.ones(2, 512)
    values[0, 70] = broken
    write_rows(latent, torch.tensor([70, 71]), values)
    write_rows(index, torch.tensor([70, 71]), values[:, :128].contiguous())
    back = read_rows(latent, torch.tensor([70, 71]))
    assert back[0, 64:128].isnan().all()
    assert torch.equal(back[0, :64], torch.ones(64))
    assert torch.equal(back[1], torch.ones(512))
    back = read_rows(index, torch.tensor([70, 71]))
    assert back[0].isnan().all()
    assert torch.equal(back[1], torch.ones(128))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantised_values_are_within_half_a_step_and_encoding_twice_changes_nothing(data):
    finite = st.floats(-(2.0**100), 2.0**100, width=32)
    group = data.draw(st.lists(finite, min_size=1, max_size=8))
    row = torch.tensor((group * 512)[:512])
    for reference in (True, False):
        native.use_reference(reference)
        try:
            pool = make_pool("latent", "v4", rows_per_item=2)
            write_rows(pool, torch.tensor([2]), row[None])
            back = read_rows(pool, torch.tensor([2]))
            write_rows(pool, torch.tensor([2]), back)
        finally:
            native.use_reference(False)
        assert torch.equal(read_rows(pool, torch.tensor([2])), back)
        step = 2.0 ** scale_exponent(row[:448].tolist()) * 2.0**-9
        error = (back[0, :448].double() - row[:448].double()).abs()
        assert torch.all(error <= torch.maximum(row[:448].double().abs() / 16, torch.tensor(step / 2)))


def test_both_engines_write_the_same_bytes(native_only):
    values = lively_rows(200, 512, seed=9)
    for kind, layout in [("latent", "v4"), ("index", "v4"), ("latent", "exact")]:
        pools = []
        for reference in (True, False):
            native.use_reference(reference)
            pools.append(make_pool(kind, layout, rows_per_item=64))
            write_rows(pools[-1], torch.arange(40, 240), values[:, : pools[-1].dim].contiguous())
            native.use_reference(False)
        assert torch.equal(pools[0].data, pools[1].data)


def test_a_pool_of_the_wrong_item_size_is_refused():
    with pytest.raises(ValueError, match="keeps items of 37440 bytes"):
        RowPool(torch.zeros(2, 37_376, dtype=torch.uint8), 64, "latent", "v4", 512, 64)


def test_v4_refuses_widths_it_has_no_bytes_for():
    with pytest.raises(ValueError, match="kv_layout='exact'"):
        RowPool.item_bytes_for(64, "latent", "v4", 256, 64)
    with pytest.raises(ValueError, match="kv_layout='exact'"):
        RowPool.item_bytes_for(64, "index", "v4", 64, 64)


def test_row_ids_of_another_type_are_refused():
    pool = make_pool("index", "v4", 64)
    with pytest.raises(ValueError, match="must be int64"):
        read_rows(pool, torch.tensor([1, 2], dtype=torch.int32))
