"""Gives memory that is free, but inside the process's heap, back to the system."""

import ctypes
import sys
from typing import Final

TRIM_BYTES: Final = 32 << 20


class HeapTrimmer:
    """Trims the heap each time that so many bytes were freed.

    glibc before 2.38 cannot put an aligned tensor where one of the same size was just freed, so a
    loop that makes and drops tensors grows without end: int4 weights took 2.4 times their size.
    Elsewhere than on glibc this does nothing.

    Args:
        trim_bytes: How much may be freed between two trims.
    """

    def __init__(self, trim_bytes: int = TRIM_BYTES) -> None:
        self._trim_bytes = trim_bytes
        self._freed_bytes = 0
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(libc, "malloc_trim", None)

    def freed(self, num_bytes: int) -> None:
        """Count what was freed, and trim if it is time."""
        self._freed_bytes += num_bytes
        if self._freed_bytes >= self._trim_bytes and self._trim is not None:
            self._freed_bytes = 0
            self._trim(0)
