"""Attention of prefills over the paged KV cache: a program per some neighbouring rows of a chunk.

A program walks the whole context of its rows, split by split, and takes the splits together as
decodes do. Programs of rows that a chunk does not have leave at once.

Shape letters: T tokens, C chunks, H query heads, G KV heads, R query heads of each, A head
dimension. A prefilled token of Mixtral 8x7B does 16 K operations per layer for each token before
it; a tile of 128 rows is 32 tokens, which read 4 KiB (fp8: 2) for each of those together. See
`attention_tile` for what is summed how.
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.attention_tile import (
    BLOCK_M,
    BLOCK_S,
    LOG2_E,
    merged,
    sizes_of,
    split_of_context,
)
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from mixfleet_engine.ops.cuda.dialect import rounded

WARP_GROUPS: Final = 2


def prefill(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, mixed: Tensor, split: int
) -> None:
    """Write attention of the chunks behind the decodes to their rows of ``mixed``."""
    sizes = sizes_of(q, keys, split)
    rows = BLOCK_M * WARP_GROUPS
    padded = triton.next_power_of_2(sizes["H"] // sizes["G"])
    num_tiles = triton.cdiv(chunks.max_rows * padded, rows)
    first = chunks.num_decodes
    _prefill_rows[(num_tiles, sizes["G"], len(chunks.num_rows) - first)](
        q,
        keys,
        values,
        chunks.first_rows[first:],
        chunks.num_rows[first:],
        chunks.starts[first:],
        chunks.block_tables[first:],
        mixed,
        num_tiles,
        chunks.block_tables.stride(0),
        q.shape[2] ** -0.5 * LOG2_E,
        **sizes,
        R_PAD=padded,
        BLOCK_M=rows,
        BLOCK_S=min(BLOCK_S, split),
        STAGES=2,
        num_warps=4 * WARP_GROUPS,
    )


@triton.jit
def _prefill_rows(
    q_ptr,
    keys_ptr,
    values_ptr,
    first_rows_ptr,
    num_rows_ptr,
    starts_ptr,
    tables_ptr,
    out_ptr,
    num_tiles,
    table_stride,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some neighbouring tokens of one sequence, for the heads of one KV head."""
    # The last tokens have most to look at: they begin first.
    tile, head, chunk = num_tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = BLOCK_M // R_PAD
    R: tl.constexpr = H // G
    num_rows = tl.load(num_rows_ptr + chunk)
    if tile * TOKENS >= num_rows:
        return
    start = tl.load(starts_ptr + chunk)
    places = tl.arange(0, BLOCK_M)
    tokens, ranks = tile * TOKENS + places // R_PAD, places % R_PAD
    is_row = (tokens < num_rows) & (ranks < R)
    rows = tl.load(first_rows_ptr + chunk).to(tl.int64) + tokens
    columns = tl.arange(0, A)
    at = rows[:, None] * H * A + (head * R + ranks)[:, None] * A + columns[None, :]
    q = tl.load(q_ptr + at, mask=is_row[:, None], other=0.0)
    end = start + tl.minimum(num_rows, (tile + 1) * TOKENS)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, A], tl.float32)
    for first in range(0, end, SPLIT):
        split_highest, split_total, split_mixed = split_of_context(
            q,
            start + tokens,
            keys_ptr + head * A,
            values_ptr + head * A,
            tables_ptr + chunk.to(tl.int64) * table_stride,
            first,
            tl.minimum(first + SPLIT, end),
            scale,
            BLOCK_SIZE,
            G * A,
            A,
            BLOCK_M,
            BLOCK_S,
            STAGES,
        )
        highest, total, mixed = merged(
            highest, total, mixed, split_highest, split_total, split_mixed
        )
    tl.store(
        out_ptr + at,
        rounded(mixed / total[:, None], out_ptr.dtype.element_ty),
        mask=is_row[:, None],
    )
