"""What must be true of all keys of a queue once its jobs have ended, whatever went wrong meanwhile.

Reads only. Each broken promise is one line of text, so that a test asserts that there is none and a
benchmark counts them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

from redis import Redis

from mixfleet_broker import keys
from mixfleet_broker.channel import read_events
from mixfleet_broker.errors import MessageError
from mixfleet_broker.keys import KEYS, Key
from mixfleet_broker.messages import (
    TERMINAL_STATES,
    JobEnd,
    JobEvent,
    Requeued,
    RunStarted,
    TokenChunk,
)

EMPTY_AT_REST: Final = (
    keys.QUEUE,
    keys.WIP,
    keys.READY,
    keys.SUSPECTS,
    keys.WAITING,
    keys.LOADS,
    keys.AGEING,
    keys.DEADLINES,
    keys.LIST_BASE,
    keys.UNLISTED,
    keys.LEASES,
)
"""Of one model: what holds jobs that wait or run, and sums over them."""
FOR_EVER: Final = (
    keys.QUEUES,
    keys.SUSPENDED,
    keys.WEIGHTS,
    keys.FINISHED,
    keys.FAILED,
    keys.CANCELED,
    keys.RQ_WORKERS,
    keys.RQ_QUEUE_WORKERS,
    keys.WORKERS,
    keys.MODELS,
    keys.API_KEYS,
    keys.API_KEY,
    keys.API_SECRET,
    keys.BATCHES_OPEN,
)
"""Keys without a time to live at rest: their members have one, or an operator says when they go."""
REGISTRIES: Final = {"finished": keys.FINISHED, "failed": keys.FAILED, "canceled": keys.CANCELED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What must have become of one job."""

    text: str | None = None
    """The undisturbed answer: all of it when the job has finished, and else its beginning; None
    when nobody knows it."""
    states: frozenset[str] = frozenset({"finished"})
    code: str | None = None
    """Of the error, if it has failed."""


def violations(
    redis: Redis,
    model: str,
    jobs: Mapping[str, Expected],
    *,
    prefix: str = "",
    foreign: tuple[str, ...] = (),
) -> list[str]:
    """Return what is wrong on a server on which ``model`` had these jobs and no others.

    Args:
        redis: A client whose replies are bytes.
        model: Whose queue is looked at; nothing else may be on the server but its workers.
        jobs: All jobs that were accepted, by id. Their results must not have expired.
        prefix: Before all keys.
        foreign: How keys begin that others may have made.
    """
    found: list[str] = []
    for job_id, expected in jobs.items():
        found += [f"job {job_id}: {line}" for line in _job(redis, job_id, expected, prefix)]
    found += _at_rest(redis, model, prefix)
    found += _registries(redis, model, jobs, prefix)
    found += _all_keys(redis, len(jobs), prefix, foreign)
    return found


def _job(redis: Redis, job_id: str, expected: Expected, prefix: str) -> Iterator[str]:
    state, losses = _texts(redis.hmget(keys.JOB(job_id, prefix=prefix), "status", "mf_losses"))
    if state not in expected.states:
        yield f"is {state or 'gone'}, lost {losses or 0} times"
    try:
        events = [event for _, event in _events(redis, job_id, prefix)]
    except MessageError as error:
        yield f"its channel cannot be read: {error}"
        return
    yield from _channel(events)
    yield from _answer(events, state, expected)


def _channel(events: list[JobEvent]) -> Iterator[str]:
    """Check that tokens come 1 to n, once each, and then one end and nothing else."""
    num_tokens = 0
    for event in events:
        if isinstance(event, TokenChunk):
            if event.num_tokens - len(event.token_ids) != num_tokens:
                yield f"{event.num_tokens} tokens after {num_tokens} with {len(event.token_ids)}"
            num_tokens = event.num_tokens
        elif isinstance(event, RunStarted | Requeued) and event.num_tokens != num_tokens:
            yield f"{type(event).__name__} after {num_tokens} tokens says {event.num_tokens}"
    ends = [event for event in events if isinstance(event, JobEnd)]
    if len(ends) != 1 or events[-1] is not ends[0]:
        yield f"{len(ends)} ends, last of all {type(events[-1]).__name__ if events else 'nothing'}"


def _answer(events: list[JobEvent], state: str, expected: Expected) -> Iterator[str]:
    text = "".join(event.text for event in events if isinstance(event, TokenChunk))
    end = events[-1] if events and isinstance(events[-1], JobEnd) else None
    if end is not None and end.state != state:
        yield f"its end says {end.state}, its state is {state}"
    if end is not None and end.state == "failed" and expected.code not in (None, end.code):
        yield f"failed with {end.code}, not with {expected.code}: {end.message}"
    if expected.text is None:
        return
    right = text == expected.text if state == "finished" else expected.text.startswith(text)
    if not right:
        yield f"its answer is {text!r}, undisturbed it is {expected.text!r}"


def _at_rest(redis: Redis, model: str, prefix: str) -> Iterator[str]:
    for key in EMPTY_AT_REST:
        name = key(model, prefix=prefix)
        if redis.exists(name):
            yield f"{name} is not empty: {_contents(redis, name)}"


def _registries(
    redis: Redis, model: str, jobs: Mapping[str, Expected], prefix: str
) -> Iterator[str]:
    """Check that each job is in the registry of its state and in no other."""
    states = {i: _texts(redis.hmget(keys.JOB(i, prefix=prefix), "status"))[0] for i in jobs}
    for state, key in REGISTRIES.items():
        listed = set(_texts(redis.zrange(key(model, prefix=prefix), 0, -1)))
        right = {job_id for job_id, found in states.items() if found == state}
        if listed != right:
            yield f"{state}: lists {sorted(listed - right)}, lacks {sorted(right - listed)}"


def _all_keys(redis: Redis, num_jobs: int, prefix: str, foreign: tuple[str, ...]) -> Iterator[str]:
    """Check that every key is one of ours, ends by itself or may stay, and is not too many."""
    kinds = Counter[str]()
    for raw in redis.scan_iter(count=1000):
        name = raw.decode()
        kind = kind_of(name, prefix=prefix)
        if kind is not None:
            kinds[kind.name] += 1
            if kind not in FOR_EVER and redis.ttl(name) == -1 and not _is_live(redis, kind, name):
                yield f"{name} has no time to live"
        elif not name.startswith(foreign):
            yield f"{name} is no key of ours"
    right = {keys.JOB: num_jobs, keys.CHANNEL: num_jobs}
    right |= dict.fromkeys((keys.READER, keys.EXECUTION, keys.EXECUTIONS), 0)
    for kind, number in right.items():
        if kinds[kind.name] != number:
            yield f"{kinds[kind.name]} keys of the kind {kind.name}, not {number}"


def _is_live(redis: Redis, kind: Key, name: str) -> bool:
    """Whether a key may stay as long as its job waits or runs."""
    if kind is not keys.JOB:
        return False
    return _texts(redis.hmget(name, "status"))[0] not in TERMINAL_STATES


def kind_of(name: str, *, prefix: str = "") -> Key | None:
    """Return which kind of key has this name."""
    return next((key for key in KEYS if re.fullmatch(_pattern(key, prefix), name)), None)


@cache
def _pattern(key: Key, prefix: str) -> str:
    literal = re.split(r"\{\w+\}", key.template)
    return re.escape(prefix) + "[A-Za-z0-9._-]*".join(map(re.escape, literal))


def _events(redis: Redis, job_id: str, prefix: str) -> Iterator[tuple[str, JobEvent]]:
    after = "0-0"
    while events := read_events(redis, job_id, after, prefix=prefix):
        yield from events
        after = events[-1][0]


def _contents(redis: Redis, name: str) -> Any:
    kind = cast("bytes", redis.type(name)).decode()
    if kind == "hash":
        return redis.hgetall(name)
    if kind == "zset":
        return redis.zrange(name, 0, 9, withscores=True)
    if kind == "list":
        return redis.lrange(name, 0, 9)
    return redis.smembers(name) if kind == "set" else redis.get(name)


def _texts(values: Any) -> list[str]:
    return [(value or b"").decode(errors="replace") for value in values]
