"""Step plans made by hand, as a scheduler would make them."""

from collections.abc import Sequence

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import PlannedChunk, StepPlan


def chunk(
    token_ids: Sequence[int],
    *,
    block_table: Sequence[int],
    start: int = 0,
    samples: bool = True,
    position: int = 0,
    sampling: SamplingParams | None = None,
) -> PlannedChunk:
    """Return a chunk of a request whose name nobody reads."""
    return PlannedChunk(
        request_id="any",
        token_ids=tuple(token_ids),
        start=start,
        block_table=tuple(block_table),
        samples=samples,
        sampling=sampling or SamplingParams(),
        history=TokenHistory(tuple(token_ids)),
        position=position,
    )


def plan(*chunks: PlannedChunk) -> StepPlan:
    """Return a plan of these chunks."""
    return StepPlan(chunks=chunks)


def table(length: int, block_size: int, first: int = 0, stride: int = 1) -> list[int]:
    """Return the blocks that `length` tokens need: `first`, `first + stride`, ..."""
    return [first + stride * i for i in range(-(-length // block_size))]
