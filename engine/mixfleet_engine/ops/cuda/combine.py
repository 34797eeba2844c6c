"""The chosen experts' outputs of a token become one: their sum, each times its share.

The sum is made in fp32, in the order of the choices 0, 1, ..., and rounded once.

Shape letters: T tokens, D model width, K experts per token. For one token of Mixtral 8x7B it reads
two rows of 8 KiB and writes one; adding to the running sum it reads and writes 16 KiB instead.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import rounded

BLOCK: Final = 1024
WARPS: Final = 4


def combine(y: Tensor, shares: Tensor) -> Tensor:
    """Return the mixed outputs ``[T, D]`` in the dtype of ``y``, to be summed over ranks.

    Args:
        y: ``[T * K, D]`` outputs of the experts, a token's choices side by side.
        shares: ``[T, K]`` fp32.
    """
    delta = torch.empty(len(shares), y.shape[1], dtype=y.dtype, device=y.device)
    _launch(delta, y, shares, add=False)
    return delta


def combine_into(x: Tensor, y: Tensor, shares: Tensor) -> None:
    """Add the mixed outputs, unrounded, to the running sum ``x`` ``[T, D]`` fp32 in place."""
    _launch(x, y, shares, add=True)


def _launch(out: Tensor, y: Tensor, shares: Tensor, *, add: bool) -> None:
    assert out.is_contiguous()
    assert y.is_contiguous()
    assert shares.is_contiguous()
    num_tokens, top_k = shares.shape
    width = y.shape[1]
    assert out.shape == (num_tokens, width)
    assert len(y) == num_tokens * top_k
    if num_tokens:
        _combine[(num_tokens, triton.cdiv(width, BLOCK))](
            out, y, shares, D=width, K=top_k, BLOCK_D=BLOCK, ADD=add, num_warps=WARPS
        )


@triton.jit
def mixed_outputs(y_ptr, shares_ptr, row, columns, inside, D: tl.constexpr, K: tl.constexpr):
    """Return some columns of the weighted sum of a token's K rows, fp32."""
    mixed = tl.zeros_like(columns).to(tl.float32)
    for choice in tl.static_range(K):
        place = row * K + choice
        y = tl.load(y_ptr + place * D + columns, mask=inside, other=0.0).to(tl.float32)
        mixed += tl.load(shares_ptr + place) * y
    return mixed


@triton.jit
def _combine(
    out_ptr,
    y_ptr,
    shares_ptr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    found = mixed_outputs(y_ptr, shares_ptr, row, columns, inside, D, K)
    if ADD:
        found += tl.load(out_ptr + row * D + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * D + columns, rounded(found, out_ptr.dtype.element_ty), mask=inside)
