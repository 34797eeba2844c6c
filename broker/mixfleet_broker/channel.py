"""A job's channel: one Redis stream, written by its runs in turn and read by anybody.

An event's id is ``<run>-<tokens so far>``. Redis refuses an id that is not above all others, so
neither a worker that has lost the job nor a retry can say anything twice; and it is the number
from which a reader goes on. Whoever takes a job from a worker says so in the channel, under a new
run number: from that event on the worker is fenced. Chunks are written by
:class:`mixfleet_broker.flush.Flush`, each only where it follows what the channel has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from redis import Redis
from redis.exceptions import ResponseError

from mixfleet_broker.errors import MessageError
from mixfleet_broker.event_codec import decode_event
from mixfleet_broker.keys import (
    CHANNEL,
)
from mixfleet_broker.messages import (
    JobEnd,
    JobEvent,
    TokenChunk,
)
from mixfleet_broker.names import (
    check_job_id,
)
from mixfleet_broker.redis_errors import redis_errors

FIRST: Final = "0-0"
"""Read from here to get everything."""
MAX_EVENTS_PER_READ: Final = 512

_BELL_TTL_S: Final = 3600
_EVENT_ID: Final = re.compile(r"(\d{1,15})-(\d{1,15})")


def read_events(
    redis: Redis, job_id: str, after: str = FIRST, block_s: float = 0.0, *, prefix: str = ""
) -> list[tuple[str, JobEvent]]:
    """Return the events after one, in order; an empty list if none came in time.

    Args:
        redis: A client whose replies are bytes, and whose socket timeout is above ``block_s``.
        job_id: The job; it need not have started, nor exist.
        after: Id of the last event that was read, :data:`FIRST` for none.
        block_s: How long to wait for the first; 0 does not wait.
        prefix: Before all keys.

    Raises:
        MessageError: ``after`` is no event id, or an event is not of the schema.
        BrokerUnavailableError: No Redis answers.
    """
    if not _EVENT_ID.fullmatch(after):
        raise MessageError(f"after={after[:40]!r}: must be an event id, like 1764000000000-12")
    block_ms = max(1, round(block_s * 1000)) if block_s > 0 else None
    with redis_errors():
        reply = redis.xread(
            {CHANNEL(check_job_id(job_id), prefix=prefix): after},
            count=MAX_EVENTS_PER_READ,
            block=block_ms,
        )
    return [decode_entry(entry) for entry in _entries(reply)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bell:
    """A stream by which a reader of many channels is told to look at its list again."""

    key: str
    last: str = FIRST
    """Id of the last ring that was heard."""


def read_channels(
    redis: Redis, after: Mapping[str, str], bell: Bell, block_s: float, *, prefix: str = ""
) -> tuple[Bell, dict[str, list[Any]]]:
    """Wait for events on many channels with one command.

    Args:
        redis: A client whose replies are bytes, and whose socket timeout is above ``block_s``.
        after: By job id, the id of the last event that was read.
        bell: Ends the wait when it rings, see :func:`ring`.
        block_s: How long to wait.
        prefix: Before all keys.

    Returns:
        The bell as it is now, and by job id the entries that came, for :func:`decode_entry`: one
        that is not of the schema then hurts the reader of its own job alone.
    """
    jobs = {CHANNEL(job_id, prefix=prefix): job_id for job_id in after}
    streams: dict[Any, Any] = {bell.key: bell.last}
    streams |= {key: after[job_id] for key, job_id in jobs.items()}
    with redis_errors():
        reply = redis.xread(streams, count=MAX_EVENTS_PER_READ, block=round(block_s * 1000))
    found: dict[str, list[Any]] = {}
    for raw_key, entries in _streams(reply):
        key = raw_key.decode()
        if key == bell.key:
            bell = replace(bell, last=entries[-1][0].decode())
        else:
            found[jobs[key]] = entries
    return bell, found


def ring(redis: Redis, bell_key: str, number: int) -> None:
    """Ring a reader's bell for the ``number``th time; a ring that comes too late is not needed."""
    with redis_errors():
        try:
            redis.xadd(bell_key, {"n": number}, id=f"{number}-1", maxlen=1, approximate=False)
        except ResponseError as error:
            if "equal or smaller" not in str(error):
                raise
        redis.expire(bell_key, _BELL_TTL_S)


def delivered_tokens(redis: Redis, job_id: str, *, prefix: str = "") -> tuple[int, ...]:
    """Return the token ids of all chunks so far, which a next run goes on after.

    Raises:
        MessageError: A chunk is not of the schema, or does not follow the one before.
    """
    token_ids: list[int] = []
    for _, event in all_events(redis, job_id, prefix=prefix):
        if not isinstance(event, TokenChunk):
            continue
        if event.num_tokens != len(token_ids) + len(event.token_ids):
            raise MessageError(
                f"channel of job {job_id}: {len(event.token_ids)} tokens after {len(token_ids)} "
                f"make {event.num_tokens}"
            )
        token_ids.extend(event.token_ids)
    return tuple(token_ids)


def ended(redis: Redis, job_id: str, *, prefix: str = "") -> JobEnd | None:
    """Return how the job ended; None when its channel has no end, or is not there."""
    with redis_errors():
        entries = redis.xrevrange(CHANNEL(check_job_id(job_id), prefix=prefix), count=1)
    if not entries:
        return None
    _, event = decode_entry(entries[0])
    return event if isinstance(event, JobEnd) else None


def all_events(redis: Redis, job_id: str, *, prefix: str = "") -> list[tuple[str, JobEvent]]:
    """Return all events of a job so far; none where it has no channel."""
    with redis_errors():
        entries = redis.xrange(CHANNEL(check_job_id(job_id), prefix=prefix))
    return [decode_entry(entry) for entry in entries or ()]


def _entries(reply: Any) -> list[Any]:
    """Return the entries of the one stream in a reply, in either protocol of Redis."""
    return [entry for _, entries in _streams(reply) for entry in entries]


def _streams(reply: Any) -> list[tuple[bytes, list[Any]]]:
    """Return the streams in a reply with their entries, in either protocol of Redis."""
    if isinstance(reply, dict):
        return [(key, [e for entries in lists for e in entries]) for key, lists in reply.items()]
    return [(key, entries) for key, entries in reply or ()]


def decode_entry(entry: Any) -> tuple[str, JobEvent]:
    """Return the id and the event of one entry of a channel.

    Raises:
        MessageError: It is not of the schema.
    """
    raw_id, fields = entry
    event_id = raw_id.decode()
    match = _EVENT_ID.fullmatch(event_id)
    kind, body = (fields or {}).get(b"k"), (fields or {}).get(b"d")
    if match is None or kind is None or body is None or len(fields) != 2:
        raise MessageError(f"channel: event {event_id} is not of the schema")
    run, num_tokens = int(match[1]), int(match[2])
    return event_id, decode_event(kind.decode("ascii", "replace"), run, num_tokens, body)
