"""Sums of decode steps over memory that all GPUs of a group map: experimental, see below.

A decode step sums up a few rows 64 times and more, and over NCCL each time costs a gathering, not
the bytes. Here a rank writes its part where the others can read it, waits until all have done so,
and reads theirs. The order of the additions is ours as before, so the bits are the same.

**Turns.** Two places take turns. A rank that enters the barrier of one sum has read all that it
wanted of the sum before, so after that barrier the other place is free. That holds across steps,
recorded or not, because a step has an even number of sums: each begins where the last one did.

**Experimental.** torch calls its interface alpha (2.13), and it has not run here on several GPUs.
So it must be asked for by `EngineConfig.symmetric_memory`, and all ranks make a trial sum first;
where one of them cannot, all use NCCL.

Shape letters: N ranks, T tokens, D model width.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mixfleet_engine.config import Shard
from mixfleet_engine.rank_order import add_parts

logger = logging.getLogger(__name__)

MAX_RANKS: Final = 8
NUM_TURNS: Final = 2
_SETUP_ERRORS: Final = (RuntimeError, ImportError, AttributeError, TypeError, ValueError)
"""What torch raises where a device, a driver or this version of its interface is not up to it."""


class Handle(Protocol):
    """What torch calls a symmetric memory: this rank's block and the others' at once."""

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, /) -> Tensor:
        """Return the block of ``rank``."""
        ...

    def barrier(self) -> None:
        """Enqueue: go on when all ranks are here, and what they wrote before can be read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferNeeds:
    """What one group wants to sum up."""

    shard: Shard
    device: str
    num_rows: int
    """Most rows of a sum."""
    width: int
    """D."""
    dtype: torch.dtype
    """Of the parts."""

    @property
    def size(self) -> int:
        """Numbers of one part."""
        return self.num_rows * self.width


Blocks = Callable[[BufferNeeds], Callable[[], Handle]]
"""Allocates this rank's block ``[NUM_TURNS, size]``; what it returns meets the other ranks'."""


class SymmetricBuffers:
    """Two places for a part on each rank, and every rank's view of all of them.

    Args:
        handle: Of a block ``[NUM_TURNS, size]``.
        needs: What they are for.
    """

    def __init__(self, handle: Handle, needs: BufferNeeds) -> None:
        self._handle = handle
        self._rank = needs.shard.rank
        self._dtype = needs.dtype
        self._size = needs.size
        blocks = [
            handle.get_buffer(rank, (NUM_TURNS, needs.size), needs.dtype)
            for rank in range(needs.shard.world)
        ]
        self._places = [[block[turn] for block in blocks] for turn in range(NUM_TURNS)]
        self._turn = 0

    def takes(self, partial: Tensor) -> bool:
        """Whether ``partial`` finds room; the answer is the same on all ranks."""
        return partial.numel() <= self._size and partial.dtype == self._dtype

    def add_sum(self, x: Tensor, partial: Tensor) -> None:
        """See :meth:`Ranks.add_sum <mixfleet_engine.ranks.Ranks.add_sum>`."""
        places = [
            place[: partial.numel()].view(partial.shape) for place in self._places[self._turn]
        ]
        self._turn = (self._turn + 1) % NUM_TURNS
        places[self._rank].copy_(partial)
        self._handle.barrier()
        add_parts(x, places)


def open_buffers(
    needs: BufferNeeds, blocks: Blocks, agreed: Callable[[bool], bool]
) -> SymmetricBuffers | None:
    """Return the group's buffers; None, with a warning, where a rank cannot have them.

    Args:
        needs: The same on all ranks, but for the rank and its device.
        blocks: Where their memory comes from.
        agreed: Whether all ranks say True; each of them calls it as often as the others.
    """
    attempt = _Attempt(needs, blocks)
    for step in (attempt.check, attempt.allocate, attempt.meet, attempt.try_out):
        reason = None
        try:
            step()
        except _SETUP_ERRORS as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        # Nobody goes on to wait for a rank that has given up.
        if not agreed(reason is None):
            logger.warning(
                "symmetric_memory: NCCL sums up instead: %s", reason or "another rank cannot"
            )
            return None
    logger.info("symmetric_memory: sums of up to %d rows", needs.num_rows)
    return attempt.buffers


class _Attempt:
    """The steps to buffers that work; each raises what it cannot do."""

    def __init__(self, needs: BufferNeeds, blocks: Blocks) -> None:
        self._needs = needs
        self._blocks = blocks
        self._meeting: Callable[[], Handle] | None = None
        self.buffers: SymmetricBuffers | None = None

    def check(self) -> None:
        problem = refusal(self._needs.shard, self._needs.device)
        if problem is not None:
            raise RuntimeError(problem)

    def allocate(self) -> None:
        self._meeting = self._blocks(self._needs)

    def meet(self) -> None:
        assert self._meeting is not None
        self.buffers = SymmetricBuffers(self._meeting(), self._needs)

    def try_out(self) -> None:
        """Sum up known numbers, more often than there are places."""
        assert self.buffers is not None
        shard, shape = self._needs.shard, (self._needs.num_rows, self._needs.width)
        sums = []
        # All of them before a look at any: nobody leaves the others waiting at a barrier.
        for number in range(2 * NUM_TURNS):
            x = torch.zeros(shape, device=self._needs.device)
            partial = torch.full_like(x, shard.rank + number, dtype=self._needs.dtype)
            self.buffers.add_sum(x, partial)
            sums.append(x)
        for number, x in enumerate(sums):
            expected = shard.world * (shard.world - 1) // 2 + shard.world * number
            wrong = x[x != expected]
            if len(wrong):
                raise RuntimeError(f"a trial sum gave {wrong[0].item():g} in place of {expected}")


def refusal(shard: Shard, device: str) -> str | None:
    """Return why a group cannot share memory, as far as this rank sees without trying."""
    if torch.device(device).type != "cuda":
        return f"device={device!r}: only GPUs can"
    if shard.world > MAX_RANKS:
        return f"{shard.world} ranks: at most {MAX_RANKS} can"
    # A rank's device has the rank's number among those of its machine.
    if device != f"cuda:{shard.rank}":
        return f"rank {shard.rank} runs on {device}: the ranks are on several machines"
    return None


def torch_blocks(group: dist.ProcessGroup) -> Blocks:
    """Return what allocates torch's blocks and has them meet in ``group``."""

    def allocated(needs: BufferNeeds) -> Callable[[], Handle]:
        # Imported here: its interface is alpha, and older or other builds of torch have none.
        from torch.distributed import _symmetric_memory

        block = _symmetric_memory.empty(
            NUM_TURNS, needs.size, dtype=needs.dtype, device=torch.device(needs.device)
        )
        return lambda: _symmetric_memory.rendezvous(block, group)

    return allocated
