"""The products of a step with its weights: dense ones, and those of the chosen experts.

**One way round.** The weights are the left operand, ``[N, K] @ [K, T]``, for any number of tokens:
64 rows of weights fill the matrix instruction of a warp group, and the tokens are its flexible side
(16 to 128). Weights in fewer bits are taken apart in registers, where the left operand may stay.

**Bits.** A number of the result is one sum along K, in steps of 128 inputs, by one program, by the
same instruction for any tile. So it depends on its row of weights and its token only.

**Forms.** Plain: as they are. int8: whole numbers are exact in bf16 and fp16; the row's scale comes
last. int4: so are 0 to 15 less the zero point; each group's product gets its scale, in fp32. fp8:
times tokens in fp8, each row of either with its scale at the end, and sums leave the matrix unit's
own narrow accumulator every 128 inputs; or, where tokens are not quantised, converted.

Shape letters: T tokens, P slots of sorted (token, choice) pairs, K input width, N output width,
F expert width, E experts. For T tokens of Mixtral 8x7B a layer moves the weights of the experts hit
(176 million numbers each: 88 MiB in int4, 168 in fp8) and 2 * T * 2 * 176 M operations; qkv and wo
have 42 million numbers.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.dialect import INTERPRETED, from_integers, product, rounded
from mixfleet_engine.ops.cuda.packed import HALF, PackedWeight
from mixfleet_engine.ops.cuda.quant import QuantisedRows
from mixfleet_engine.ops.cuda.tiles import Tiles
from mixfleet_engine.weight_formats import INT4_GROUP

STEP: Final = INT4_GROUP
"""Inputs of one step along K; also a group of int4."""
Rows = Tensor | QuantisedRows
"""Rows ``[T, K]`` of tokens; fp8 ones with their scales only for fp8 weights."""


def dense(
    x: Rows,
    weight: PackedWeight,
    tiles: Tiles,
    *,
    dtype: torch.dtype | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Return ``x @ weight.T`` ``[T, N]`` of the only matrix in ``weight``.

    Args:
        x: ``[T, K]``.
        weight: One matrix.
        tiles: How to cut.
        dtype: Of the result.
        add_to: ``[T, N]`` fp32: the product is added to it, and it is returned.
    """
    values = x.values if isinstance(x, QuantisedRows) else x
    out = add_to
    if out is None:
        out = torch.empty(len(values), weight.n, dtype=dtype, device=values.device)
    num_tiles = triton.cdiv(len(values), tiles.block_t)
    _launch(x, weight, None, out, tiles, num_tiles=num_tiles, add=add_to is not None)
    return out


def dense_up(x: Rows, weight: PackedWeight, tiles: Tiles, *, dtype: torch.dtype) -> Tensor:
    """Return ``silu(gate) * up`` ``[T, F]`` of the only matrix ``[2F, K]``: gate above up."""
    values = x.values if isinstance(x, QuantisedRows) else x
    out = torch.empty(len(values), weight.n // 2, dtype=dtype, device=values.device)
    num_tiles = triton.cdiv(len(values), tiles.block_t)
    _launch(x, weight, None, out, tiles, num_tiles=num_tiles, swiglu=True)
    return out


def experts_up(
    x: Rows, weight: PackedWeight, alignment: Alignment, tiles: Tiles, *, dtype: torch.dtype
) -> Tensor:
    """Return ``silu(gate) * up`` of each pair of token and expert, ``[T * K, F]``.

    Args:
        x: ``[T, D]``.
        weight: E matrices ``[2F, D]``: gate above up.
        alignment: Which pairs go to which expert, in tiles of ``tiles.block_t``.
        tiles: How to cut.
        dtype: Of the result.
    """
    values = x.values if isinstance(x, QuantisedRows) else x
    out = torch.empty(alignment.num_pairs, weight.n // 2, dtype=dtype, device=values.device)
    num_tiles = len(alignment.tile_experts)
    _launch(x, weight, alignment, out, tiles, num_tiles=num_tiles, swiglu=True, gather=True)
    return out


def experts_down(
    h: Rows, weight: PackedWeight, alignment: Alignment, tiles: Tiles, *, dtype: torch.dtype
) -> Tensor:
    """Return ``h @ weight.T`` of each pair with its expert's matrix, ``[T * K, D]``.

    Args:
        h: ``[T * K, F]``.
        weight: E matrices ``[D, F]``.
        alignment: As for `experts_up`.
        tiles: How to cut.
        dtype: Of the result.
    """
    values = h.values if isinstance(h, QuantisedRows) else h
    out = torch.empty(alignment.num_pairs, weight.n, dtype=dtype, device=values.device)
    num_tiles = len(alignment.tile_experts)
    _launch(h, weight, alignment, out, tiles, num_tiles=num_tiles)
    return out


def _launch(
    x: Rows,
    weight: PackedWeight,
    alignment: Alignment | None,
    out: Tensor,
    tiles: Tiles,
    *,
    num_tiles: int,
    swiglu: bool = False,
    gather: bool = False,
    add: bool = False,
) -> None:
    values, x_scales = x if isinstance(x, QuantisedRows) else (x, None)
    assert values.is_contiguous()
    assert out.is_contiguous()
    assert values.shape[1] == weight.k
    assert (x_scales is not None) <= (weight.form == "fp8")
    assert alignment is None or alignment.block_t == tiles.block_t
    width = weight.n // 2 if swiglu else weight.n
    if num_tiles == 0:
        return
    _gemm[(num_tiles * triton.cdiv(width, tiles.block_n),)](
        values,
        weight.values,
        weight.scales,
        weight.zeros,
        x_scales,
        None if alignment is None else alignment.sorted_slots,
        None if alignment is None else alignment.tile_experts,
        out,
        len(values) if alignment is None else alignment.num_pairs,
        num_tiles,
        N=width,
        K=weight.k,
        FORM=weight.form,
        SWIGLU=swiglu,
        TOP_K=alignment.top_k if alignment is not None and gather else 1,
        ADD=add,
        BLOCK_N=tiles.block_n,
        BLOCK_T=tiles.block_t,
        BLOCK_K=STEP,
        HALF_K=HALF,
        GROUP=tiles.group,
        PTX=tiles.ptx and values.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@triton.jit
def nibbles(packed, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return the low and the high numbers of bytes ``[N, J]`` less ``zeros`` ``[N, 1]``, exact.

    In PTX a number q becomes the bf16 number 128 + q by putting it below the byte 0x43, four bytes
    at a time; 128 plus the zero point is taken off after that.
    """
    if PTX and not INTERPRETED:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 lo, hi;
            and.b32 lo, $4, 0x0F0F0F0F;
            shr.u32 hi, $4, 4;
            and.b32 hi, hi, 0x0F0F0F0F;
            prmt.b32 $0, lo, 0x43434343, 0x4140;
            prmt.b32 $1, lo, 0x43434343, 0x4342;
            prmt.b32 $2, hi, 0x43434343, 0x4140;
            prmt.b32 $3, hi, 0x43434343, 0x4342;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        off = (zeros + 128.0).to(tl.bfloat16)
        return low - off, high - off
    else:  # noqa: RET505
        whole = zeros.to(tl.int8)
        low = (packed & 15).to(tl.int8) - whole
        high = (packed >> 4).to(tl.int8) - whole
        return from_integers(low, dtype), from_integers(high, dtype)


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    x_scales_ptr,
    slots_ptr,
    tile_experts_ptr,
    out_ptr,
    num_rows,
    num_tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    TOP_K: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF_K: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_N, BLOCK_T]`` of the result, turned on its side."""
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * num_tiles) * GROUP
    size = tl.minimum(N_BLOCKS - first, GROUP)
    inside = program % (GROUP * num_tiles)
    n = (first + inside % size) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = inside // size
    slots = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = 0
    if tile_experts_ptr is not None:
        expert = tl.load(tile_experts_ptr + tile)
        if expert < 0:
            return
        slots = tl.load(slots_ptr + slots)
    # Columns of padding compute the first row's numbers, which nobody stores.
    is_row = slots < num_rows
    rows = tl.where(is_row, slots, 0)
    x_rows = (rows // TOP_K).to(tl.int64)
    n_row = n
    if N % BLOCK_N != 0:
        n_row = tl.minimum(n, N - 1)

    MATRICES: tl.constexpr = 2 if SWIGLU else 1
    ROWS: tl.constexpr = N * MATRICES
    expert = expert.to(tl.int64) if tile_experts_ptr is not None else tl.zeros([], tl.int64)
    w_ptr += expert * ROWS * (K if FORM != "int4" else (K + BLOCK_K - 1) // BLOCK_K * HALF_K)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc_up = acc
    GROUPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if FORM == "int4":
        half = tl.arange(0, HALF_K)
        scales_ptr += expert * GROUPS * ROWS
        scale = tl.load(scales_ptr + n_row)
        scale_up = scale
        if SWIGLU:
            scale_up = tl.load(scales_ptr + N + n_row)
        x_ptrs = x_ptr + x_rows[None, :] * K + half[:, None]
        w_ptrs = w_ptr + n_row[:, None] * (GROUPS * HALF_K) + half[None, :]
        zero = tl.full([BLOCK_N], 8.0, tl.float32)
        zero_up = zero
        if zeros_ptr is not None:
            zeros_ptr += expert * GROUPS * ROWS
        for group in range(GROUPS):
            # The next group's scales are on their way while this one is multiplied.
            following = tl.minimum(group + 1, GROUPS - 1) * ROWS
            next_scale = tl.load(scales_ptr + following + n_row)
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + group * ROWS + n_row)
            if K % BLOCK_K == 0:
                x_low = tl.load(x_ptrs + group * BLOCK_K)
                x_high = tl.load(x_ptrs + group * BLOCK_K + HALF_K)
            else:
                column = group * BLOCK_K + half[:, None]
                x_low = tl.load(x_ptrs + group * BLOCK_K, mask=column < K, other=0.0)
                x_high = tl.load(
                    x_ptrs + group * BLOCK_K + HALF_K, mask=column + HALF_K < K, other=0.0
                )
            low, high = nibbles(tl.load(w_ptrs + group * HALF_K), zero[:, None], dtype, PTX)
            part = product(low, x_low, tl.zeros([BLOCK_N, BLOCK_T], tl.float32))
            acc += product(high, x_high, part) * scale[:, None]
            if SWIGLU:
                next_scale_up = tl.load(scales_ptr + following + N + n_row)
                if zeros_ptr is not None:
                    zero_up = tl.load(zeros_ptr + group * ROWS + N + n_row)
                up = tl.load(w_ptrs + N * (GROUPS * HALF_K) + group * HALF_K)
                low, high = nibbles(up, zero_up[:, None], dtype, PTX)
                part = product(low, x_low, tl.zeros([BLOCK_N, BLOCK_T], tl.float32))
                acc_up += product(high, x_high, part) * scale_up[:, None]
                scale_up = next_scale_up
            scale = next_scale
    else:
        columns = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + x_rows[None, :] * K + columns[:, None]
        w_ptrs = w_ptr + n_row[:, None] * K + columns[None, :]
        for step in range(GROUPS):
            start = step * BLOCK_K
            if K % BLOCK_K == 0:
                x = tl.load(x_ptrs + start)
                w = tl.load(w_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=start + columns[:, None] < K, other=0.0)
                w = tl.load(w_ptrs + start, mask=start + columns[None, :] < K, other=0.0)
            acc = _added(acc, w, x, FORM)
            if SWIGLU:
                if K % BLOCK_K == 0:
                    up = tl.load(w_ptrs + N * K + start)
                else:
                    up = tl.load(
                        w_ptrs + N * K + start, mask=start + columns[None, :] < K, other=0.0
                    )
                acc_up = _added(acc_up, up, x, FORM)
        if FORM != "plain":
            scales_ptr += expert * ROWS
            acc *= tl.load(scales_ptr + n_row)[:, None]
            if SWIGLU:
                acc_up *= tl.load(scales_ptr + N + n_row)[:, None]
        if x_scales_ptr is not None:
            x_scale = tl.load(x_scales_ptr + x_rows)[None, :]
            acc *= x_scale
            acc_up *= x_scale

    if SWIGLU:
        small = tl.exp(-tl.abs(acc))  # never above 1, wherever the gate is
        acc = acc * tl.where(acc < 0, small, 1.0) / (1.0 + small) * acc_up
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * N + n[:, None]
    is_ours = is_row[None, :] & (n[:, None] < N)
    if ADD:
        acc += tl.load(out_ptrs, mask=is_ours, other=0.0)
    tl.store(out_ptrs, rounded(acc, out_ptr.dtype.element_ty), mask=is_ours)


@triton.jit
def _added(acc, w, x, FORM: tl.constexpr):
    """Return ``acc + w @ x``; of int8 weights without their scales."""
    # What follows a return is compiled too, so each way is a branch.
    dtype: tl.constexpr = x.dtype
    if FORM == "int8":
        return product(from_integers(w, dtype), x, acc)
    elif FORM == "fp8" and not INTERPRETED:  # noqa: RET505
        if dtype == tl.float8e4nv:
            return tl.dot(w, x, acc, max_num_imprecise_acc=w.shape[1])
        else:  # noqa: RET505
            return product(w.to(dtype), x, acc)
    else:
        return product(w, x, acc)
