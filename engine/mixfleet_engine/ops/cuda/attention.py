"""Attention of a step over the paged KV cache: decodes by split, prefills by rows.

Shape letters: T tokens, C chunks, H query heads, G KV heads, R query heads of each, A head
dimension, S tokens of context, P splits of it. A decode of Mixtral 8x7B reads its sequence's 4 KiB
of keys and values per token of context and layer (fp8: 2), and does 16 K operations for each; a
prefilled token does as many for each token before it. See `attention_tile` for what it sums how.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.ops.cuda.attention_tile import (
    BLOCK_M,
    BLOCK_S,
    LOG2_E,
    SPLIT,
    merged,
    split_of_context,
)
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from mixfleet_engine.ops.cuda.dialect import rounded

PREFILL_WARP_GROUPS: Final = 2
_LEAST_HEAD_DIM: Final = 16


def check_head_dim(head_dim: int) -> None:
    """Raise ConfigError if heads of this dimension cannot be attended to."""
    if head_dim < _LEAST_HEAD_DIM or head_dim != triton.next_power_of_2(head_dim):
        raise ConfigError(
            f"head_dim={head_dim}: the cuda back-end takes powers of two from {_LEAST_HEAD_DIM}; "
            "use backend='reference'"
        )


def attend(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, *, split: int = SPLIT
) -> Tensor:
    """Return causal attention of the step's tokens over their own contexts, ``[T, H, A]``.

    Args:
        q: ``[T, H, A]``.
        keys: The layer's cache ``[num_blocks, block_size, G, A]``, the step's own tokens in it; in
            the dtype of ``q`` or float8_e4m3fn.
        values: The same.
        chunks: Where the sequences stand. Rows of no chunk get zeros.
        split: Tokens of a split; another number gives other last bits.
    """
    assert q.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert chunks.block_tables.stride(1) == 1
    mixed = torch.zeros_like(q) if chunks.max_rows > 1 else torch.empty_like(q)
    num_chunks = len(chunks.num_rows)
    if chunks.num_decodes:
        _decode(q, keys, values, chunks, mixed, split)
    if num_chunks > chunks.num_decodes:
        _prefill(q, keys, values, chunks, mixed, split)
    return mixed


def _sizes(q: Tensor, keys: Tensor, split: int) -> dict[str, Any]:
    _, block_size, num_kv, head_dim = keys.shape
    return {
        "H": q.shape[1],
        "G": num_kv,
        "A": head_dim,
        "BLOCK_SIZE": block_size,
        "SPLIT": split,
    }


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, mixed: Tensor, split: int
) -> None:
    sizes = _sizes(q, keys, split)
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
        BLOCK_M=BLOCK_M,
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


def _prefill(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, mixed: Tensor, split: int
) -> None:
    sizes = _sizes(q, keys, split)
    rows = BLOCK_M * PREFILL_WARP_GROUPS
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
        num_warps=4 * PREFILL_WARP_GROUPS,
    )


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
