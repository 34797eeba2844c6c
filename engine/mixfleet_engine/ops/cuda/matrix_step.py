"""One step along K of a product with weights of any form, and SwiGLU's curve.

Tiles of weights are ``[..., N, 128]`` and left operands, tokens ``[..., 128, T]``, sums
``[..., N, T]`` fp32. The sum of a step is the matrix unit's; steps are added in their order.
"""

import triton
import triton.language as tl

from mixfleet_engine.ops.cuda.dialect import INTERPRETED, product
from mixfleet_engine.ops.cuda.unpack import int4_tile, int8_tile


@triton.jit
def silu(x):
    small = tl.exp(-tl.abs(x))  # never above 1, wherever x is
    return x * tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def operand(
    ptrs,
    mask,
    zeros_ptrs,
    zeros_mask,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the weights of one step along K, of int8 and fp8 without their scales.

    ``zeros_ptrs`` is as high as ``ptrs`` and 1 wide. ``mask`` counts if ``MASKED``; ``zeros_mask``
    may be None.
    """
    w = tl.load(ptrs, mask=mask, other=0.0) if MASKED else tl.load(ptrs)
    if FORM == "int4":
        zeros = tl.full(ptrs.shape[:-1] + [1], 8.0, tl.float32)  # noqa: RUF005
        if zeros_ptrs is not None:
            zeros = _loaded(zeros_ptrs, zeros_mask)
        w = int4_tile(w, zeros, dtype, PTX)
    elif FORM == "int8":
        w = int8_tile(w, dtype, PTX)
    return w


@triton.jit
def multiplied(w, x, acc, FORM: tl.constexpr, dtype: tl.constexpr):
    """Return ``acc + w @ x``, of int4 only ``w @ x``: `summed` scales and adds it."""
    # What follows a return is compiled too, so each way is a branch.
    if FORM == "int4":
        return product(w, x, tl.zeros_like(acc))
    elif INTERPRETED or FORM != "fp8":  # noqa: RET505
        return product(w, x, acc)
    elif dtype == tl.float8e4nv:
        return tl.dot(w, x, acc, max_num_imprecise_acc=w.shape[1])
    else:
        return product(w.to(dtype), x, acc)


@triton.jit
def summed(acc, part, scales_ptrs, mask, FORM: tl.constexpr):
    if FORM == "int4":
        return acc + part * _loaded(scales_ptrs, mask)
    else:  # noqa: RET505
        return part


@triton.jit
def _loaded(ptrs, mask):
    """Return numbers, 0 where they do not exist: what stands there could be NaN, even times 0."""
    if mask is None:
        return tl.load(ptrs)
    else:  # noqa: RET505
        return tl.load(ptrs, mask=mask, other=0.0)
