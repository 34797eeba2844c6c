"""A value that is read again when it has become old, once for all who want it meanwhile."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """The result of ``read``, at most ``fresh_s`` seconds old when :meth:`get` is called.

    Args:
        read: Reads the value; what it raises reaches all who wait, and nothing is kept of it.
        fresh_s: For how long one reading serves.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        read: Callable[[], Coroutine[Any, Any, T]],
        fresh_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._fresh_s = fresh_s
        self._clock = clock
        self._reading: asyncio.Task[T] | None = None
        self._read_at = 0.0

    async def get(self) -> T:
        """Return the value; whoever comes while it is being read waits for that reading."""
        old = self._reading is None or (
            self._reading.done()
            and (
                self._clock() - self._read_at >= self._fresh_s
                or self._reading.cancelled()
                or self._reading.exception() is not None
            )
        )
        if old or self._reading is None:
            self._read_at = self._clock()
            self._reading = asyncio.create_task(self._read())
        # One who gives up must not take the reading from the others.
        return await asyncio.shield(self._reading)
