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
    """Return ``acc + a @ b`` in fp32, for ``a`` ``[M, K]`` and ``b`` ``[K, N]`` of one dtype."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def from_integers(numbers, dtype: tl.constexpr):
    """Return small whole numbers, exactly, in a floating ``dtype``."""
    if INTERPRETED:
        return numbers.to(tl.float32).to(dtype)
    return numbers.to(dtype)
