"""Numbers of few bits taken out of 16-bit words, in registers.

`packed.py` says which numbers share a word. Neighbours in a word are far apart in the matrix, and
neighbours in the matrix are neighbouring words. So each part of a tile of words is a tile of
neighbouring inputs as it stands, no thread has to ask another one for a number, and the matrix
unit's own loads bring the words to where it wants the numbers.

The PTX ways know bf16 only. They take two words at a time and put numbers below the byte 0x43: what
has 0x43 above and q below is the bf16 number 128 + q, as long as q has seven bits. All is exact.
"""

from typing import Final

import triton
import triton.language as tl

from mixfleet_engine.ops.cuda.dialect import INTERPRETED, from_integers

INT4_PTX: Final = tl.constexpr(
    """
    {
    .reg .b32 t;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $4, 4;
    lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $4, 8;
    lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 t, $4, 12;
    lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA;
    }
    """
)
"""128 and the four numbers of each word. ``0xEA`` stands for ``(a & b) | c``."""

INT8_PTX: Final = tl.constexpr(
    """
    {
    .reg .b32 t, low, sign, minus;
    mov.b32 minus, 0xBF80BF80;
    lop3.b32 low, $2, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, sign, minus, low;
    shr.u32 t, $2, 8;
    lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 sign, t, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, sign, minus, low;
    }
    """
)
"""The two numbers of each word: 128 and seven bits, less 128, or less 256 where the eighth is set.
That bit is the exponent's last one, so it makes 256 of 128 by itself. ``0xBF80`` is -1."""


@triton.jit
def int4_quarters(words, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return the four numbers of each word less ``zeros``, which is as broad as they or 1 wide."""
    if PTX and not INTERPRETED:
        first, second, third, fourth = tl.inline_asm_elementwise(
            INT4_PTX,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        off = (zeros + 128.0).to(tl.bfloat16)
        return first - off, second - off, third - off, fourth - off
    else:  # noqa: RET505 (what follows a return would be compiled too)
        whole = zeros.to(tl.int16)
        first = from_integers((words & 15) - whole, dtype)
        second = from_integers(((words >> 4) & 15) - whole, dtype)
        third = from_integers(((words >> 8) & 15) - whole, dtype)
        fourth = from_integers(((words >> 12) & 15) - whole, dtype)
        return first, second, third, fourth


@triton.jit
def int8_halves(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return the two numbers of each word."""
    if PTX and not INTERPRETED:
        first, second = tl.inline_asm_elementwise(
            INT8_PTX,
            "=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return first, second
    else:  # noqa: RET505
        first = ((words & 255) ^ 128) - 128
        return from_integers(first, dtype), from_integers(words >> 8, dtype)


@triton.jit
def int4_tile(words, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return ``[..., N, 128]`` numbers of words ``[..., N, 32]`` less ``zeros`` ``[..., N, 1]``."""
    first, second, third, fourth = int4_quarters(words, zeros, dtype, PTX)
    quarters = tl.join(tl.join(first, second), tl.join(third, fourth))  # [..., N, 32, 2, 2]
    flat: tl.constexpr = len(words.shape) == 2
    quarters = quarters.permute(0, 3, 2, 1) if flat else quarters.permute(0, 1, 4, 3, 2)
    return quarters.reshape(words.shape[:-1] + [4 * words.shape[-1]])  # noqa: RUF005


@triton.jit
def int8_tile(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return ``[..., N, 128]`` numbers of words ``[..., N, 64]``."""
    first, second = int8_halves(words, dtype, PTX)
    halves = tl.join(first, second)  # [..., N, 64, 2]
    flat: tl.constexpr = len(words.shape) == 2
    halves = halves.permute(0, 2, 1) if flat else halves.permute(0, 1, 3, 2)
    return halves.reshape(words.shape[:-1] + [2 * words.shape[-1]])  # noqa: RUF005
