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

    Writes go out one at a time, so that a refused one can never leave a gap before a later one
    that was accepted. What comes meanwhile is merged where it can be: a slow Redis gets fewer and
    larger chunks instead of a growing pile. Text and tool calls stay apart.
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

    def add(self, write: Write) -> None:
        """Take one more write, later than all before it."""
        last = self.unsent[-1] if self.unsent else None
        if isinstance(last, ChunkWrite) and _can_join(last.chunk, write.chunk):
            self.unsent[-1] = replace(write, chunk=_joined(last.chunk, write.chunk))
        else:
            self.unsent.append(write)

    def next_write(self) -> Write | None:
        """Return what is to be sent now; it stays until :meth:`settle`."""
        if self.sent is None and self.unsent:
            self.sent = self.unsent.popleft()
        return self.sent

    def settle(self) -> None:
        """Forget the write that was sent: its fate is known."""
        self.sent = None

    @property
    def has_writes(self) -> bool:
        """Whether anything is still to be written."""
        return self.sent is not None or bool(self.unsent)

    @property
    def has_end(self) -> bool:
        """Whether the answer is complete and only its end is still to be written."""
        return isinstance(self.unsent[-1] if self.unsent else self.sent, EndWrite)


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
