"""The products of a step with its weights: dense ones, and those of the chosen experts.

**One way round.** The weights are the left operand, ``[N, K] @ [K, T]``, for any number of tokens:
64 rows of weights fill the matrix instruction of a warp group, and the tokens are its flexible side
(16 to 128). Weights in fewer bits are taken apart in registers, where the left operand may stay.

**Bits.** A number of the result is one sum along K, in steps as `tiles.py` fixes them, by one
program, by the same instruction for any tile. So it depends on its row of weights and its token
only.

**Forms.** Plain: as they are. int8: whole numbers are exact in bf16 and fp16; the row's scale comes
last. int4: so are 0 to 15 less the zero point; each group's product gets its scale, in fp32. fp8:
times tokens in fp8, each row of either with its scale at the end, and sums leave the matrix unit's
own narrow accumulator every 128 inputs; or, where tokens are not quantised, converted.

Shape letters: T tokens, P slots of sorted (token, choice) pairs, K input width, N output width,
F expert width, E experts. For T tokens of Mixtral 8x7B a layer moves the weights of the experts hit
(176 million numbers each: 88 MiB in int4, 168 in fp8) and 2 * T * 2 * 176 M operations; qkv and wo
have 42 million numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.dialect import rounded
from mixfleet_engine.ops.cuda.matrix_step import multiplied, operand, silu, summed
from mixfleet_engine.ops.cuda.packed import WORDS, PackedWeight
from mixfleet_engine.ops.cuda.quant import QuantisedRows, Rows, values_of
from mixfleet_engine.ops.cuda.tiles import LEAST_ROWS, STEP, Tiles


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
        x: ``[T, K]``; in fp8 only for fp8 weights.
        weight: One matrix.
        tiles: How to cut.
        dtype: Of the result.
        add_to: ``[T, N]`` fp32: the product is added to it, and it is returned.
    """
    values = values_of(x)
    out = add_to
    if out is None:
        out = torch.empty(len(values), weight.n, dtype=dtype, device=values.device)
    num_tiles = triton.cdiv(len(values), tiles.block_t)
    _launch(x, weight, None, out, tiles, num_tiles=num_tiles, add=add_to is not None)
    return out


def dense_up(x: Rows, weight: PackedWeight, tiles: Tiles, *, dtype: torch.dtype) -> Tensor:
    """Return ``silu(gate) * up`` ``[T, F]`` of the only matrix ``[2F, K]``: gate above up."""
    values = values_of(x)
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
    values = values_of(x)
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
    values = values_of(h)
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
    assert tiles.block_t >= LEAST_ROWS
    assert tiles.block_n == 16 * tiles.num_warps
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
        BLOCK_K=STEP[weight.form],
        WORDS=WORDS.get(weight.form, STEP[weight.form]),
        GROUP=tiles.group,
        STAGES=tiles.num_stages,
        UNROLL=tiles.unroll,
        PTX=tiles.ptx and values.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# Neither is worth a kernel of its own for 1 or for multiples of 16: a step must never compile.
@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
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
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
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
    expert = tl.zeros([], tl.int64)
    if tile_experts_ptr is not None:
        expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
        if expert < 0:
            return
        slots = tl.load(slots_ptr + slots)
    is_row = slots < num_rows
    rows = tl.where(is_row, slots, 0)
    x_rows = (rows // TOP_K).to(tl.int64)
    n_row = n
    if N % BLOCK_N != 0:
        n_row = tl.minimum(n, N - 1)

    ROWS: tl.constexpr = N * (2 if SWIGLU else 1)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # Words are there for whole steps, numbers up to K.
    WIDTH: tl.constexpr = STEPS * WORDS if FORM == "int4" or FORM == "int8" else K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_rows[None, :] * K + columns[:, None]
    w_ptrs = w_ptr + expert * ROWS * WIDTH + n_row[:, None] * WIDTH + tl.arange(0, WORDS)[None, :]
    if scales_ptr is not None:
        scales_ptr += expert * ROWS * (STEPS if FORM == "int4" else 1) + n_row[:, None]
    if zeros_ptr is not None:
        zeros_ptr += expert * ROWS * STEPS + n_row[:, None]
    MASKED: tl.constexpr = K % BLOCK_K != 0 and (FORM == "plain" or FORM == "fp8")
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc_up = acc
    # With its own num_stages, a loop keeps the scales' loads on their way like all others.
    for step in tl.range(0, STEPS, num_stages=STAGES, loop_unroll_factor=UNROLL):
        inside_k = step * BLOCK_K + columns < K
        # Columns of padding are zeros: even from L2 they would cost as much as the weights.
        mask = is_row[None, :]
        if K % BLOCK_K != 0:
            mask &= inside_k[:, None]
        x = tl.load(x_ptrs + step * BLOCK_K, mask=mask, other=0.0)
        at = step * ROWS
        w_mask = inside_k[None, :]
        scales_at = None if scales_ptr is None else scales_ptr + at
        zeros_at = None if zeros_ptr is None else zeros_ptr + at
        w = operand(w_ptrs + step * WORDS, w_mask, zeros_at, None, FORM, MASKED, dtype, PTX)
        if SWIGLU:
            # Both products before either's sum: one is computed while the other is prepared.
            up_ptrs = w_ptrs + N * WIDTH + step * WORDS
            up_zeros_at = None if zeros_ptr is None else zeros_ptr + at + N
            up = operand(up_ptrs, w_mask, up_zeros_at, None, FORM, MASKED, dtype, PTX)
            part = multiplied(w, x, acc, FORM, dtype)
            part_up = multiplied(up, x, acc_up, FORM, dtype)
            acc = summed(acc, part, scales_at, None, FORM)
            up_scales_at = None if scales_ptr is None else scales_ptr + at + N
            acc_up = summed(acc_up, part_up, up_scales_at, None, FORM)
        else:
            acc = summed(acc, multiplied(w, x, acc, FORM, dtype), scales_at, None, FORM)
    if FORM == "int8" or FORM == "fp8":
        acc *= tl.load(scales_ptr)
        if SWIGLU:
            acc_up *= tl.load(scales_ptr + N)
    if x_scales_ptr is not None:
        x_scale = tl.load(x_scales_ptr + x_rows)[None, :]
        acc *= x_scale
        acc_up *= x_scale

    if SWIGLU:
        acc = silu(acc) * acc_up
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * N + n[:, None]
    is_ours = is_row[None, :] & (n[:, None] < N)
    if ADD:
        acc += tl.load(out_ptrs, mask=is_ours, other=0.0)
    tl.store(out_ptrs, rounded(acc, out_ptr.dtype.element_ty), mask=is_ours)
