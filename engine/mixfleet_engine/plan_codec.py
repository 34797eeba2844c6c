"""A step plan as plain integers, which is how it gets from the rank that made it to the others.

Torch-free. Only what the model needs goes along: the other ranks sample nothing, so they are told
neither names nor settings nor histories. The words, all whole numbers that fit 64 bits::

    number of blocks to clear, the blocks,
    number of chunks, then per chunk:
        start, samples (0 or 1), number of tokens, number of blocks, the tokens, the blocks
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import PlannedChunk, StepPlan

_NO_SETTINGS: Final = SamplingParams()


def encode_plan(plan: StepPlan) -> list[int]:
    """Return ``plan`` as words; never an empty list.

    Raises:
        ValueError: It has unread tokens, which the other ranks cannot know: they sample none.
    """
    if any(chunk.unread_row is not None for chunk in plan.chunks):
        raise ValueError("a plan with unread tokens is of no use to other ranks")
    words = [len(plan.clear_blocks), *plan.clear_blocks, len(plan.chunks)]
    for chunk in plan.chunks:
        words += (chunk.start, chunk.samples, len(chunk.token_ids), len(chunk.block_table))
        words += chunk.token_ids
        words += chunk.block_table
    return words


def decode_plan(words: Sequence[int]) -> StepPlan:
    """Return the plan that :func:`encode_plan` made ``words`` of, without what it leaves out.

    Raises:
        ValueError: The words are of no plan: the two ranks do not run the same version.
    """
    reader = iter(words)
    clear_blocks = _take(reader, _take(reader, 1)[0])
    chunks = tuple(_chunk(reader) for _ in range(_take(reader, 1)[0]))
    if next(reader, None) is not None:
        raise ValueError(f"a plan of {len(words)} words has words left over")
    return StepPlan(chunks=chunks, clear_blocks=clear_blocks)


def _chunk(reader: Iterator[int]) -> PlannedChunk:
    start, samples, num_tokens, num_blocks = _take(reader, 4)
    return PlannedChunk(
        request_id="",
        start=start,
        samples=bool(samples),
        token_ids=_take(reader, num_tokens),
        block_table=_take(reader, num_blocks),
        sampling=_NO_SETTINGS,
        history=TokenHistory(()),
        position=0,
    )


def _take(reader: Iterator[int], count: int) -> tuple[int, ...]:
    words = tuple(islice(reader, max(count, 0)))
    if len(words) != count:
        raise ValueError(f"a plan ends early: {len(words)} of {count} words")
    return words
