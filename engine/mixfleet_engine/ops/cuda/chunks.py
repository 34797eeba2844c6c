"""Where the sequences of a step stand, as tensors on the device that kernels walk.

Shape letters: T tokens in the step, C chunks, M blocks of the longest block table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixfleet_engine.batch import Batch, on_device
from mixfleet_engine.step import PlannedChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChunks:
    """The chunks of a step, those of one token first; a padding chunk has no rows.

    Worked example, block_size 4: a decode at position 1 with block (5,), then a prefill of
    positions 3..5 with blocks (7, 2)::

        first_rows 0 1   num_rows 1 3   starts 1 3   block_tables (5 0) (7 2)
        slots 21 | 31 8 9   positions 1 | 3 4 5   num_decodes 1   max_rows 3   max_context 6
    """

    first_rows: Tensor
    """``[C]`` int32, where each chunk begins in the step's ``[T, ...]`` tensors."""
    num_rows: Tensor
    """``[C]`` int32."""
    starts: Tensor
    """``[C]`` int32, position of the first token of each."""
    block_tables: Tensor
    """``[C, M]`` int32; what stands behind a shorter table is not read."""
    slots: Tensor
    """``[T]`` int64, where each token's key and value go; -1: nowhere, the row is padding."""
    positions: Tensor
    """``[T]`` int64."""
    num_decodes: int
    """How many chunks, from the first, have one row or none."""
    max_rows: int
    """No chunk has more rows."""
    max_context: int
    """No chunk ends at a higher position."""


@dataclass(frozen=True, kw_only=True)
class PlacedBatch(Batch):
    """A batch that came with its chunks on the device already."""

    placed: DeviceChunks


class ChunkPlacer:
    """Makes a step's :class:`DeviceChunks` once, however many layers ask for them."""

    def __init__(self) -> None:
        self._last: tuple[Batch, DeviceChunks] | None = None

    def of(self, batch: Batch) -> DeviceChunks:
        """Return the chunks of ``batch``."""
        if isinstance(batch, PlacedBatch):
            return batch.placed
        if self._last is None or self._last[0] is not batch:
            self._last = batch, _placed(batch)
        return self._last[1]


def _placed(batch: Batch) -> DeviceChunks:
    chunks = batch.plan_chunks
    counts = [len(chunk.token_ids) for chunk in chunks]
    num_decodes = next((row for row, count in enumerate(counts) if count > 1), len(counts))
    if any(count == 1 for count in counts[num_decodes:]):
        num_decodes = 0  # not in the scheduler's order; the way of prefills is right for all
    widest = max(len(chunk.block_table) for chunk in chunks)
    # One copy to the device: three columns, then the tables.
    rows = [
        (first, count, chunk.start, *chunk.block_table, *[0] * (widest - len(chunk.block_table)))
        for first, count, chunk in zip(batch.firsts, counts, chunks, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int32)
    table = on_device(table, batch.device)
    return DeviceChunks(
        first_rows=table[:, 0].contiguous(),
        num_rows=table[:, 1].contiguous(),
        starts=table[:, 2].contiguous(),
        block_tables=table[:, 3:],
        slots=on_device(torch.tensor(slots_of(chunks, batch.block_size)), batch.device),
        positions=batch.positions,
        num_decodes=num_decodes,
        max_rows=max(counts),
        max_context=max(chunk.start + count for chunk, count in zip(chunks, counts, strict=True)),
    )


def slots_of(chunks: Sequence[PlannedChunk], block_size: int) -> list[int]:
    """Return where the keys and values of all tokens of ``chunks`` go."""
    return [
        chunk.block_table[place // block_size] * block_size + place % block_size
        for chunk in chunks
        for place in range(chunk.start, chunk.start + len(chunk.token_ids))
    ]
