"""A step plan as tensors: built once a step, read by every layer.

Shape letters: T tokens in the step, B sequences of one decode group, M blocks of the longest of
them, S slots of M blocks, R rows to sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from mixfleet_engine.step import PlannedChunk, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Several neighbouring tokens of one sequence."""

    first_row: int
    """Where they begin in the step's ``[T, ...]`` tensors."""
    num_rows: int
    start: int
    """Position of the first of them; the context before it is in the KV cache."""
    block_table: Tensor
    """``[M]`` blocks of positions ``0 .. start + num_rows - 1``."""
    mask: Tensor | None
    """``[num_rows, start + num_rows]``, True where a token may look; None: plain causal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """One token each of several sequences of similar length."""

    rows: Tensor
    """``[B]`` rows of the step's tensors."""
    block_tables: Tensor
    """``[B, M]``; a shorter table is filled up with its sequence's first block."""
    lengths: tuple[int, ...]
    """Tokens of context of each, its own included."""
    mask: Tensor
    """``[B, S]``, True at slots that hold context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """The step's chunks as flat int32 arrays, for back-ends that walk them on their own.

    Worked example, block_size 4: a prefill of positions 3..5 with blocks (7, 2), then a decode at
    position 1 with block (5,)::

        first_rows 0 3   num_rows 3 1   starts 3 1   table_offsets 0 2   tables 7 2 5
    """

    first_rows: Tensor
    """``[C]`` where each chunk begins in the step's ``[T, ...]`` tensors."""
    num_rows: Tensor
    """``[C]``."""
    starts: Tensor
    """``[C]`` position of the first token of each."""
    table_offsets: Tensor
    """``[C]`` where each chunk's block table begins in ``tables``."""
    tables: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything that the model needs of one step. What few back-ends need is made when asked."""

    plan_chunks: tuple[PlannedChunk, ...]
    firsts: tuple[int, ...]
    """First row of each chunk."""
    block_size: int
    device: torch.device
    token_ids: Tensor
    """``[T]``."""
    positions: Tensor
    """``[T]`` place of each token in its own sequence."""
    sample_rows: Tensor
    """``[R]`` rows whose logits are wanted, in plan order."""

    @cached_property
    def chunks(self) -> ChunkTable:
        """The chunks as flat arrays on the CPU."""
        chunks = self.plan_chunks
        ends = accumulate((len(chunk.block_table) for chunk in chunks), initial=0)
        return ChunkTable(
            first_rows=_int32(self.firsts),
            num_rows=_int32([len(chunk.token_ids) for chunk in chunks]),
            starts=_int32([chunk.start for chunk in chunks]),
            table_offsets=_int32(list(ends)[:-1]),
            tables=_int32(list(chain.from_iterable(chunk.block_table for chunk in chunks))),
        )

    @cached_property
    def slots(self) -> Tensor:
        """``[T]`` where each token's key and value go: ``block * block_size + offset``."""
        slots = [
            torch.tensor(chunk.block_table)[places // self.block_size] * self.block_size
            + places % self.block_size
            for chunk in self.plan_chunks
            for places in [torch.arange(chunk.start, chunk.start + len(chunk.token_ids))]
        ]
        return torch.cat(slots).to(self.device)

    @cached_property
    def prefills(self) -> tuple[PrefillChunk, ...]:
        """The chunks of more than one token."""
        return tuple(
            _prefill(first, chunk, self.device)
            for first, chunk in zip(self.firsts, self.plan_chunks, strict=True)
            if len(chunk.token_ids) > 1
        )

    @cached_property
    def decodes(self) -> tuple[DecodeGroup, ...]:
        """The chunks of one token, those of similar length together."""
        placed = [
            (first, chunk)
            for first, chunk in zip(self.firsts, self.plan_chunks, strict=True)
            if len(chunk.token_ids) == 1
        ]
        return _decodes(placed, self.block_size, self.device)


def make_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """Return ``plan`` as tensors on ``device``.

    Worked example, block_size 4: a prefill of positions 3..5 with blocks (7, 2), then a decode at
    position 1 with block (5,)::

        positions    3 4 5 | 1
        slots        31 8 9 | 21      (7*4+3, 2*4+0, 2*4+1 | 5*4+1)
        sample_rows  2 3              (the last row of each chunk that samples)
    """
    chunks = plan.chunks
    ends = list(accumulate((len(chunk.token_ids) for chunk in chunks), initial=0))
    positions = (range(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks)
    sample_rows = [end - 1 for end, chunk in zip(ends[1:], chunks, strict=True) if chunk.samples]
    return Batch(
        plan_chunks=chunks,
        firsts=tuple(ends[:-1]),
        block_size=block_size,
        device=device,
        token_ids=on_device(
            torch.tensor(list(chain.from_iterable(c.token_ids for c in chunks))), device
        ),
        positions=on_device(torch.tensor(list(chain.from_iterable(positions))), device),
        sample_rows=on_device(torch.tensor(sample_rows, dtype=torch.long), device),
    )


def _int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device; the host does not wait for what is enqueued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _prefill(first_row: int, chunk: PlannedChunk, device: torch.device) -> PrefillChunk:
    num_rows = len(chunk.token_ids)
    mask = None
    if chunk.start > 0:
        mask = torch.ones(num_rows, chunk.start + num_rows, dtype=torch.bool, device=device)
        mask = mask.tril(chunk.start)
    return PrefillChunk(
        first_row=first_row,
        num_rows=num_rows,
        start=chunk.start,
        block_table=torch.tensor(chunk.block_table).to(device),
        mask=mask,
    )


def _decodes(
    placed: Sequence[tuple[int, PlannedChunk]], block_size: int, device: torch.device
) -> tuple[DecodeGroup, ...]:
    """Group decodes by length, each group within a factor of two.

    A group pads its block tables to the longest, so one long context among many short ones would
    otherwise make each of them as dear as the long one.
    """
    groups: dict[int, list[tuple[int, PlannedChunk]]] = {}
    for row, chunk in placed:
        groups.setdefault((len(chunk.block_table) - 1).bit_length(), []).append((row, chunk))
    return tuple(_decode_group(group, block_size, device) for group in groups.values())


def _decode_group(
    placed: Sequence[tuple[int, PlannedChunk]], block_size: int, device: torch.device
) -> DecodeGroup:
    tables = [chunk.block_table for _, chunk in placed]
    widest = max(len(table) for table in tables)
    # Filled up with a block of the same sequence: what stands there is this sequence's own, so no
    # other sequence's values, whatever they are, come near this one's sums.
    padded = [table + table[:1] * (widest - len(table)) for table in tables]
    lengths = tuple(chunk.start + 1 for _, chunk in placed)
    slots = torch.arange(widest * block_size)
    return DecodeGroup(
        rows=torch.tensor([row for row, _ in placed]).to(device),
        block_tables=torch.tensor(padded).to(device),
        lengths=lengths,
        mask=(slots < torch.tensor(lengths)[:, None]).to(device),
    )
