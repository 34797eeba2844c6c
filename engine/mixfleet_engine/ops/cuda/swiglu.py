"""What lies between an expert's two products: ``silu(gate) * up``, and the quantisation of it.

All is computed in fp32 and rounded once. No number is a sum, so there is no order to fix.

Shape letters: P rows of sorted tokens, F expert width. For one row of Mixtral 8x7B (F = 14336) it
reads 56 KiB of bf16 and writes 28 KiB, in fp8 14 KiB; about 10 operations per number.
"""

from typing import Final, Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.dialect import rounded
from mixfleet_engine.ops.cuda.quant import (
    QuantisedRows,
    empty_rows,
    numbers_and_scales,
    to_fp8,
    warps_for,
)

BLOCK: Final = 2048
"""Numbers of a program where rows need not stay whole."""


@overload
def silu_mul(
    x: Tensor,
    *,
    quantise: Literal[False] = False,
    alignment: Alignment | None = None,
) -> Tensor: ...
@overload
def silu_mul(
    x: Tensor,
    *,
    quantise: Literal[True],
    alignment: Alignment | None = None,
) -> QuantisedRows: ...
def silu_mul(
    x: Tensor,
    *,
    quantise: bool = False,
    alignment: Alignment | None = None,
) -> Tensor | QuantisedRows:
    """Return ``silu(first half) * second half`` of ``x`` ``[P, 2F]``, in its dtype or in fp8.

    Args:
        x: Any floating dtype.
        quantise: Whether to return it in fp8, each row with its scale.
        alignment: Where ``x`` has a row for each of its slots. Those that pad an expert's run are
            then left as they are, whatever that is: with few tokens they are half of all.
    """
    assert x.is_contiguous()
    num_rows, width = x.shape[0], x.shape[1] // 2
    out: Tensor | QuantisedRows
    if quantise:
        out = empty_rows(num_rows, width, x.device)
        block = triton.next_power_of_2(width)
    else:
        out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
        block = min(BLOCK, triton.next_power_of_2(width))
    if num_rows:
        _silu_mul[(num_rows, triton.cdiv(width, block))](
            x,
            alignment.sorted_slots if alignment else None,
            *numbers_and_scales(out),
            alignment.num_pairs if alignment else 0,
            F=width,
            BLOCK_F=block,
            num_warps=warps_for(block),
        )
    return out


@triton.jit
def _silu_mul(
    x_ptr, slots_ptr, out_ptr, scales_ptr, num_pairs, F: tl.constexpr, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if slots_ptr is not None:  # noqa: SIM102 (known when compiled; the next one is not)
        if tl.load(slots_ptr + row) == num_pairs:
            return
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate = tl.load(x_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never above 1, wherever the gate is
    mixed = gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up
    if scales_ptr is not None:
        values, scale = to_fp8(mixed)
        tl.store(out_ptr + row * F + columns, values, mask=inside)
        tl.store(scales_ptr + row, scale)
    else:
        tl.store(out_ptr + row * F + columns, rounded(mixed, out_ptr.dtype.element_ty), mask=inside)
