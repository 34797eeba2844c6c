"""Triton as these kernels speak it: the same source for a GPU and for Triton's interpreter.

The interpreter (``TRITON_INTERPRET=1``) runs kernels on the CPU with numpy, which knows no bf16: it
would add and multiply the bits. So kernels do arithmetic in fp32 only, round once when they store,
and multiply matrices through :func:`product`.
"""

import os
from typing import Final

# Newer ones warn where nobody has said whether a product and a sum may become one instruction.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl

INTERPRETED: Final = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Whether kernels run in the interpreter; decided, as in Triton, when they are imported."""


@triton.jit
def product(a, b, acc):
    """Return ``acc + a @ b`` in fp32, for ``a`` ``[M, K]`` and ``b`` ``[K, N]`` of one dtype.

    numpy sums up a row in another order where it stands elsewhere, which no matrix unit does; in
    fp64 that is far below what is kept.
    """
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64))
        return (acc.to(tl.float64) + wide).to(tl.float32)
    else:  # noqa: RET505 (what follows a return would be compiled too)
        # fp32 would be cut down to tf32; other dtypes do not care.
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def from_integers(numbers, dtype: tl.constexpr):
    """Return small whole numbers, exactly, in a floating ``dtype``."""
    if INTERPRETED:
        return numbers.to(tl.float32).to(dtype)
    else:  # noqa: RET505
        return numbers.to(dtype)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Return fp32 ``values`` in ``dtype``, the nearest, of two that are equally near the even one.

    They must not round to beyond the largest of ``dtype``; NaN stays NaN. The interpreter would cut
    off what bf16 has no room for, and lose carries and NaN of fp8: there they are rounded before.
    """
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        if dtype == tl.bfloat16:
            upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            values = tl.where(values == values, upper.to(tl.float32, bitcast=True), values)
        elif dtype == tl.float8e4nv:
            # 1.5 * 2^(e + 20) has its last bit where fp8 has it: at 2^(e - 3), and at least 2^-9.
            exponent = tl.minimum(tl.maximum((bits >> 23) & 0xFF, 127 - 6), 127 + 8)
            large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
            # Beyond 448 stand the bits that are NaN.
            values = tl.where(values == values, (values + large) - large, 480.0)
    return values.to(dtype)
