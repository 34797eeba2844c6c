"""Products of very few tokens with the weights: no matrix instruction, no sorting by expert.

One to four tokens are read-bound by far: a program streams some rows of one matrix past one token.
With small programs even a matrix of few rows keeps the whole memory busy, which the tiles of `gemm`
cannot do. Its sums run in another order than theirs, so it is for those who do not ask for
the same bits in any batch. Among themselves its results do not depend on the number of tokens.

Shape letters: T tokens, P pairs of token and expert, K input width, N output width, F expert width.
For one token of Mixtral 8x7B a layer reads two experts (44 million numbers each for both products
of one) and 42 million numbers of attention, and does 2 operations for each.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import rounded
from mixfleet_engine.ops.cuda.packed import WORDS, PackedWeight
from mixfleet_engine.ops.cuda.unpack import int4_quarters, int8_halves
from mixfleet_engine.weight_formats import INT4_GROUP

MOST_TOKENS: Final = 4
_ROWS: Final = 16
"""Rows of a program: 16 of 512 inputs are 128 bytes from each of 4 warps' threads."""
_INPUTS: Final = 512
_WARPS: Final = 4
STAGES: Final = tl.constexpr(4)
"""Steps along K whose bytes are on their way at the same time."""


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
    width = weight.n // 2 if swiglu else weight.n
    if len(out) == 0:
        return
    _gemv[(triton.cdiv(width, _ROWS), len(out))](
        x,
        weight.values,
        weight.scales,
        weight.zeros,
        chosen,
        out,
        N=width,
        K=weight.k,
        FORM=weight.form,
        SWIGLU=swiglu,
        PAIRS_OF_ROW=len(out) // len(x),
        ADD=add,
        BLOCK_N=_ROWS,
        BLOCK_K=_INPUTS,
        GROUP_K=INT4_GROUP,
        WORDS=WORDS.get(weight.form, INT4_GROUP),
        PTX=x.dtype == torch.bfloat16,
        num_warps=_WARPS,
    )


@triton.jit
def _gemv(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    chosen_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    PAIRS_OF_ROW: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_row = n
    if N % BLOCK_N != 0:
        n_row = tl.minimum(n, N - 1)
    x_ptr += (pair // PAIRS_OF_ROW) * K
    ROWS: tl.constexpr = N * (2 if SWIGLU else 1)
    GROUPS: tl.constexpr = (K + GROUP_K - 1) // GROUP_K
    expert = tl.zeros([], tl.int64)
    if chosen_ptr is not None:
        expert = tl.load(chosen_ptr + pair).to(tl.int64)
    if FORM == "plain" or FORM == "fp8":
        w_ptr += expert * ROWS * K
    else:
        w_ptr += expert * ROWS * (GROUPS * WORDS)
    if scales_ptr is not None:
        scales_ptr += expert * ROWS * (GROUPS if FORM == "int4" else 1)
    if zeros_ptr is not None:
        zeros_ptr += expert * ROWS * GROUPS
    found = _rows(
        x_ptr, w_ptr, scales_ptr, zeros_ptr, n_row, ROWS, K, FORM, BLOCK_N, BLOCK_K, GROUP_K, WORDS,
        PTX,
    )  # fmt: skip
    if SWIGLU:
        up = _rows(
            x_ptr, w_ptr, scales_ptr, zeros_ptr, N + n_row, ROWS, K, FORM, BLOCK_N, BLOCK_K,
            GROUP_K, WORDS, PTX,
        )  # fmt: skip
    if SWIGLU:
        small = tl.exp(-tl.abs(found))  # never above 1, wherever the gate is
        found = found * tl.where(found < 0, small, 1.0) / (1.0 + small) * up
    out_ptrs = out_ptr + pair.to(tl.int64) * N + n
    if ADD:
        found += tl.load(out_ptrs, mask=n < N, other=0.0)
    tl.store(out_ptrs, rounded(found, out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _rows(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    n,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return ``[BLOCK_N]`` products of rows ``n`` with the token."""
    # What follows a return is compiled too, so each way is a branch.
    if FORM == "int4":
        return _int4_rows(
            x_ptr, w_ptr, scales_ptr, zeros_ptr, n, ROWS, K, BLOCK_N, BLOCK_K, GROUP_K, WORDS, PTX
        )
    elif FORM == "int8":
        found = _int8_rows(x_ptr, w_ptr, n, K, BLOCK_N, BLOCK_K, GROUP_K, WORDS, PTX)
        return found * tl.load(scales_ptr + n)
    else:
        found = _plain_rows(x_ptr, w_ptr, n, K, BLOCK_N, BLOCK_K)
        if FORM == "fp8":
            found *= tl.load(scales_ptr + n)
        return found


@triton.jit
def _plain_rows(x_ptr, w_ptr, n, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return ``[BLOCK_N]`` products of rows of numbers of one piece with the token."""
    columns = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + n[:, None] * K + columns[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptr + start + columns)
            w = tl.load(w_ptrs + start)
        else:
            inside = start + columns < K
            x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
            w = tl.load(w_ptrs + start, mask=inside[None, :], other=0.0)
        sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _int8_rows(
    x_ptr,
    w_ptr,
    n,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return ``[BLOCK_N]`` products of int8 rows, without their scales, with the token."""
    # Words are taken apart as [rows, groups, words of a group].
    AT_ONCE: tl.constexpr = BLOCK_K // GROUP_K
    GROUPS: tl.constexpr = (K + GROUP_K - 1) // GROUP_K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    word = tl.arange(0, WORDS)[None, None, :]
    sums = tl.zeros([BLOCK_N, AT_ONCE, WORDS], tl.float32)
    for first in tl.range(0, GROUPS, AT_ONCE, num_stages=STAGES):
        group = (first + tl.arange(0, AT_ONCE))[None, :, None]
        x_at = group * GROUP_K + word
        w_ptrs = w_ptr + n[:, None, None] * (GROUPS * WORDS) + group * WORDS + word
        if GROUPS % AT_ONCE == 0 and K % GROUP_K == 0:
            words = tl.load(w_ptrs)
            x_0, x_1 = tl.load(x_ptr + x_at), tl.load(x_ptr + x_at + WORDS)
        else:
            words = tl.load(w_ptrs, mask=group < GROUPS, other=0)
            x_0 = tl.load(x_ptr + x_at, mask=x_at < K, other=0.0)
            x_1 = tl.load(x_ptr + x_at + WORDS, mask=x_at + WORDS < K, other=0.0)
        w_0, w_1 = int8_halves(words, dtype, PTX)
        sums += w_0.to(tl.float32) * x_0.to(tl.float32)
        sums += w_1.to(tl.float32) * x_1.to(tl.float32)
    return tl.sum(tl.sum(sums, axis=2), axis=1)


@triton.jit
def _int4_rows(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    n,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return ``[BLOCK_N]`` products of int4 rows with the token, several groups at a time."""
    AT_ONCE: tl.constexpr = BLOCK_K // GROUP_K
    GROUPS: tl.constexpr = (K + GROUP_K - 1) // GROUP_K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    word = tl.arange(0, WORDS)[None, None, :]
    sums = tl.zeros([BLOCK_N, AT_ONCE, WORDS], tl.float32)
    for first in tl.range(0, GROUPS, AT_ONCE, num_stages=STAGES):
        group = (first + tl.arange(0, AT_ONCE))[None, :]
        x_at = group[:, :, None] * GROUP_K + word
        x_ptrs = x_ptr + x_at
        w_ptrs = w_ptr + n[:, None, None] * (GROUPS * WORDS) + group[:, :, None] * WORDS + word
        scale_at = group * ROWS + n[:, None]
        if GROUPS % AT_ONCE == 0 and K % GROUP_K == 0:
            words = tl.load(w_ptrs)
            x_0, x_1 = tl.load(x_ptrs), tl.load(x_ptrs + WORDS)
            x_2, x_3 = tl.load(x_ptrs + 2 * WORDS), tl.load(x_ptrs + 3 * WORDS)
            scale = tl.load(scales_ptr + scale_at)
        else:
            words = tl.load(w_ptrs, mask=(group < GROUPS)[:, :, None], other=0)
            x_0 = tl.load(x_ptrs, mask=x_at < K, other=0.0)
            x_1 = tl.load(x_ptrs + WORDS, mask=x_at + WORDS < K, other=0.0)
            x_2 = tl.load(x_ptrs + 2 * WORDS, mask=x_at + 2 * WORDS < K, other=0.0)
            x_3 = tl.load(x_ptrs + 3 * WORDS, mask=x_at + 3 * WORDS < K, other=0.0)
            scale = tl.load(scales_ptr + scale_at, mask=group < GROUPS, other=0.0)
        zeros = tl.full([BLOCK_N, AT_ONCE], 8.0, tl.float32)
        if zeros_ptr is not None:
            zeros = tl.load(zeros_ptr + scale_at, mask=group < GROUPS, other=0.0)
        w_0, w_1, w_2, w_3 = int4_quarters(words, zeros[:, :, None], dtype, PTX)
        part = w_0.to(tl.float32) * x_0.to(tl.float32)
        part += w_1.to(tl.float32) * x_1.to(tl.float32)
        part += w_2.to(tl.float32) * x_2.to(tl.float32)
        part += w_3.to(tl.float32) * x_3.to(tl.float32)
        sums += part * scale[:, :, None]
    return tl.sum(tl.sum(sums, axis=2), axis=1)
