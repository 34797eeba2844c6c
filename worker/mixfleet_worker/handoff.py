"""What passes between the loop thread and the I/O thread, and the two queues it passes through.

The loop never touches Redis and the I/O thread never touches the engine; all that one knows of
the other is one of these values. Every value that belongs to a job carries its lease, so that a
write of a run that was lost can never be taken for one of the run that followed it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.queue import ClaimedJob, Lease

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenJob:
    """A job that was claimed: what the loop needs to begin it, or to go on with it."""

    claimed: ClaimedJob
    delivered_token_ids: tuple[int, ...] = ()
    """Tokens of the answer that earlier runs gave to the reader."""
    claimed_at: float
    """On the worker's monotonic clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LostJob:
    """The lease ended (cancelled, reaped, or Redis away for too long): stop computing it."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a reason to look up from waiting."""


@dataclass(frozen=True, slots=True)
class IOFailed:
    """The I/O thread ended by an error of ours; the worker cannot go on."""

    error: Exception


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """An operator told the worker to finish what it has and to end."""


ToLoop = TakenJob | LostJob | Wake | DrainOrdered | IOFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTimes:
    """When things happened to a job here, on the worker's monotonic clock."""

    claimed_at: float
    first_token_at: float | None = None
    ended_at: float
    traceparent: str | None = None
    """Of the job, for the span of this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWrite:
    """A piece of an answer to be appended to the job's channel."""

    lease: Lease
    chunk: TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class EndWrite:
    """The end of a job, and the last piece of its answer if there is one."""

    lease: Lease
    end: JobEnd
    chunk: TokenChunk | None = None
    times: JobTimes


Write = ChunkWrite | EndWrite


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One turn of the loop: the sign that it lives, its writes, and the room that is left."""

    writes: tuple[Write, ...] = ()
    free_slots: int
    """Jobs that the engine could begin now, ``num_taken`` jobs having reached it."""
    num_taken: int
    """Of all :class:`TakenJob` ever handed over, how many the loop had received by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseJob:
    """Give the job back to the queue, no blame."""

    lease: Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolateJob:
    """Give the job back to be run alone, no blame: the engine failed on it or on a neighbour."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class StopClaiming:
    """The worker drains: take no more jobs."""


@dataclass(frozen=True, slots=True)
class Close:
    """Write what is left, release all that is held and end the thread."""


ToIO = StepReport | ReleaseJob | IsolateJob | StopClaiming | Close


@dataclass(frozen=True, slots=True)
class Mailboxes:
    """The two queues. ``SimpleQueue``, because a signal handler may put into it."""

    to_loop: SimpleQueue[ToLoop] = field(default_factory=SimpleQueue)
    to_io: SimpleQueue[ToIO] = field(default_factory=SimpleQueue)


def receive(mailbox: SimpleQueue[Item], timeout_s: float) -> Iterator[Item]:
    """Yield all that is there, after waiting up to ``timeout_s`` seconds for the first."""
    try:
        yield mailbox.get(timeout=timeout_s) if timeout_s > 0 else mailbox.get_nowait()
        while True:
            yield mailbox.get_nowait()
    except Empty:
        return
