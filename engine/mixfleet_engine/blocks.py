"""The paged KV cache's book of blocks: which are free and which are taken. No tensors here."""

from collections import deque
from collections.abc import Iterable

from mixfleet_engine.errors import ConfigError, OutOfBlocksError


class BlockAllocator:
    """Hands out the blocks ``0 .. num_blocks - 1``, each of room for ``block_size`` tokens.

    Whoever allocates a block owns it until it is released. Nobody else keeps count, so that a
    prefix cache can later share blocks by counting references in here and nowhere else.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        self._num_blocks = num_blocks
        self._block_size = block_size
        # Oldest first: a block rests as long as possible, and its tokens stay findable for a
        # prefix cache.
        self._free = deque(range(num_blocks))
        self._taken: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """All blocks, free and taken."""
        return self._num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one sequence fill, the last one perhaps partly."""
        return -(-num_tokens // self._block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` blocks, all or none.

        Raises:
            OutOfBlocksError: Fewer are free. Nothing was taken; the scheduler answers by
                preempting its youngest sequence.
        """
        if num_blocks > len(self._free):
            raise OutOfBlocksError(asked=num_blocks, free=len(self._free))
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        self._taken.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give ``blocks`` back, all or none.

        Raises:
            ValueError: One of them is not taken, or is named twice: a bug of the caller, and to
                go on would hand one block to two sequences.
        """
        blocks = tuple(blocks)
        if not self._taken.issuperset(blocks) or len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {blocks} are not all taken, or not all different")
        self._taken.difference_update(blocks)
        self._free.extend(blocks)
