"""Memory for packed weights and for scratch.

Weights are read once a step from end to end, so they lie in huge pages where the system has them:
a read then misses the table of pages 512 times less often.
"""

import contextlib
import mmap
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE: Final = 2 << 20
ALIGNMENT: Final = 64
"""Bytes; a line of the cache and a vector register."""


def huge_buffer(num_bytes: int) -> Tensor:
    """Return zeros, ``[num_bytes]`` uint8, at the start of a huge page."""
    if num_bytes < HUGE_PAGE:
        return aligned_buffer(num_bytes).zero_()
    # Private: the system has no huge pages for memory that processes share.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel built without huge pages refuses; small ones then do.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(memory, dtype=torch.uint8), num_bytes, HUGE_PAGE)


def aligned_buffer(num_bytes: int) -> Tensor:
    """Return ``[num_bytes]`` uint8 of any content, at the start of a line of the cache."""
    return _aligned(torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8), num_bytes, ALIGNMENT)


def _aligned(buffer: Tensor, num_bytes: int, alignment: int) -> Tensor:
    skipped = -buffer.data_ptr() % alignment
    return buffer[skipped : skipped + num_bytes]


class Scratch:
    """One buffer that grows to the largest need; its content means nothing between calls.

    Not for two calls at once.
    """

    def __init__(self) -> None:
        self._buffer = aligned_buffer(0)

    def pointer(self, num_bytes: int) -> int:
        """Return the address of at least ``num_bytes`` bytes, good until the next call."""
        if self._buffer.shape[0] < num_bytes:
            self._buffer = aligned_buffer(num_bytes)
        return self._buffer.data_ptr()
