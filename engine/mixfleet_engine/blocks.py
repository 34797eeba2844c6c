"""The paged KV cache's book of blocks: which are free and who holds the others. No tensors here."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

from mixfleet_engine.errors import ConfigError, OutOfBlocksError
from mixfleet_engine.prefix_cache import PrefixCache


class BlockAllocator:
    """Hands out the blocks ``0 .. num_blocks - 1``, each of room for ``block_size`` tokens.

    A block is free when nobody holds it. If the prefix cache knows what it holds, it *rests*: free
    like any other, but handed out only when no plain one is left, the longest resting first, and
    until then anybody may share it again.

    Attributes:
        prefixes: What the blocks hold. Empty, and without effect, unless somebody adds to it.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        self.prefixes = PrefixCache(block_size)
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._plain = deque(range(num_blocks))
        self._resting: OrderedDict[int, None] = OrderedDict()
        self._holders: dict[int, int] = {}
        """How many hold a block; only of those that anybody holds."""

    @property
    def num_blocks(self) -> int:
        """All blocks, free and held."""
        return self._num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, the resting ones included."""
        return len(self._plain) + len(self._resting)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one sequence fill, the last one perhaps partly."""
        return -(-num_tokens // self._block_size)

    def num_holders(self, block: int) -> int:
        """How many hold ``block``; 0 when it is free."""
        return self._holders.get(block, 0)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` blocks for one holder, all or none.

        What resting blocks among them held is forgotten.

        Raises:
            OutOfBlocksError: Fewer are free. Nothing was taken; the scheduler answers by
                preempting its youngest sequence.
        """
        if num_blocks > self.num_free:
            raise OutOfBlocksError(asked=num_blocks, free=self.num_free)
        blocks = [self._take_one() for _ in range(num_blocks)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold ``blocks``, each resting or held by others already, once more, all or none.

        Raises:
            ValueError: One of them holds nothing that could be shared: a bug of the caller.
        """
        blocks = tuple(blocks)
        if not all(block in self._holders or block in self._resting for block in blocks):
            raise ValueError(f"blocks {blocks} are not all held or resting")
        for block in blocks:
            self._resting.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Hold each of ``blocks`` once less, all or none.

        Blocks that rest from now on do so in reverse order: what comes late in a sequence is of no
        use without what comes before it, so it must go first.

        Raises:
            ValueError: One of them is held less often than it is named: a bug of the caller, and to
                go on would hand one block to two sequences.
        """
        if any(self.num_holders(block) < times for block, times in Counter(blocks).items()):
            raise ValueError(f"blocks {tuple(blocks)} are not all held as often as they are named")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                if block in self.prefixes:
                    self._resting[block] = None
                else:
                    self._plain.append(block)

    def _take_one(self) -> int:
        if self._plain:
            return self._plain.popleft()
        block, _ = self._resting.popitem(last=False)
        self.prefixes.forget(block)
        return block
