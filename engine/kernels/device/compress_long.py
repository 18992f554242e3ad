"""The binding of engine/csrc/compress_long.cu: the compressors' rows of a step of many tokens, at what memory gives."""

from __future__ import annotations

import ctypes

from torch import Tensor

from engine.batch import StepMeta
from engine.config import C4_RATIO, C128_RATIO
from engine.kernels.device import cuda_products
from engine.kernels.rows import INDEX_DIM, LATENT_DIM, ROPE_DIM, RowPool
from wire.types import PAGE_TOKENS

LEAST_TOKENS = 256
"""Of fewer a multiprocessor has less than one C4 row, and two all C128 rows there are: nothing to stream."""
SHARED_BYTES = {(LATENT_DIM, C4_RATIO): 131_312, (INDEX_DIM, C4_RATIO): 132_032, (LATENT_DIM, C128_RATIO): 131_312}
"""Of a block, as in the source; for rows of so many values, of so many tokens."""
THREADS = {LATENT_DIM: 320, INDEX_DIM: 512}
"""Likewise: eight warps, and one for each group of them that makes a row."""
_BLOCKS = 132
"""One for each multiprocessor of a Hopper GPU, whose tokens may close many rows or none."""
_ALIGNED = 16


def takes(
    u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, freqs: Tensor, out: RowPool,
    rotate_keys: bool = False,
) -> bool:  # fmt: skip
    """Whether `compress` takes these, of shapes that belong together."""
    dim, ratio = norm.shape[0], ape.shape[0]
    kind = "index" if dim == INDEX_DIM else "latent"
    return (
        u.shape[0] >= LEAST_TOKENS
        and cuda_products()
        and (dim, ratio) in SHARED_BYTES
        and (out.layout, out.kind, out.dim, out.rows_per_item) == ("v4", kind, dim, PAGE_TOKENS // ratio)
        and 2 * freqs.shape[0] == ROPE_DIM
        and not (rotate_keys and kind == "latent")
        and all(x.stride(1) == 1 and x.stride(0) * x.element_size() % _ALIGNED == 0 for x in (u, g))
        and out.data.stride(0) % _ALIGNED == 0
        and all(x.data_ptr() % _ALIGNED == 0 for x in (u, g, ape, norm, ring, out.data))
    )


def compress(
    u: Tensor, g: Tensor, ape: Tensor, norm: Tensor, ring: Tensor, meta: StepMeta, freqs: Tensor, eps: float,
    out: RowPool, rotate_keys: bool = False,
) -> None:  # fmt: skip
    """The rows that `engine.kernels.compress.compress_c4` or `compress_c128` make, by the shape of ape.

    Of the rings only C4's entries of tokens that are among the last 16 of a page, neither of the one that their segment
    begins in nor among the segment's last 16.
    """
    from engine.kernels.device.cuda import kernel, run

    dim, ratio = norm.shape[0], ape.shape[0]
    name = (
        f"penumbra_compress_c{ratio}_{'latents' if out.kind == 'latent' else 'keys'}{'_turned' if rotate_keys else ''}"
    )
    shared = SHARED_BYTES[dim, ratio]
    int32, int64 = ctypes.c_int32, ctypes.c_int64
    run(
        kernel("compress_long.cu", name, shared), _BLOCKS, THREADS[dim], shared,
        u, int64(u.stride(0)), g, int64(g.stride(0)), ape, norm, ring, meta.positions, meta.segment, meta.offsets,
        meta.starts, meta.page_table, meta.swa_table if ratio == C4_RATIO else meta.slots,
        int32(meta.page_table.shape[1]), freqs, ctypes.c_float(eps), out.data, int64(out.data.stride(0)),
        int32(u.shape[0]), waits=True,
    )  # fmt: skip
