"""Rows of activations in fp8 (e4m3), each with a scale of its own.

A row's largest magnitude becomes 448, the largest number of e4m3. A row of zeros has scale 0. NaN
stays NaN. A row's scale and numbers depend on that row alone, and a maximum is the same in any
order.

Shape letters: P rows, F numbers of a row. For one row of Mixtral 8x7B's experts (F = 14336) it
reads 28 KiB of bf16 and writes 14 KiB; a division and a product per number.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import rounded

FP8_MAX: Final = tl.constexpr(448.0)
SMALLEST: Final = tl.constexpr(1e-34)
"""As for weights: below it, scales and their inverses leave fp32's range."""


class QuantisedRows(NamedTuple):
    """``values * scales[:, None]`` is what they stand for."""

    values: Tensor
    """``[P, F]`` float8_e4m3fn."""
    scales: Tensor
    """``[P]`` fp32."""


Rows = Tensor | QuantisedRows
"""Rows of tokens, plain or in fp8."""


def values_of(rows: Rows) -> Tensor:
    """Return the numbers of rows, their scales left out."""
    return rows.values if isinstance(rows, QuantisedRows) else rows


def empty_rows(num_rows: int, width: int, device: torch.device) -> QuantisedRows:
    """Return room for quantised rows."""
    return QuantisedRows(
        values=torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device),
        scales=torch.empty(num_rows, dtype=torch.float32, device=device),
    )


def numbers_and_scales(rows: Tensor | QuantisedRows) -> tuple[Tensor, Tensor | None]:
    """Return where a kernel stores numbers and, if they are quantised, scales."""
    return (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scales)


def warps_for(block: int) -> int:
    """Return how many warps hold a row of ``block`` numbers, 16 a thread.

    It depends on the width alone: the order of a sum hangs on it.
    """
    return max(1, min(32, block // 512))


def quantise_rows(h: Tensor) -> QuantisedRows:
    """Return ``h`` ``[P, F]``, any floating dtype, in fp8."""
    assert h.is_contiguous()
    num_rows, width = h.shape
    rows = empty_rows(num_rows, width, h.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _quantise_rows[(num_rows,)](
            h, rows.values, rows.scales, F=width, BLOCK_F=block, num_warps=warps_for(block)
        )
    return rows


@triton.jit
def to_fp8(values):
    """Return one row of fp32 ``values`` in fp8, and its scale."""
    largest = tl.max(tl.abs(values), axis=0)
    empty = largest < SMALLEST
    inverse = tl.where(empty, 0.0, FP8_MAX / tl.where(empty, 1.0, largest))
    # Even if the inverse is rounded up, no product comes near 464, above which 448 is not nearest.
    return rounded(values * inverse, tl.float8e4nv), tl.where(empty, 0.0, largest / FP8_MAX)


@triton.jit
def _quantise_rows(h_ptr, values_ptr, scales_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_F)
    h = tl.load(h_ptr + row * F + columns, mask=columns < F, other=0.0).to(tl.float32)
    values, scale = to_fp8(h)
    tl.store(values_ptr + row * F + columns, values, mask=columns < F)
    tl.store(scales_ptr + row, scale)
