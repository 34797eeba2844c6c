"""One leased job as the I/O thread sees it: its lease, and what is still to be written."""

import re
from collections import deque
from dataclasses import dataclass, field, replace

from mixfleet_broker.messages import (
    TokenChunk,
)
from mixfleet_broker.queue import Lease
from mixfleet_worker.handoff import ChunkWrite, EndWrite, Write

MAX_JOINED_LOGPROBS = 8192
"""Log-probabilities in one chunk: with the bytes of their tokens well below what a message may
hold."""
LONGEST_WAIT_S = 30 * 86_400
"""An id that says more was not made by ``new_job_id``."""

_TIMED_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True, kw_only=True)
class HeldJob:
    """A job that is leased to this worker.

    Writes go out one at a time. What comes meanwhile is merged where it can be: a slow Redis gets
    fewer and larger chunks instead of a growing pile. Text and tool calls stay apart.

    What was written is kept for a while. A Redis that comes back without its last writes is given
    them again as they were: some readers have got them, others have not, and to both the channel
    reads as if nothing had happened.
    """

    lease: Lease
    renewed_at: float
    """When the lease was last known to be ours, on the worker's monotonic clock."""
    alone: bool = False
    """Nothing else may run beside it."""
    queue_s: float | None = None
    """How long the job had waited for us, see :func:`waited_s`."""
    sent: Write | None = None
    """Sent at least once, not known to have arrived. It is sent again unchanged: a larger copy
    of a chunk that did arrive would say its text twice."""
    unsent: deque[Write] = field(default_factory=deque)
    """All later writes, in as few as possible."""
    written: deque[tuple[float, ChunkWrite]] = field(default_factory=deque)
    """The last that arrived, and when."""
    again: deque[Write] = field(default_factory=deque)
    """Sent before and lost by Redis; they go out unchanged, before ``unsent``."""

    def add(self, write: Write) -> None:
        """Take one more write, later than all before it."""
        last = self.unsent[-1] if self.unsent else None
        if isinstance(last, ChunkWrite) and _can_join(last.chunk, write.chunk):
            self.unsent[-1] = replace(write, chunk=_joined(last.chunk, write.chunk))
        else:
            self.unsent.append(write)

    def next_write(self) -> Write | None:
        """Return what is to be sent now; it stays until :meth:`settle`."""
        if self.sent is None and (waiting := self.again or self.unsent):
            self.sent = waiting.popleft()
        return self.sent

    def settle(self, now: float, keep_s: float) -> None:
        """Take the write that was sent for written.

        Args:
            now: The worker's monotonic clock.
            keep_s: For how long what was written can be sent again.
        """
        if isinstance(self.sent, ChunkWrite):
            self.written.append((now, self.sent))
        self.sent = None
        while self.written and self.written[0][0] < now - keep_s:
            self.written.popleft()

    def send_again_after(self, num_tokens: int) -> bool:
        """Send again what follows the first ``num_tokens`` tokens of the answer.

        Returns:
            False when what follows them is not known any more; then nothing has changed.
        """
        lost = [write for _, write in self.written if write.chunk.num_tokens > num_tokens]
        if not lost or lost[0].chunk.num_tokens - len(lost[0].chunk.token_ids) != num_tokens:
            return False
        for _ in lost:
            self.written.pop()
        sent = [] if self.sent is None else [self.sent]
        self.again.extendleft(reversed([*lost, *sent]))
        self.sent = None
        return True

    @property
    def has_writes(self) -> bool:
        """Whether anything is still to be written."""
        return self.sent is not None or bool(self.again) or bool(self.unsent)

    @property
    def has_end(self) -> bool:
        """Whether the answer is complete and only the rest of it is still to be written."""
        waiting = self.unsent or self.again
        return isinstance(waiting[-1] if waiting else self.sent, EndWrite)


def waited_s(job_id: str, now: float) -> float | None:
    """Return how long ago a client made ``job_id``, which ``new_job_id`` begins with the time.

    Args:
        job_id: Of any form.
        now: Unix time.

    Returns:
        Seconds, by two machines' clocks and so for logs only; None when the id tells no time.
    """
    if not _TIMED_ID.fullmatch(job_id):
        return None
    seconds = now - int(job_id[:12], 16) / 1000
    return seconds if 0 <= seconds < LONGEST_WAIT_S else None


def _can_join(first: TokenChunk, second: TokenChunk | None) -> bool:
    """Whether two chunks may become one: of the same part, and no larger than a message may be."""
    if second is None:
        return True
    num_logprobs = _num_logprobs(first) + _num_logprobs(second)
    return first.part == second.part and num_logprobs <= MAX_JOINED_LOGPROBS


def _num_logprobs(chunk: TokenChunk) -> int:
    return sum(1 + len(one.top) for one in chunk.logprobs)


def _joined(first: TokenChunk, second: TokenChunk | None) -> TokenChunk:
    if second is None:
        return first
    return replace(
        first,  # which says what only a run's first chunk does
        num_tokens=second.num_tokens,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        part=first.part,
        logprobs=first.logprobs + second.logprobs,
    )
