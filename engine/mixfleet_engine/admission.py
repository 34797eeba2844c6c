"""Who runs and who waits: the order of all requests, and who gives way to whom.

The order is (priority, arrival). Who runs holds blocks; who waits holds none.

- The waiting are admitted in order: while the first of them does not fit, nobody behind it is.
- A running sequence that needs a block while none is free takes those of the *last* running one in
  the order, which waits again with the tokens it has, to be prefilled again. The last itself pauses
  instead, holding what it has.
- A waiting sequence takes the place of running ones of worse priority, the last first, if that is
  what it takes; never of equal ones.

So the first in the order is never in anyone's way, and within a priority nobody starves: a request
moves in every step in which it is the first. Across priorities the better always goes first,
however long the worse waits: who wants ageing changes the numbers before a request comes here.
"""

import logging
from bisect import insort
from collections.abc import Iterable, Iterator

from mixfleet_engine.kv_book import KvBook
from mixfleet_engine.sequence import Sequence

logger = logging.getLogger(__name__)


class Admission:
    """The two queues, both in order.

    Args:
        book: The blocks that it gives to who runs.
        max_batch_size: Most sequences that run at once.
    """

    def __init__(self, book: KvBook, *, max_batch_size: int) -> None:
        self._book = book
        self._max_batch_size = max_batch_size
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preemptions = 0
        """How often a running sequence has lost its blocks to another."""

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none: new or preempted."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait at its place in the order."""
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        # Who runs holds at least one block, who waits holds none.
        (self._running if sequence.block_table else self._waiting).remove(sequence)
        self._book.drop(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Let a running sequence begin again with the tokens it has."""
        self._running.remove(sequence)
        self._book.drop(sequence)
        self.add(sequence)

    def ready(self) -> list[Sequence]:
        """The running sequences that have blocks for all their tokens now, in order.

        Before, the waiting take the places of those of worse priority.
        """
        self._make_way()
        # Those that the loop preempts stand behind the place where it is.
        return [sequence for sequence in self._running if self._grow(sequence)]

    def ready_ahead(self) -> list[Sequence] | None:
        """The same while a step runs, without those that end with it.

        None if somebody would lose a place, which may be free when the step is booked, or awaits
        the step's token. Blocks taken until then are kept: the next step needs them as well.
        """
        if any(sequence.awaits_token for sequence in self._running) or self._in_the_way():
            return None
        ready: list[Sequence] = []
        for sequence in self._running:
            if sequence.is_full:
                continue
            if self._book.num_missing(sequence) <= self._book.num_free:
                self._book.grow(sequence)
                ready.append(sequence)
            elif sequence is not self._running[-1]:
                return None
        return ready

    def next_to_prefill(self, prefilling: Iterable[Sequence]) -> Iterator[Sequence]:
        """Who may prefill next, in order: of ``prefilling``, or a waiting one, admitted just now.

        Ask for one more only if there is room for at least one of its tokens.
        """
        queue = list(prefilling)
        while True:
            first_waits = self._waiting and (not queue or _order(self._waiting[0]) < queue[0].order)
            if first_waits and (admitted := self._admit_next()) is not None:
                yield admitted
            elif queue:
                yield queue.pop(0)
            else:
                return

    def _make_way(self) -> None:
        while victims := self._in_the_way():
            for victim in victims:
                self._preempt(victim)
            if self._admit_next() is None:
                return

    def _in_the_way(self) -> list[Sequence]:
        """Admit who goes before a running sequence; the victims that the next of them takes."""
        while self._waiting and self._running:
            first = self._waiting[0]
            if first.request.priority >= self._running[-1].request.priority:
                break
            if self._admit_next() is None:
                return self._victims(first)
        return []

    def _victims(self, newcomer: Sequence) -> list[Sequence]:
        """The fewest running sequences, last ones first, whose places are enough for a newcomer.

        Empty when not even all of worse priority are.
        """
        victims: list[Sequence] = []
        free = self._book.num_free
        for victim in reversed(self._running):
            if victim.request.priority <= newcomer.request.priority:
                break
            victims.append(victim)
            free += self._book.num_alone(victim)
            if self._book.num_needed(newcomer) + len(self._running) - len(victims) <= free:
                return victims
        return []

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens; False when it must pause."""
        while self._book.num_missing(sequence) > self._book.num_free:
            last = self._running[-1]
            if last is sequence:
                return False
            self._preempt(last)
        self._book.grow(sequence)
        return True

    def _preempt(self, last: Sequence) -> None:
        logger.info(
            "preempted request_id=%s num_tokens=%d", last.request.request_id, last.num_tokens
        )
        self._running.pop()
        self._book.drop(last)
        self.add(last)
        self.num_preemptions += 1

    def _admit_next(self) -> Sequence | None:
        """Let the first of the waiting run if there is a slot and it fits."""
        if not self._waiting or len(self._running) == self._max_batch_size:
            return None
        first = self._waiting[0]
        # One free block is left for each running sequence to grow into: without it a newcomer
        # would be preempted again as soon as it has been prefilled.
        leave = len(self._running)
        room = self._book.num_free - leave
        # Looking for its tokens in the cache takes time, so not in every step in which it waits.
        if first.refused_at is not None and room <= first.refused_at:
            return None
        if not self._book.admit(first, leave=leave):
            first.refused_at = room
            return None
        self._waiting.pop(0)
        insort(self._running, first, key=_order)
        return first


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
