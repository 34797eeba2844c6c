"""All that a worker's step has to say, for all its jobs, in one round trip."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from redis.exceptions import NoScriptError, ResponseError

from mixfleet_broker.channel import append_chunk, chunk_id
from mixfleet_broker.errors import MessageError
from mixfleet_broker.event_codec import encode_chunk
from mixfleet_broker.finishing import finish_outcome
from mixfleet_broker.keys import CONTROL
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import Lease
from mixfleet_broker.redis_errors import is_out_of_memory, raise_ours, redis_errors

MAX_WORDS: Final = 256
"""Words fetched at a time."""


class WriteOutcome(StrEnum):
    """What became of one write."""

    DONE = "done"
    """It is in Redis; an end also when an earlier flush had brought it there."""
    REFUSED = "refused"
    """The channel is already at or past this chunk. Either the chunk had arrived before and only
    the reply was lost, or another run has the job: ``JobQueue.renew`` tells. A job that renew
    does not call lost has its chunk."""
    LOST = "lost"
    """The job is not the worker's any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushResult:
    """The outcome of each write, in the order in which they were given."""

    outcomes: tuple[WriteOutcome, ...]
    num_queued: int
    """Jobs that wait in the queue now."""
    words: tuple[str, ...] = ()
    """What somebody had to tell the worker, see the key ``control``."""


@dataclass(frozen=True, slots=True)
class _Write:
    lease: Lease
    chunk: TokenChunk | None
    end: JobEnd | None


class Flush:
    """A set of writes, at most one of each job, sent together.

    After an error send the same flush again: what had arrived is not written twice. Nothing
    later may be sent for its jobs before that, or their channels would miss tokens.

    Args:
        queue: The queue whose jobs are written.
        worker_id: Whose words are fetched along; None fetches none.
    """

    def __init__(self, queue: JobQueue, worker_id: str | None = None) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._writes: dict[str, _Write] = {}

    def __len__(self) -> int:
        return len(self._writes)

    def append(self, lease: Lease, chunk: TokenChunk) -> None:
        """Add the next piece of an answer; it holds at least one token."""
        self._add(_Write(lease, chunk, None))

    def finish(self, lease: Lease, end: JobEnd, chunk: TokenChunk | None = None) -> None:
        """Add the end of a job with the last piece of its answer, see ``JobQueue.finish``."""
        self._add(_Write(lease, chunk, end))

    def send(self) -> FlushResult:
        """Send all writes.

        Raises:
            BrokerUnavailableError: No Redis answers; some writes may have arrived.
            BrokerFullError: Redis is out of memory and too old to let chunks over its limit.
            BrokerError: Redis refuses for another reason.
        """
        with redis_errors(), self._queue.redis.pipeline(transaction=False) as pipeline:
            for write in self._writes.values():
                if write.end is not None:
                    self._queue.finish_on(pipeline, write.lease, write.end, write.chunk)
                elif write.chunk is not None:
                    append_chunk(pipeline, write.lease, write.chunk, self._queue.prefix)
            self._queue.ask_depth(pipeline)
            if self._worker_id is not None:
                control = CONTROL(self._worker_id, prefix=self._queue.prefix)
                pipeline.lpop(control, MAX_WORDS)
            replies = pipeline.execute(raise_on_error=False)
        listed, cancelled, *rest = replies[len(self._writes) :]
        outcomes = [
            self._outcome(write, reply)
            for write, reply in zip(self._writes.values(), replies, strict=False)
        ]
        for reply in (listed, cancelled, *rest):
            if isinstance(reply, Exception):
                raise_ours(reply)
        words = [word.decode() for found in rest for word in found or ()]
        return FlushResult(
            outcomes=tuple(outcomes), num_queued=listed - cancelled, words=tuple(words)
        )

    def _add(self, write: _Write) -> None:
        job_id = write.lease.job_id
        if job_id in self._writes:
            raise MessageError(f"flush: a second write of job {job_id}")
        self._writes[job_id] = write

    def _outcome(self, write: _Write, reply: Any) -> WriteOutcome:
        if write.end is not None:
            return self._finish_outcome(write, write.end, reply)
        if isinstance(reply, Exception) and is_out_of_memory(reply):
            reply = _reply_of(lambda: self._append_over_limit(write))
        return append_outcome(reply)

    def _finish_outcome(self, write: _Write, end: JobEnd, reply: Any) -> WriteOutcome:
        if isinstance(reply, NoScriptError):
            done = self._queue.finish(write.lease, end, write.chunk)
        elif isinstance(reply, Exception):
            raise_ours(reply)
        else:
            done = finish_outcome(reply)
        return WriteOutcome.DONE if done else WriteOutcome.LOST

    def _append_over_limit(self, write: _Write) -> Any:
        if write.chunk is None:
            return None
        return self._queue.scripts.run(
            "append",
            self._queue.model,
            write.lease.job_id,
            chunk_id(write.lease, write.chunk),
            encode_chunk(write.chunk),
        )


_SPOILT: Final = ("WRONGTYPE", "last possible ID")
"""Somebody else wrote in the channel's place: this job's trouble, nobody else's. The next claim
begins the channel anew."""


def append_outcome(reply: object) -> WriteOutcome:
    """Return what a reply to ``append_chunk`` says, be it a value or redis-py's error.

    Raises:
        BrokerError: Redis refused for another reason than the event's id.
    """
    if reply is None:
        return WriteOutcome.LOST
    if isinstance(reply, ResponseError) and "equal or smaller" in str(reply):
        return WriteOutcome.REFUSED
    if isinstance(reply, ResponseError) and any(sign in str(reply) for sign in _SPOILT):
        return WriteOutcome.LOST
    if isinstance(reply, Exception):
        raise_ours(reply)
    return WriteOutcome.DONE


def _reply_of(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error that Redis answers it with."""
    try:
        return call()
    except ResponseError as error:
        return error
