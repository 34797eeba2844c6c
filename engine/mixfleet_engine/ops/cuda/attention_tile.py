"""The one way in which rows of queries look at their context, whoever asks.

**Bits.** A context is cut into splits of a fixed length, counted from its first token, and a split
into blocks of fixed length. Within a split the blocks are added up one after the other (online
softmax, arXiv 1805.02867); then the splits are, in their order. A row's result hangs on its own
context only: not on the step that computes it, be it a decode or a chunk of a prompt, and not on
the rows beside it. Blocks and splits that a row may not see change nothing, to the bit: their
shares are 0, and what there was is multiplied by 1.

**Rows.** The R query heads that share a KV head are neighbouring rows, filled up to a power of two,
so a key is read once for all of them. Decodes fill them up to what the GPU's matrix instruction
takes, so decodes and prefills multiply by the same one: 64 rows of a warp group, or 16 of a warp.
How rows and columns then lie in warps may differ, and decides nothing.
"""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import INTERPRETED, product, rounded

SPLIT: Final = 512
"""Tokens of context of a split."""
BLOCK_S: Final = 64
"""Tokens of context that are looked at together."""
BLOCK_M: Final = 64
"""Rows of one warp group."""
LOG2_E: Final = 1.4426950408889634
NOTHING: Final = tl.constexpr(float("-inf"))


def sizes_of(q: Tensor, keys: Tensor, split: int) -> dict[str, Any]:
    """Return the sizes that the kernels are made for."""
    _, block_size, num_kv, head_dim = keys.shape
    return {
        "H": q.shape[1],
        "G": num_kv,
        "A": head_dim,
        "BLOCK_SIZE": block_size,
        "SPLIT": split,
    }


@triton.jit
def split_of_context(
    q,
    row_positions,
    keys_ptr,
    values_ptr,
    table_ptr,
    first,
    end,
    scale,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the highest score ``[M]``, the sum of shares ``[M]`` and the mixed values ``[M, A]``.

    ``q`` ``[M, A]`` are rows, each of which sees the context up to and with its own position.
    Keys and values are of one KV head of the layer, slots ``STRIDE`` numbers apart; ``table_ptr``
    has the sequence's blocks. The split begins at ``first``, a multiple of ``BLOCK_S``, and ends
    before ``end``, with the last position that any row sees if not earlier. ``scale`` makes
    scores to the base 2.
    """
    highest = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, A], tl.float32)
    columns = tl.arange(0, A)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        places = start + tl.arange(0, BLOCK_S)
        is_context = places < end
        blocks = tl.load(table_ptr + places // BLOCK_SIZE, mask=is_context, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + places % BLOCK_SIZE
        # What stands in a slot of nobody may be a NaN, which a share of 0 would not hide.
        keys = tl.load(
            keys_ptr + slots[None, :] * STRIDE + columns[:, None],
            mask=is_context[None, :],
            other=0.0,
        )
        values = tl.load(
            values_ptr + slots[:, None] * STRIDE + columns[None, :],
            mask=is_context[:, None],
            other=0.0,
        )
        scores = product(q, _like(keys, q), tl.zeros([BLOCK_M, BLOCK_S], tl.float32)) * scale
        scores = tl.where(places[None, :] <= row_positions[:, None], scores, NOTHING)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == NOTHING, 0.0, higher)
        shares = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = tl.fma(total, shrink, row_sums(shares, BLOCK_M, BLOCK_S))
        mixed *= shrink[:, None]
        mixed = product(rounded(shares, q.dtype), _like(values, q), mixed)
        highest = higher
    return highest, total, mixed


@triton.jit
def merged(highest, total, mixed, split_highest, split_total, split_mixed):
    """Return what is known of a context with one more split, the next in order.

    Totals and scores have one axis less than the mixed values.
    """
    higher = tl.maximum(highest, split_highest)
    base = tl.where(higher == NOTHING, 0.0, higher)
    shrink, split_shrink = tl.exp2(highest - base), tl.exp2(split_highest - base)
    total = tl.fma(total, shrink, split_total * split_shrink)
    mixed = tl.fma(
        mixed,
        tl.expand_dims(shrink, -1) + tl.zeros_like(mixed),
        split_mixed * tl.expand_dims(split_shrink, -1),
    )
    return higher, total, mixed


@triton.jit
def row_sums(numbers, M: tl.constexpr, N: tl.constexpr):
    """Return the sum of each row of ``[M, N]``: its halves added up, then theirs, down to one.

    Of two numbers at a time, so in one order however they lie in threads and warps; `tl.sum` of a
    whole row follows the layout, and the matrix units before Hopper's have one per tile height.
    """
    WIDTH: tl.constexpr = N // 2
    halved = tl.sum(tl.reshape(numbers, [M, 2, WIDTH]), axis=1)
    if WIDTH == 1:
        return tl.reshape(halved, [M])
    else:  # noqa: RET505 (what follows a return would be compiled too)
        return row_sums(halved, M, WIDTH)


@triton.jit
def _like(cached, q):
    """Return numbers of the cache in the dtype of the queries, exactly."""
    if INTERPRETED:
        return cached.to(tl.float32)
    else:  # noqa: RET505 (what follows a return would be compiled too)
        return cached.to(q.dtype)
