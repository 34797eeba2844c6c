"""Which blocks of the KV cache each sequence holds, and which of them it shares.

A sequence begins with the blocks that are known to hold its first tokens, and makes its own known
as they fill up. When two have computed the same block, the second takes the first one's and gives
its own back. So shared blocks always stand at the head of a table, and are never written to.

A block is in *doubt* from when a step is planned to write to it until a token with finite logits
was sampled after it. What is in doubt may hold a NaN, and attention counts a masked slot as 0 times
its value: so such a block is cleared before it serves a new owner, and once logits were not finite
nobody finds it any more.

Up to two steps are planned and not booked, the second while the first runs. The device runs them,
and all later ones, in order, so a block may change hands as soon as its owner ends: whatever a step
on its way still writes there comes before what the new owner's steps do. Hence two rules. A block
stays in doubt while any planned step writes to it, whatever the step before has sampled: its new
owner clears it *after* the surplus write. And each plan carries its own blocks to clear: one that
the first step clears may be written by it and change hands, and then the second clears it again.
"""

from bisect import bisect_left
from collections.abc import Iterable

from mixfleet_engine.blocks import BlockAllocator
from mixfleet_engine.sequence import Sequence
from mixfleet_engine.step import PlannedChunk


class KvBook:
    """The block tables of all sequences.

    Args:
        num_blocks: Blocks of the KV cache.
        block_size: Tokens per block.
        prefix_cache: Whether sequences share the blocks of equal beginnings.
    """

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self._blocks = BlockAllocator(num_blocks=num_blocks, block_size=block_size)
        self._prefix_cache = prefix_cache
        self._doubtful: set[int] = set()
        self._unclean: set[int] = set()
        self.num_queried_tokens = 0
        """Tokens that sequences came with when they were admitted."""
        self.num_hit_tokens = 0
        """How many of them were in the cache already."""

    @property
    def num_blocks(self) -> int:
        """All blocks, free and held."""
        return self._blocks.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._blocks.block_size

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; some may still hold known tokens."""
        return self._blocks.num_free

    @property
    def unclean(self) -> tuple[int, ...]:
        """Blocks that the next step to be planned must clear before it runs."""
        return tuple(sorted(self._unclean))

    def num_needed(self, sequence: Sequence) -> int:
        """Blocks for all tokens of ``sequence`` when it shares none."""
        return self._blocks.num_blocks_for(sequence.num_tokens)

    def num_missing(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` lacks for its tokens so far."""
        # It may hold one too many: for an unread token of a plan that came to nothing.
        return max(0, self.num_needed(sequence) - len(sequence.block_table))

    def num_alone(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` shares with nobody: what its end would free."""
        table = sequence.block_table
        return len(table) - bisect_left(
            table, True, key=lambda block: self._blocks.num_holders(block) == 1
        )

    def admit(self, sequence: Sequence, *, leave: int) -> bool:
        """Give a sequence without blocks all it needs, if ``leave`` blocks stay free; whether so.

        Its first tokens may be in the cache then, but never the last one, whose logits are wanted.
        """
        hits: list[int] = []
        if self._prefix_cache:
            most = (sequence.num_tokens - 1) // self.block_size
            hits = self._blocks.prefixes.find(sequence.token_ids, most)
        missing = self.num_needed(sequence) - len(hits)
        num_resting = sum(self._blocks.num_holders(block) == 0 for block in hits)
        if missing + num_resting + leave > self.num_free:
            return False
        # First of all: what is shared already cannot be taken for something else.
        self._blocks.share(hits)
        sequence.block_table = hits + self._take(missing)
        sequence.num_known = len(hits)
        sequence.num_cached = len(hits) * self.block_size
        self.num_queried_tokens += sequence.num_tokens
        self.num_hit_tokens += sequence.num_cached
        return True

    def grow(self, sequence: Sequence) -> None:
        """Give a sequence what it lacks for its tokens so far.

        Raises:
            OutOfBlocksError: Fewer are free.
        """
        sequence.block_table += self._take(self.num_missing(sequence))

    def chunk(self, sequence: Sequence, num_tokens: int, row: int = 0) -> PlannedChunk:
        """Plan the next ``num_tokens`` pending tokens of a sequence that has blocks for them.

        Args:
            sequence: Whose.
            num_tokens: How many.
            row: Samples of the plan that come before this chunk.
        """
        num_blocks = self._blocks.num_blocks_for(sequence.start + num_tokens)
        chunk = sequence.chunk(num_tokens, num_blocks, row)
        self._doubt_planned(sequence)
        return chunk

    def book(self, sequence: Sequence, num_tokens: int, *, sampled: bool) -> None:
        """Count planned tokens as cached, and make known the blocks they filled.

        Args:
            sequence: Whose.
            num_tokens: How many the oldest planned step has written.
            sampled: Whether the step gave it a token: then its logits were finite.
        """
        sequence.book(num_tokens, sampled=sampled)
        num_full = sequence.num_cached // self.block_size
        if sampled:
            self._doubtful.difference_update(sequence.block_table[sequence.num_trusted :])
            self._doubt_planned(sequence)
            sequence.num_trusted = num_full
        if self._prefix_cache:
            for number in range(sequence.num_known, num_full):
                self._make_known(sequence, number)
            sequence.num_known = num_full

    def condemn(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of a sequence whose logits were not finite.

        It holds them still, and what made the logits so is in doubt already: no finite sample has
        come after it. Others that share some go on with them, and find out for themselves.
        """
        for block in sequence.block_table:
            self._blocks.prefixes.forget(block)

    def drop(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. Those that are known can be found again."""
        self._blocks.release(sequence.drop_cache())

    def take_unclean(self) -> tuple[int, ...]:
        """Give the unclean blocks to the step that is being planned, which must clear them."""
        blocks = self.unclean
        self._unclean.clear()
        return blocks

    def give_back_unclean(self, blocks: Iterable[int]) -> None:
        """Take note that a planned step did not clear its ``blocks``: the next one must."""
        self._unclean.update(blocks)

    def _doubt_planned(self, sequence: Sequence) -> None:
        """Doubt the blocks that planned steps write to for this sequence."""
        if sequence.num_planned > 0:
            first = sequence.num_cached // self.block_size
            end = self._blocks.num_blocks_for(sequence.start)
            self._doubtful.update(sequence.block_table[first:end])

    def _take(self, num_blocks: int) -> list[int]:
        blocks = self._blocks.allocate(num_blocks)
        self._unclean.update(self._doubtful.intersection(blocks))
        return blocks

    def _make_known(self, sequence: Sequence, number: int) -> None:
        own = sequence.block_table[number]
        known = self._blocks.prefixes.add(sequence.block_table, number, sequence.token_ids)
        if known != own:
            self._blocks.share([known])
            self._blocks.release([own])
            sequence.block_table[number] = known
