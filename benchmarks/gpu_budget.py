"""The time that the GPU benchmark has: what no longer fits is left out, and named."""

import time
from collections.abc import Callable


class Budget:
    """A deadline that processes share.

    Args:
        deadline: Seconds on ``clock``.
        clock: The system's, for the processes of one run have no other in common.
    """

    def __init__(self, deadline: float, clock: Callable[[], float] = time.time) -> None:
        self.deadline = deadline
        self._clock = clock

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; never negative."""
        return max(0.0, self.deadline - self._clock())

    def shortage(self, needed_s: float) -> str | None:
        """Return why something of ``needed_s`` seconds is not begun; None: there is time."""
        left_s = self.left_s
        if left_s >= needed_s:
            return None
        return f"takes about {needed_s:.0f} s, {left_s:.0f} s are left"
