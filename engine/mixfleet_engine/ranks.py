"""What the model needs of the other processes that share it, and the case that there are none."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixfleet_engine.config import Shard
from mixfleet_engine.weight_loader import Progress


class RanksLostError(BaseException):
    """Another rank is gone, or a step failed half-way, so that this rank is of no use any more.

    No ``Exception``: whoever handles a failed step and goes on would pair this rank's next sum with
    another one of the others. The process must end; its requests are as good as ever, elsewhere.
    """


class Ranks(Protocol):
    """The group of processes of which each holds a part of the model.

    All of them must call the methods below in the same order, each with a tensor of the same shape.
    """

    @property
    def shard(self) -> Shard:
        """Which of them this is."""
        ...

    def sum(self, partial: Tensor) -> Tensor:
        """Return the sum of all ranks' ``partial``, the same bits on every rank.

        An element of it depends on nothing but the ranks' own elements at this place: they are
        added in the order of the ranks, however many rows there are.
        """
        ...

    def add_sum(self, x: Tensor, partial: Tensor) -> None:
        """Add the sum of all ranks' ``partial`` to ``x`` in place, with the bits of `sum`.

        A step calls it an even number of times, or not at all: memory that the ranks share takes
        turns.

        Args:
            x: The running sum ``[T, D]`` fp32, contiguous.
            partial: ``[T, D]``, contiguous.
        """
        ...

    def share_memory(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        """Have the ranks' GPUs share memory for sums up to that size, where they can.

        Experimental, see `symmetric_memory`. Where they cannot, a warning says why.
        """
        ...

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        """Return ``[R, num_columns]`` of all ranks' ``part`` ``[R, ...]`` side by side on rank 0.

        The other ranks get ``[0, num_columns]``.
        """
        ...

    def watched(self, progress: Progress | None) -> Progress | None:
        """Return a callback that reports to the other ranks as well."""
        ...

    def lowest(self, number: int, *, is_loaded: bool = False) -> int:
        """Return the lowest ``number`` of all ranks, once all of them are about to load.

        With ``is_loaded`` once all of them have loaded.

        Raises:
            StartHangError: One of them makes no progress any more.
        """
        ...

    def wait_for_loaded(self) -> None:
        """Wait until every rank has loaded its part.

        Raises:
            StartHangError: One of them makes no progress any more.
        """
        ...

    def on_end(self, release: Callable[[], None]) -> None:
        """Have ``release`` called before the group ends.

        Recordings that hold exchanges between ranks must be gone by then: NCCL waits for their end
        when it is closed.
        """
        ...

    def send(self, words: Sequence[int]) -> None:
        """Send whole numbers of 64 bits from rank 0 to all others; none tell them to end."""
        ...

    def receive(self) -> list[int]:
        """Wait, for ever if need be, for what rank 0 sends."""
        ...


class OneRank:
    """Implements :class:`Ranks` for a process that has the whole model."""

    @property
    def shard(self) -> Shard:
        """All of it."""
        return Shard()

    def sum(self, partial: Tensor) -> Tensor:
        """Return ``partial``, which is the sum already."""
        return partial

    def add_sum(self, x: Tensor, partial: Tensor) -> None:
        """Add ``partial``, which is the sum already."""
        x += partial

    def share_memory(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        """Do nothing: nobody to share it with."""

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        """Return ``part``, which has all columns already."""
        assert part.shape[1] == num_columns
        return part

    def watched(self, progress: Progress | None) -> Progress | None:
        """Return ``progress``: nobody else waits."""
        return progress

    def lowest(self, number: int, *, is_loaded: bool = False) -> int:
        """Return ``number``."""
        del is_loaded  # nobody else loads
        return number

    def wait_for_loaded(self) -> None:
        """Do nothing: nobody else loads."""

    def on_end(self, release: Callable[[], None]) -> None:
        """Do nothing: no group ends."""

    def send(self, words: Sequence[int]) -> None:
        """Do nothing: nobody listens."""

    def receive(self) -> list[int]:
        """Return none: nobody sends."""
        return []
