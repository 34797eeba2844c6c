"""The steps that are planned and not booked: one, or two while the first of them runs."""

from collections import deque
from collections.abc import Iterable

from mixfleet_engine.admission import Admission
from mixfleet_engine.kv_book import KvBook
from mixfleet_engine.sequence import Sequence
from mixfleet_engine.step import StepPlan

_MOST = 2


class PlannedSteps:
    """Makes plans and remembers whose they are until they are booked, in order, or void.

    Args:
        book: The blocks of the sequences.
        admission: Where a sequence goes that must begin again.
    """

    def __init__(self, book: KvBook, admission: Admission) -> None:
        self._book = book
        self._admission = admission
        self._steps: deque[tuple[StepPlan, tuple[Sequence, ...]]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether no other may be planned before the first is booked."""
        return len(self._steps) == _MOST

    def add(self, shares: Iterable[tuple[Sequence, int]]) -> StepPlan:
        """Plan a step of the next so many tokens of each sequence, all of which have blocks."""
        assert not self.is_full
        chunks, sequences, num_samples = [], [], 0
        for sequence, num_tokens in shares:
            chunk = self._book.chunk(sequence, num_tokens, num_samples)
            num_samples += chunk.samples
            chunks.append(chunk)
            sequences.append(sequence)
        plan = StepPlan(chunks=tuple(chunks), clear_blocks=self._book.take_unclean())
        self._steps.append((plan, tuple(sequences)))
        return plan

    def take(self, plan: StepPlan, num_sampled: int) -> tuple[Sequence, ...]:
        """Forget the oldest plan, which is about to be booked; the sequences of its chunks.

        Raises:
            ValueError: It is not ``plan``, or has another number of samples. Nothing changed.
        """
        if not self._steps or self._steps[0][0] is not plan:
            raise ValueError("a plan can be committed only in its turn, and only once")
        if num_sampled != plan.num_samples:
            raise ValueError(f"{num_sampled} tokens for {plan.num_samples} chunks that sample")
        return self._steps.popleft()[1]

    def void(self) -> None:
        """Forget all plans: whatever their steps have done, it does not count.

        Who was in two of them begins again. Its first step will come once more, and would look at
        what the second left behind its tokens, which may be a NaN; in a new block it is not.
        """
        for plan, sequences in self._steps:
            self._book.give_back_unclean(plan.clear_blocks)
            for sequence in sequences:
                sequence.unplan()
        if self.is_full:
            (_, first), (_, second) = self._steps
            for sequence in second:
                # Who has ended meanwhile holds nothing.
                if sequence in first and sequence.block_table:
                    self._admission.requeue(sequence)
        self._steps.clear()
