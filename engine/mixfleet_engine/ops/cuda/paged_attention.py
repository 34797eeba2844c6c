"""Attention of decodes over the paged KV cache: a program per split of a context.

One program takes one split for the heads of one KV head and leaves what it found; another takes
the splits of a head together, in their order. Programs of splits that a context does not have
leave at once, so the grid hangs on the longest context that the host allows for only.

Shape letters: T tokens, C chunks, H query heads, G KV heads, R query heads of each, A head
dimension, P splits. A decode of Mixtral 8x7B reads its sequence's 4 KiB of keys and values per
token of context and layer (fp8: 2), and does 16 K operations for each; what splits leave is 16 KiB
per 512 tokens. See `attention_tile` for what is summed how.
"""

from typing import Final

import torch
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
from mixfleet_engine.ops.cuda.dialect import INTERPRETED, rounded

_WARP_ROWS: Final = 16
"""Rows of the matrix instruction of GPUs without one for warp groups."""


def decode(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, mixed: Tensor, split: int
) -> None:
    """Write attention of the first ``num_decodes`` chunks to their rows of ``mixed``."""
    sizes = sizes_of(q, keys, split)
    padded = triton.next_power_of_2(sizes["H"] // sizes["G"])
    num_chunks, num_splits = chunks.num_decodes, triton.cdiv(chunks.max_context, split)
    # Of one split there is nothing to merge.
    parts = sums = None
    if num_splits > 1:
        shape = (num_chunks, q.shape[1], num_splits)
        parts = torch.empty(*shape, q.shape[2], dtype=torch.float32, device=q.device)
        sums = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    _decode_splits[(num_chunks, sizes["G"], num_splits)](
        q,
        keys,
        values,
        chunks.first_rows,
        chunks.num_rows,
        chunks.starts,
        chunks.block_tables,
        mixed,
        parts,
        sums,
        chunks.block_tables.stride(0),
        q.shape[2] ** -0.5 * LOG2_E,
        **sizes,
        BLOCK_M=max(padded, _decode_rows()),
        BLOCK_S=min(BLOCK_S, split),
        STAGES=3,
        num_warps=4,
    )
    if parts is not None:
        _merge_splits[(num_chunks, q.shape[1])](
            parts,
            sums,
            chunks.first_rows,
            chunks.num_rows,
            chunks.starts,
            mixed,
            num_splits,
            H=sizes["H"],
            A=sizes["A"],
            SPLIT=split,
            num_warps=1,
        )


def _decode_rows() -> int:
    """Return the rows that one matrix instruction of the current GPU takes."""
    if INTERPRETED.value:
        return BLOCK_M
    capability = triton.runtime.driver.active.get_current_target().arch
    # The newest for desks have no instruction for warp groups either.
    return BLOCK_M if 90 <= capability < 120 else _WARP_ROWS


@triton.jit
def _decode_splits(
    q_ptr,
    keys_ptr,
    values_ptr,
    first_rows_ptr,
    num_rows_ptr,
    starts_ptr,
    tables_ptr,
    out_ptr,
    parts_ptr,
    sums_ptr,
    table_stride,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one sequence's context, for the heads of one KV head."""
    chunk, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    R: tl.constexpr = H // G
    position = tl.load(starts_ptr + chunk)
    first = split * SPLIT
    is_real = tl.load(num_rows_ptr + chunk) > 0
    if not is_real or first > position:
        return
    row = tl.load(first_rows_ptr + chunk).to(tl.int64)
    ranks = tl.arange(0, BLOCK_M)
    heads = head * R + ranks
    columns = tl.arange(0, A)
    q = tl.load(
        q_ptr + row * H * A + heads[:, None] * A + columns[None, :],
        mask=(ranks < R)[:, None],
        other=0.0,
    )
    highest, total, mixed = split_of_context(
        q,
        tl.zeros([BLOCK_M], tl.int32) + position,
        keys_ptr + head * A,
        values_ptr + head * A,
        tables_ptr + chunk.to(tl.int64) * table_stride,
        first,
        tl.minimum(first + SPLIT, position + 1),
        scale,
        BLOCK_SIZE,
        G * A,
        A,
        BLOCK_M,
        BLOCK_S,
        STAGES,
    )
    is_head = ranks < R
    if parts_ptr is None:
        out = mixed / total[:, None]
        tl.store(
            out_ptr + row * H * A + heads[:, None] * A + columns[None, :],
            rounded(out, out_ptr.dtype.element_ty),
            mask=is_head[:, None],
        )
    else:
        at = (chunk.to(tl.int64) * H + heads) * num_splits + split
        sums_stride = tl.num_programs(0) * H * num_splits
        tl.store(sums_ptr + at, highest, mask=is_head)
        tl.store(sums_ptr + sums_stride + at, total, mask=is_head)
        tl.store(parts_ptr + at[:, None] * A + columns[None, :], mixed, mask=is_head[:, None])


@triton.jit
def _merge_splits(
    parts_ptr,
    sums_ptr,
    first_rows_ptr,
    num_rows_ptr,
    starts_ptr,
    out_ptr,
    num_splits,
    H: tl.constexpr,
    A: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All splits of one head of one sequence, in their order."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    if tl.load(num_rows_ptr + chunk) == 0:
        return
    num_seen = tl.load(starts_ptr + chunk) // SPLIT + 1
    row = tl.load(first_rows_ptr + chunk).to(tl.int64)
    columns = tl.arange(0, A)[None, :]
    at = (chunk.to(tl.int64) * H + head) * num_splits
    sums_stride = tl.num_programs(0) * H * num_splits
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([1, A], tl.float32)
    one = tl.arange(0, 1)
    for split in range(num_seen):
        highest, total, mixed = merged(
            highest,
            total,
            mixed,
            tl.load(sums_ptr + at + split + one),
            tl.load(sums_ptr + sums_stride + at + split + one),
            tl.load(parts_ptr + (at + split) * A + columns),
        )
    out = mixed / total[:, None]
    tl.store(out_ptr + row * H * A + head * A + columns, rounded(out, out_ptr.dtype.element_ty))
