"""What becomes of a token's queries, keys and values: turned by its position, put into the cache.

Turned in fp32 and rounded once. No number is a sum, so there is no order to fix.

Shape letters: T tokens, H query heads, G KV heads, A head dimension. For one token of Mixtral 8x7B
a layer reads 12 KiB and writes 8 KiB of queries and 4 KiB (fp8: 2) of keys and values; 3
operations per number.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import rounded

HEADS: Final = 8
"""Heads of a program."""
FP8_MAX: Final = tl.constexpr(448.0)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Return the turned queries ``[T, H, A]``; keys and values go to their slots.

    Args:
        qkv: ``[T, (H + 2G) * A]``: queries, then keys, then values.
        cos: ``[context, A / 2]`` fp32; pair ``i`` of a head is (i, i + A / 2).
        sin: The same.
        positions: ``[T]`` int64.
        slots: ``[T]`` int64; -1: the token's key and value go nowhere.
        keys: The layer's cache ``[num_blocks, block_size, G, A]``; float8_e4m3fn takes the nearest
            number, the largest for one beyond it.
        values: The same.
    """
    _, _, num_kv, head_dim = keys.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv
    assert qkv.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert head_dim == triton.next_power_of_2(head_dim)
    q = torch.empty(len(qkv), num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        _rope_and_cache[(len(qkv), triton.cdiv(num_heads + 2 * num_kv, HEADS))](
            qkv,
            cos,
            sin,
            positions,
            slots,
            q,
            keys,
            values,
            H=num_heads,
            G=num_kv,
            A=head_dim,
            BLOCK_H=HEADS,
            num_warps=2,
        )
    return q


@triton.jit
def _rope_and_cache(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    half = tl.arange(0, A // 2)[None, :]
    is_head = heads < H + 2 * G
    at = token * (H + 2 * G) * A + heads * A + half
    first = tl.load(qkv_ptr + at, mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + A // 2, mask=is_head, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * (A // 2) + half)
    sin = tl.load(sin_ptr + position * (A // 2) + half)
    turns = heads < H + G  # values do not
    low = tl.where(turns, first * cos - second * sin, first)
    high = tl.where(turns, second * cos + first * sin, second)

    q_at = token * H * A + heads * A + half
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    tl.store(q_ptr + q_at, rounded(low, dtype), mask=heads < H)
    tl.store(q_ptr + q_at + A // 2, rounded(high, dtype), mask=heads < H)
    slot = tl.load(slots_ptr + token)
    # Not a part of the masks: Triton 3.9's interpreter makes numbers of a mask and one condition.
    if slot < 0:
        return
    key_at = slot * G * A + (heads - H) * A + half
    is_key = (heads >= H) & turns
    _store(keys_ptr + key_at, low, is_key)
    _store(keys_ptr + key_at + A // 2, high, is_key)
    is_value = ~turns & is_head
    _store(values_ptr + key_at - G * A, low, is_value)
    _store(values_ptr + key_at - G * A + A // 2, high, is_value)


@triton.jit
def _store(ptrs, numbers, mask):
    """Store fp32 numbers in the cache's dtype."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if dtype == tl.float8e4nv:
        numbers = tl.clamp(numbers, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptrs, rounded(numbers, dtype), mask=mask)
