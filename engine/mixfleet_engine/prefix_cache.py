"""What the full blocks of the KV cache hold, so that equal beginnings are computed only once.

A block's keys and values hang on its own tokens and on all tokens before it. So a block is known
by the pair (run before it, its tokens), where a run is the number of the chain of blocks that ends
just before; runs are numbered once and never again. Example, blocks of 2 tokens::

    (0, (5, 6)) -> block 7, run 1         the prompt 5 6 ...
    (1, (8, 9)) -> block 2, run 2         the prompt 5 6 8 9 ...
    (1, (8, 8)) -> block 4, run 3         the prompt 5 6 8 8 ...

The pairs are compared as they are, not by a digest of them: two different beginnings can never be
taken for each other, whatever somebody writes into a prompt.
"""

from collections.abc import Sequence as Row
from dataclasses import dataclass

_Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is known of one block."""

    key: _Key
    run: int
    """The run that ends with it."""


_BEGINNING = _Known(key=(0, ()), run=0)
"""What comes before the first block of every sequence."""


class PrefixCache:
    """Finds blocks by the tokens they hold. Who holds the blocks, the allocator knows.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[_Key, int] = {}
        self._known: dict[int, _Known] = {}
        self._last_run = _BEGINNING.run

    def __contains__(self, block: int) -> bool:
        """Whether the content of ``block`` is known."""
        return block in self._known

    def __len__(self) -> int:
        """How many blocks are known."""
        return len(self._known)

    def find(self, token_ids: Row[int], max_blocks: int) -> list[int]:
        """The known blocks that hold the beginning of ``token_ids``, at most ``max_blocks``.

        Only full blocks count: ``max_blocks`` of them must be there.
        """
        blocks: list[int] = []
        run = _BEGINNING.run
        for number in range(max_blocks):
            block = self._blocks.get((run, self._tokens(token_ids, number)))
            if block is None:
                break
            blocks.append(block)
            run = self._known[block].run
        return blocks

    def add(self, table: Row[int], number: int, token_ids: Row[int]) -> int:
        """Make the content of the full block ``table[number]`` known.

        Args:
            table: The blocks of ``token_ids``, in order; those before ``number`` were added.
            number: Which of them, counted from 0.
            token_ids: All tokens of the sequence.

        Returns:
            The block that is known for this content: the given one, or the one that was known
            before, which the caller should hold in its place. Nothing is learnt when the block
            before has been forgotten, as nobody could find this one.
        """
        own = table[number]
        before = self._known.get(table[number - 1]) if number > 0 else _BEGINNING
        if before is None or own in self._known:
            return own
        key = before.run, self._tokens(token_ids, number)
        block = self._blocks.setdefault(key, own)
        if block == own:
            self._last_run += 1
            self._known[own] = _Known(key=key, run=self._last_run)
        return block

    def forget(self, block: int) -> None:
        """Let nobody find ``block`` any more, nor what comes after it; unknown ones are no error.

        The blocks after it stay known, without a way to them, until they are forgotten themselves.
        """
        known = self._known.pop(block, None)
        if known is not None:
            del self._blocks[known.key]

    def _tokens(self, token_ids: Row[int], number: int) -> tuple[int, ...]:
        start = number * self._block_size
        return tuple(token_ids[start : start + self._block_size])
