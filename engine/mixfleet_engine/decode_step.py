"""Decode steps of a device, in buckets: the same work on the same tensors again and again.

A step of few shapes can be recorded once and enqueued by one call. So a step of B decodes runs as
one of the next bucket's size, over as much context as the next power of two of KV splits holds. The
rows that fill up a bucket repeat the one of the shortest context and write nothing: they choose
that row's experts, so that no weights are read for their sake, and hardly any keys.

With several ranks the model and the sampling are recorded apart. Only the first rank samples, and
what ranks exchange all of them must record alike: a shape that one of them knows and another does
not would pair a replay with a first run.

Shape letters: B rows of a bucket, M blocks of a block table, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor

from mixfleet_engine.capture import Recorder, Work
from mixfleet_engine.device_draw import NUM_SETTINGS, draw_greedy, draw_tokens, row_settings
from mixfleet_engine.ops.cuda.chunks import DeviceChunks, PlacedBatch
from mixfleet_engine.step import PlannedChunk

Sampling = Literal["greedy", "drawn", "none"]
"""What a step ends with: tokens, all of them the most likely ones; tokens; logits only."""

Key = TypeVar("Key", bound=Hashable)

SMALL_BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_INTEGERS: Final = 4
"""Whole numbers of a row: its token, where that is if unread, its position, its slot."""
_LEAST_CONTEXT: Final = 512


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one recording serves."""

    num_rows: int
    """B."""
    max_context: int
    sampling: Sampling


class DecodeSteps:
    """Runs decode steps on tensors that stay where they are.

    Args:
        forward: The model: a batch to logits ``[B, V]`` fp32.
        recorder: Records what is run more than once.
        last_tokens: ``[most rows]`` int64, what the previous step sampled.
        max_rows: Most rows of a step.
        context_length: Most tokens of a sequence.
        block_size: Tokens per block of KV cache.
        vocab_size: V.
        device: Where all is.
        is_shared: Whether other ranks run the same steps.
    """

    def __init__(
        self,
        forward: Callable[[PlacedBatch], Tensor],
        recorder: Recorder,
        last_tokens: Tensor,
        *,
        max_rows: int,
        context_length: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        is_shared: bool = False,
    ) -> None:
        self._forward = forward
        self._recorder = recorder
        self._last_tokens = last_tokens
        self._context_length = context_length
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._is_shared = is_shared
        self._buckets = buckets(max_rows)
        rows, width = self._buckets[-1], -(-context_length // block_size)
        self._numbers = torch.zeros(_INTEGERS + NUM_SETTINGS, rows, dtype=torch.int64)
        self._numbers = self._numbers.to(device)
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(rows, dtype=torch.int32, device=device)
        self._ones = torch.ones(rows, dtype=torch.int32, device=device)
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        self._logits = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
        self._work: dict[StepShape, Work] = {}
        self._ends: dict[tuple[int, Sampling], Work] = {}
        """What samples, where it is recorded apart; by rows."""

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The shapes that have run so far, in order of their first run."""
        return tuple(self._work)

    def forget(self) -> None:
        """Drop all recordings."""
        self._work.clear()
        self._ends.clear()

    def takes(self, num_rows: int) -> bool:
        """Whether a step of so many decodes can run here."""
        return 0 < num_rows <= self._buckets[-1]

    def run(
        self, chunks: Sequence[PlannedChunk], unread_rows: Sequence[int], sampling: Sampling
    ) -> Tensor:
        """Enqueue a step; ``[len(chunks)]`` tokens, or ``[len(chunks), V]`` logits for ``none``.

        They are good until the next step.

        Args:
            chunks: Decodes, one or more.
            unread_rows: For each its row in the last tokens, or -1 where its token is known.
            sampling: What to end with.
        """
        rows = self._buckets[bisect_left(self._buckets, len(chunks))]
        context = self._context_bucket(max(chunk.start + 1 for chunk in chunks))
        shape = StepShape(rows, context, "none" if self._is_shared else sampling)
        self._place(chunks, unread_rows, rows, sampling)
        self._enqueue(self._work, shape, lambda: self._step(shape))
        if sampling != shape.sampling:
            self._enqueue(self._ends, (rows, sampling), lambda: self._sampling(rows, sampling))
        return (self._logits if sampling == "none" else self._sampled)[: len(chunks)]

    def _enqueue(self, recorded: dict[Key, Work], key: Key, make: Callable[[], Work]) -> None:
        if key not in recorded:
            # The first step of a shape runs by itself: it makes and tunes the kernels. Recording
            # runs nothing, so the recording is the next step's.
            work = make()
            work()
            recorded[key] = self._recorder.record(work)
        else:
            recorded[key]()

    def _context_bucket(self, needed: int) -> int:
        sizes = (_LEAST_CONTEXT << doubling for doubling in count())
        return min(next(size for size in sizes if size >= needed), self._context_length)

    def _place(
        self,
        chunks: Sequence[PlannedChunk],
        unread_rows: Sequence[int],
        num_rows: int,
        sampling: Sampling,
    ) -> None:
        """Write what the step is about where its work reads it, by two copies to the device."""
        # New memory each time: an earlier copy may still be on its way.
        pinned = self._device.type == "cuda"
        numbers = torch.empty(self._numbers.shape, dtype=torch.int64, pin_memory=pinned)
        size, filling = self._block_size, num_rows - len(chunks)
        columns = [
            (
                max(chunk.token_ids[0], 0),
                unread,
                chunk.start,
                chunk.block_table[chunk.start // size] * size + chunk.start % size,
            )
            for chunk, unread in zip(chunks, unread_rows, strict=True)
        ]
        shortest = min(range(len(chunks)), key=lambda row: chunks[row].start)
        columns += [(*columns[shortest][:3], -1)] * filling
        numbers[:_INTEGERS, :num_rows] = torch.tensor(columns).T
        if sampling == "drawn":
            settings = [row_settings(c.sampling, c.position, self._vocab_size) for c in chunks]
            settings += [settings[shortest]] * filling
            numbers[_INTEGERS:, :num_rows].view(torch.float64).copy_(
                torch.tensor(settings, dtype=torch.float64).T
            )
        widest = max(len(chunk.block_table) for chunk in chunks)
        tables = torch.zeros(num_rows, widest, dtype=torch.int32, pin_memory=pinned)
        found = tables.numpy()
        for row, chunk in enumerate(chunks):
            found[row, : len(chunk.block_table)] = chunk.block_table
        found[len(chunks) :] = found[shortest]
        self._numbers.copy_(numbers, non_blocking=True)
        self._tables[:num_rows, :widest].copy_(tables, non_blocking=True)

    def _step(self, shape: StepShape) -> Work:
        """Return the work of a step of this shape."""
        rows = shape.num_rows
        tokens, unread, positions, slots = self._numbers[:_INTEGERS, :rows]

        def work() -> None:
            # What was no token has ended its sequence; its row runs on for nobody.
            carried = self._last_tokens[unread.clamp_min(0)].clamp_min(0)
            batch = PlacedBatch(
                plan_chunks=(),
                firsts=(),
                block_size=self._block_size,
                device=self._device,
                token_ids=carried.where(unread >= 0, tokens),
                positions=positions,
                sample_rows=self._row_numbers[:rows],
                placed=DeviceChunks(
                    first_rows=self._row_numbers[:rows],
                    num_rows=self._ones[:rows],
                    starts=positions.int(),
                    block_tables=self._tables[:rows],
                    slots=slots,
                    positions=positions,
                    num_decodes=rows,
                    max_rows=1,
                    max_context=shape.max_context,
                ),
            )
            self._end(self._forward(batch), shape.sampling)

        return work

    def _sampling(self, rows: int, sampling: Sampling) -> Work:
        """Return the work that samples from what the model's work has left."""

        def work() -> None:
            self._end(self._logits[:rows], sampling)

        return work

    def _end(self, logits: Tensor, sampling: Sampling) -> None:
        rows = len(logits)  # none on other ranks than the first
        if sampling == "none":
            self._logits[:rows] = logits
        elif sampling == "greedy":
            self._sampled[:rows] = draw_greedy(logits)
        else:
            settings = self._numbers[_INTEGERS:, :rows].view(torch.float64)
            self._sampled[:rows] = draw_tokens(logits, settings.contiguous())


def buckets(max_rows: int) -> tuple[int, ...]:
    """Return the sizes that steps of up to ``max_rows`` decodes are filled up to."""
    beyond = range(SMALL_BUCKETS[-1] * 2, max_rows + SMALL_BUCKETS[-1], SMALL_BUCKETS[-1])
    sizes = (*SMALL_BUCKETS, *beyond)
    return sizes[: bisect_left(sizes, max_rows) + 1]
