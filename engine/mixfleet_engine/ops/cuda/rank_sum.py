"""The running sum gets what all ranks have computed of a half layer, in one pass.

For each element the ranks' numbers are summed up in fp32, in the order of the ranks, and then that
sum is added to the running sum. So an element depends on nothing but the numbers at its own place,
however many tokens there are, and its bits are those of plain torch.

The parts of one gathering lie behind each other; those in memory that ranks share lie apart.

Shape letters: N ranks, T tokens, D model width. For one token of Mixtral 8x7B (D = 4096) it reads
N times 8 KiB of bf16, and reads and writes 16 KiB of the running sum. N additions per number.
"""

from collections.abc import Sequence
from typing import Final

import triton
import triton.language as tl
from torch import Tensor

BLOCK: Final = 256
"""Four numbers a thread, 16 bytes of fp32: with eight, 16 bytes of bf16, the numbers would change
threads between load and sum. A single token still is 16 programs."""
WARPS: Final = 2


def add_gathered(x: Tensor, parts: Tensor) -> None:
    """Add the sum of ``parts`` ``[N, T, D]``, any floating dtype, to ``x`` ``[T, D]`` in place."""
    assert parts.is_contiguous()
    assert parts.shape[1:] == x.shape
    _launch(x, (parts,), len(parts))


def add_spread(x: Tensor, parts: Sequence[Tensor]) -> None:
    """Add the sum of N ``parts`` ``[T, D]`` of one dtype to ``x`` in place."""
    assert all(part.is_contiguous() and part.shape == x.shape for part in parts)
    _launch(x, tuple(parts), len(parts))


def _launch(x: Tensor, parts: tuple[Tensor, ...], num_ranks: int) -> None:
    assert x.is_contiguous()
    size = x.numel()
    if size:
        _rank_sum[(triton.cdiv(size, BLOCK),)](
            x,
            parts,
            size,
            N=num_ranks,
            SPREAD=len(parts) == num_ranks,
            BLOCK_SIZE=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _rank_sum(
    x_ptr, part_ptrs, size, N: tl.constexpr, SPREAD: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = places < size
    part_ptr = part_ptrs[0]
    total = tl.load(part_ptr + places, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, N):
        part_ptr = part_ptrs[rank] if SPREAD else part_ptr + size
        total += tl.load(part_ptr + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    tl.store(x_ptr + places, x + total, mask=inside)
