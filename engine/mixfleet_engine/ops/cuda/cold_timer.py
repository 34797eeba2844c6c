"""How long a launch takes on a GPU whose caches hold nothing of what it reads.

A step reads each weight once, and gigabytes of others before it is its turn again. A loop that
launches one kernel over and over would find the weights in L2 and favour what is good at that.
"""

from collections.abc import Callable
from typing import Final

import torch

WARM_UPS: Final = 2
"""The first may compile; the second has the clocks up."""
REPEATS: Final = 15
FLUSH: Final = 4
"""Times the size of L2 that is written between two launches. This takes longer than the CPU needs
for a launch, so that the events have only the kernel between them, never a wait for the CPU."""
SMALLEST_FLUSH: Final = 128 << 20


class ColdTimer:
    """Times launches on the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device: Final = device

    def __call__(self, launch: Callable[[], object]) -> float:
        """Return the median of the seconds between the events around some launches."""
        for _ in range(WARM_UPS):
            launch()
        in_cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        size = max(SMALLEST_FLUSH, FLUSH * in_cache)
        flushed = torch.empty(size, dtype=torch.uint8, device=self._device)
        events = []
        for _ in range(REPEATS):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            before.record()
            launch()
            after.record()
            events.append((before, after))
        torch.cuda.synchronize(self._device)
        milliseconds = sorted(before.elapsed_time(after) for before, after in events)
        return milliseconds[REPEATS // 2] / 1e3
