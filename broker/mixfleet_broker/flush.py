"""All that a worker's step has to say, for all its jobs, in one round trip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import NoScriptError

from mixfleet_broker.errors import BrokerError, MessageError
from mixfleet_broker.event_codec import encode_chunk
from mixfleet_broker.finishing import finish_args
from mixfleet_broker.keys import CONTROL
from mixfleet_broker.lua import Argument, ScriptName
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import Lease
from mixfleet_broker.redis_errors import raise_ours, redis_errors
from mixfleet_broker.write_outcome import Behind, WriteOutcome, write_outcome

MAX_WORDS: Final = 256
"""Words fetched at a time."""

_Call = tuple[ScriptName, tuple[Argument, ...]]
"""A script, and its ARGV from the second on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushResult:
    """The outcome of each write, in the order in which they were given."""

    outcomes: tuple[WriteOutcome | Behind, ...]
    num_queued: int
    """Jobs that wait in the queue now."""
    words: tuple[str, ...] = ()
    """What somebody had to tell the worker, see the key ``control``."""


class Flush:
    """A set of writes, at most one of each job, sent together.

    After an error send the same flush again: what had arrived is not written twice.

    Args:
        queue: The queue whose jobs are written.
        worker_id: Whose words are fetched along; None fetches none.
    """

    def __init__(self, queue: JobQueue, worker_id: str | None = None) -> None:
        self._queue = queue
        self._worker_id = worker_id
        self._writes: dict[str, _Call] = {}

    def __len__(self) -> int:
        return len(self._writes)

    def append(self, lease: Lease, chunk: TokenChunk) -> None:
        """Add the next piece of an answer.

        Raises:
            MessageError: It holds no token, so it has no place of its own in the channel.
        """
        if not chunk.token_ids:
            raise MessageError("chunk: without tokens it can only be the last, with the job's end")
        num_before = chunk.num_tokens - len(chunk.token_ids)
        piece = (lease.job_id, lease.run, num_before, chunk.num_tokens, encode_chunk(chunk))
        self._add(lease, "append", piece)

    def finish(self, lease: Lease, end: JobEnd, chunk: TokenChunk | None = None) -> None:
        """Add the end of a job with the last piece of its answer, see ``JobQueue.finish``."""
        self._add(lease, "finish", finish_args(lease, end, chunk, self._queue.rules))

    def send(self) -> FlushResult:
        """Send all writes.

        Raises:
            BrokerUnavailableError: No Redis answers; some writes may have arrived.
            BrokerFullError: Redis is out of memory and too old to let writes over its limit.
            BrokerError: Redis refuses for another reason.
        """
        queue = self._queue
        calls = self._calls()
        with redis_errors(), queue.redis.pipeline(transaction=False) as pipeline:
            for name, args in calls:
                queue.scripts.queue_on(pipeline, name, queue.model, *args)
            queue.ask_depth(pipeline)
            if self._worker_id is not None:
                control = CONTROL(self._worker_id, prefix=queue.prefix)
                pipeline.lpop(control, MAX_WORDS)
            replies = pipeline.execute(raise_on_error=False)
        written = [
            self._reply(name, args, reply)
            for (name, args), reply in zip(calls, replies, strict=False)
        ]
        listed, cancelled, *rest = (_sound(reply) for reply in replies[len(calls) :])
        return FlushResult(
            outcomes=self._outcomes(written),
            num_queued=listed - cancelled,
            words=tuple(word.decode() for found in rest for word in found or ()),
        )

    def _add(self, lease: Lease, name: ScriptName, args: tuple[Argument, ...]) -> None:
        if lease.job_id in self._writes:
            raise MessageError(f"flush: a second write of job {lease.job_id}")
        self._writes[lease.job_id] = name, args

    def _calls(self) -> list[_Call]:
        """Return what is sent: all pieces in one call, if there are any, then each end."""
        writes = self._writes.values()
        pieces = tuple(arg for name, args in writes if name == "append" for arg in args)
        ends = [call for call in writes if call[0] == "finish"]
        return [("append", pieces), *ends] if pieces else ends

    def _reply(self, name: ScriptName, args: tuple[Argument, ...], reply: Any) -> Any:
        if isinstance(reply, NoScriptError):
            with redis_errors():
                return self._queue.scripts.run(name, self._queue.model, *args)
        return _sound(reply)

    def _outcomes(self, replies: Sequence[Any]) -> tuple[WriteOutcome | Behind, ...]:
        """Return what became of each write, in the order in which they were given."""
        names = [name for name, _ in self._writes.values()]
        num_pieces = names.count("append")
        pieces, ends = (replies[0], replies[1:]) if num_pieces else ([], replies)
        if not isinstance(pieces, list) or len(pieces) != num_pieces:
            raise BrokerError(f"append: unexpected reply {pieces!r:.200}")
        of_script = {"append": iter(pieces), "finish": iter(ends)}
        return tuple(write_outcome(next(of_script[name])) for name in names)


def _sound(reply: Any) -> Any:
    """Return a reply that is none of redis-py's errors; raise ours for one that is."""
    if isinstance(reply, Exception):
        raise_ours(reply)
    return reply
