"""Products of very few tokens with the weights, without tiles of many tokens and without sorting.

One to four tokens are read-bound by far, and a matrix of few rows does not even make enough of the
programs of `gemm` to keep the memory busy. Here a program has 16 rows only, and its warps walk
through the inputs side by side: four steps of 128 at a time, one for each warp, whose sums are
added up at the end. That is another order than in `gemm`, so this is for those who do not ask for
the same bits in any batch. Among themselves its results do not depend on the number of tokens.

Shape letters: T tokens, P pairs of token and expert, K input width, N output width, F expert width,
S steps at a time. For one token of Mixtral 8x7B a layer reads two experts (176 million numbers
each) and 42 million numbers of attention, and does 2 operations for each.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import rounded
from mixfleet_engine.ops.cuda.matrix_step import multiplied, operand, silu, summed
from mixfleet_engine.ops.cuda.packed import WORDS, Form, PackedWeight
from mixfleet_engine.weight_formats import INT4_GROUP

MOST_TOKENS: Final = 4
_COLUMNS: Final = 8
"""Of the smallest matrix instruction. A program has up to so many tokens, or one pair."""
_ROWS: Final = 16
"""Rows of a program: those of the smallest matrix instruction."""
_STEPS: Final = 4
"""Steps along K at a time: one for each warp."""
_STAGES: Final[dict[Form, int]] = {"plain": 3, "fp8": 4, "int8": 4, "int4": 5}
"""Steps whose bytes are on their way at the same time."""


def dense(
    x: Tensor,
    weight: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Return ``x @ weight.T`` ``[T, N]`` of the only matrix, or add it to ``add_to`` fp32."""
    out = add_to
    if out is None:
        out = torch.empty(len(x), weight.n, dtype=dtype, device=x.device)
    _launch(x, weight, None, out, add=add_to is not None)
    return out


def dense_up(x: Tensor, weight: PackedWeight, *, dtype: torch.dtype) -> Tensor:
    """Return ``silu(gate) * up`` ``[T, F]`` of the only matrix ``[2F, K]``: gate above up."""
    out = torch.empty(len(x), weight.n // 2, dtype=dtype, device=x.device)
    _launch(x, weight, None, out, swiglu=True)
    return out


def experts_up(x: Tensor, weight: PackedWeight, chosen: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return ``silu(gate) * up`` of each pair of token and expert, ``[P, F]``.

    Args:
        x: ``[T, D]``.
        weight: E matrices ``[2F, D]``: gate above up.
        chosen: ``[T, experts per token]`` int32.
        dtype: Of the result.
    """
    out = torch.empty(chosen.numel(), weight.n // 2, dtype=dtype, device=x.device)
    _launch(x, weight, chosen, out, swiglu=True)
    return out


def experts_down(h: Tensor, weight: PackedWeight, chosen: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return ``h @ weight.T`` ``[P, D]`` of each pair ``h`` ``[P, F]`` with its expert's matrix."""
    out = torch.empty(len(h), weight.n, dtype=dtype, device=h.device)
    _launch(h, weight, chosen, out)
    return out


def _launch(
    x: Tensor,
    weight: PackedWeight,
    chosen: Tensor | None,
    out: Tensor,
    *,
    swiglu: bool = False,
    add: bool = False,
) -> None:
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert x.shape[1] == weight.k
    assert chosen is None or chosen.is_contiguous()
    assert chosen is not None or len(x) <= _COLUMNS
    width = weight.n // 2 if swiglu else weight.n
    if len(out) == 0:
        return
    _gemv[(triton.cdiv(width, _ROWS), 1 if chosen is None else len(out))](
        x,
        weight.values,
        weight.scales,
        weight.zeros,
        chosen,
        out,
        len(out),
        N=width,
        K=weight.k,
        FORM=weight.form,
        SWIGLU=swiglu,
        PAIRS_OF_ROW=len(out) // len(x),
        ADD=add,
        BLOCK_N=_ROWS,
        BLOCK_T=_COLUMNS,
        BLOCK_K=INT4_GROUP,
        AT_ONCE=_STEPS,
        WORDS=WORDS.get(weight.form, INT4_GROUP),
        STAGES=_STAGES[weight.form],
        PTX=x.dtype == torch.bfloat16,
        num_warps=_STEPS,
        num_stages=_STAGES[weight.form],
    )


@triton.jit(do_not_specialize=["num_rows"])
def _gemv(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    chosen_ptr,
    out_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    PAIRS_OF_ROW: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_N, BLOCK_T]`` of the result on its side: of all tokens or of one pair."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_row = n
    if N % BLOCK_N != 0:
        n_row = tl.minimum(n, N - 1)
    column = tl.arange(0, BLOCK_T)
    expert = tl.zeros([], tl.int64)
    rows = column
    is_row = column < num_rows
    if chosen_ptr is not None:
        pair = tl.program_id(1)
        expert = tl.load(chosen_ptr + pair).to(tl.int64)
        rows = tl.zeros_like(column) + pair
        is_row = column == 0

    ROWS: tl.constexpr = N * (2 if SWIGLU else 1)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = STEPS * WORDS if FORM == "int4" or FORM == "int8" else K
    MASKED: tl.constexpr = K % (AT_ONCE * BLOCK_K) != 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ahead = tl.arange(0, AT_ONCE)[:, None, None]
    inputs = ahead * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]  # [S, 128, 1]
    words = ahead * WORDS + tl.arange(0, WORDS)[None, None, :]  # [S, 1, W]
    x_ptrs = x_ptr + (rows // PAIRS_OF_ROW)[None, None, :] * K + inputs
    w_ptrs = w_ptr + expert * ROWS * WIDTH + n_row[None, :, None] * WIDTH + words
    if FORM == "int4":
        scales_ptr += expert * STEPS * ROWS + ahead * ROWS + n_row[None, :, None]
        if zeros_ptr is not None:
            zeros_ptr += expert * STEPS * ROWS + ahead * ROWS + n_row[None, :, None]
    acc = tl.zeros([AT_ONCE, BLOCK_N, BLOCK_T], tl.float32)
    acc_up = acc
    for step in tl.range(0, STEPS, AT_ONCE, num_stages=STAGES):
        mask = is_row[None, None, :]
        if MASKED:
            mask &= step * BLOCK_K + inputs < K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=mask, other=0.0)
        w_mask = step * WORDS + words < WIDTH
        scales_mask = None
        if MASKED:
            scales_mask = step + ahead < STEPS
        at = step * ROWS
        scales_at = scales_ptr + at if FORM == "int4" else None
        zeros_at = None if zeros_ptr is None else zeros_ptr + at
        w_ptrs_at = w_ptrs + step * WORDS
        w = operand(w_ptrs_at, w_mask, zeros_at, scales_mask, FORM, MASKED, dtype, PTX)
        if SWIGLU:
            zeros_at = None if zeros_ptr is None else zeros_ptr + at + N
            w_ptrs_at += N * WIDTH
            up = operand(w_ptrs_at, w_mask, zeros_at, scales_mask, FORM, MASKED, dtype, PTX)
            part_up = multiplied(up, x, acc_up, FORM, dtype)
            up_scales_at = scales_ptr + at + N if FORM == "int4" else None
            acc_up = summed(acc_up, part_up, up_scales_at, scales_mask, FORM)
        acc = summed(acc, multiplied(w, x, acc, FORM, dtype), scales_at, scales_mask, FORM)
    found = tl.sum(acc, axis=0)
    up = found
    if SWIGLU:
        up = tl.sum(acc_up, axis=0)
    if FORM == "int8" or FORM == "fp8":
        scales_ptr += expert * ROWS + n_row
        found *= tl.load(scales_ptr)[:, None]
        if SWIGLU:
            up *= tl.load(scales_ptr + N)[:, None]
    if SWIGLU:
        found = silu(found) * up
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * N + n[:, None]
    is_ours = is_row[None, :] & (n[:, None] < N)
    if ADD:
        found += tl.load(out_ptrs, mask=is_ours, other=0.0)
    tl.store(out_ptrs, rounded(found, out_ptr.dtype.element_ty), mask=is_ours)
