"""Jobs as an operator looks at them: lists by state, page by page, and one with its history.

Looking changes nothing, and shows no prompt.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, cast

from redis import Redis

from mixfleet_broker import keys
from mixfleet_broker.errors import MessageError, UnknownJobError
from mixfleet_broker.messages import (
    JobState,
)
from mixfleet_broker.names import (
    check_job_id,
)
from mixfleet_broker.packing import unpack
from mixfleet_broker.records import LostRun
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.schema import Fields, items
from mixfleet_broker.terms import PRIORITIES

MAX_PAGE: Final = 1000
_RQ_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"
_FIELDS: Final = (
    "status",
    "origin",
    "mf_tenant",
    "mf_class",
    "mf_cost",
    "created_at",
    "started_at",
    "ended_at",
    "worker_name",
    "mf_attempt",
    "mf_losses",
    "mf_reason",
    "mf_message",
    "mf_history",
)
_REGISTRIES: Final[dict[str, keys.Key]] = {
    "finished": keys.FINISHED,
    "failed": keys.FAILED,
    "canceled": keys.CANCELED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job. Times are Unix times by Redis's clock."""

    job_id: str
    model: str
    state: str
    """As rq has it: queued, started, finished, failed, canceled."""
    tenant: str
    priority: str
    expected_tokens: int
    """Of prompt and answer, foreseen when it was submitted."""
    submitted_at: float | None
    started_at: float | None
    """Of its latest run."""
    ended_at: float | None
    worker_id: str | None
    attempt: int
    """Runs so far."""
    num_losses: int
    """Runs whose worker died."""
    reason: str
    """Why it ended: the finish reason or the error's code."""
    message: str
    history: tuple[LostRun, ...]
    """Runs that did not end it, the latest 16."""


def list_jobs(
    redis: Redis,
    model: str,
    state: JobState,
    *,
    offset: int = 0,
    limit: int = 50,
    prefix: str = "",
) -> list[JobRow]:
    """Return one page of a model's jobs in a state.

    Queued ones come in their order, those to be run alone last; ended ones the latest first. Jobs
    that rq producers pushed are seen once a worker has looked at the queue.

    Args:
        redis: A client whose replies are bytes.
        model: The queue.
        state: Which jobs.
        offset: Jobs before the page.
        limit: Most jobs on it, at most ``MAX_PAGE``.
        prefix: Before all keys.
    """
    if not 0 < limit <= MAX_PAGE or offset < 0:
        raise MessageError(f"offset={offset}, limit={limit}: limit must be from 1 to {MAX_PAGE}")
    with redis_errors():
        ids = _ids(redis, model, state, offset, offset + limit - 1, prefix)
        with redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hmget(keys.JOB(job_id, prefix=prefix), _FIELDS)
            replies = pipeline.execute(raise_on_error=False)
    # A job may have expired between the two looks.
    return [
        _row(job_id, reply)
        for job_id, reply in zip(ids, replies, strict=True)
        if not isinstance(reply, Exception) and reply[0] is not None
    ]


def find_job(redis: Redis, job_id: str, *, prefix: str = "") -> JobRow:
    """Return one job.

    Raises:
        UnknownJobError: There is no such job, or it has expired.
    """
    with redis_errors():
        key = keys.JOB(check_job_id(job_id), prefix=prefix)
        reply: Any = redis.hmget(key, list(_FIELDS))
    if reply[0] is None:
        raise UnknownJobError(job_id=job_id)
    return _row(job_id, reply)


def _ids(
    redis: Redis, model: str, state: JobState, first: int, last: int, prefix: str
) -> list[str]:
    if state == "queued":
        ready, suspects = keys.READY(model, prefix=prefix), keys.SUSPECTS(model, prefix=prefix)
        members = _members(redis.zrange(ready, first, last))
        if len(members) <= last - first:
            before = int(redis.zcard(ready))
            start, end = max(0, first - before), last - before
            members += _members(redis.zrange(suspects, start, end)) if end >= 0 else []
        return members
    if state == "started":
        leases = _members(redis.zrange(keys.LEASES(model, prefix=prefix), first, last))
        return [member.rpartition(":")[0] for member in leases]
    return _members(redis.zrevrange(_REGISTRIES[state](model, prefix=prefix), first, last))


def _members(reply: Any) -> list[str]:
    return [member.decode() for member in cast("list[bytes]", reply)]


def _row(job_id: str, reply: list[Any]) -> JobRow:
    values = dict(zip(_FIELDS, reply, strict=True))
    text = {
        name: value.decode(errors="replace") if value else ""
        for name, value in values.items()
        if name != "mf_history"
    }
    job_class = int(text["mf_class"] or 1)
    return JobRow(
        job_id=job_id,
        model=text["origin"],
        state=text["status"],
        tenant=text["mf_tenant"],
        priority=PRIORITIES[min(max(job_class, 0), len(PRIORITIES) - 1)],
        expected_tokens=int(text["mf_cost"] or 0),
        submitted_at=_unix_time(text["created_at"]),
        started_at=_unix_time(text["started_at"]),
        ended_at=_unix_time(text["ended_at"]),
        worker_id=text["worker_name"] or None,
        attempt=int(text["mf_attempt"] or 0),
        num_losses=int(text["mf_losses"] or 0),
        reason=text["mf_reason"],
        message=text["mf_message"],
        history=_history(values["mf_history"]),
    )


def _history(data: bytes | None) -> tuple[LostRun, ...]:
    if not data:
        return ()
    runs = []
    for item in items(unpack(data), "history"):
        fields = Fields(item, "run")
        runs.append(
            LostRun(
                worker_id=fields.text("w"),
                ended_at=(fields.number_or_none("t", 0, 1e15) or 0.0) / 1000,
                reason=fields.text("r"),
                num_tokens=int(fields.number_or_none("n", 0, 1e15) or 0),
            )
        )
    return tuple(runs)


def _unix_time(text: str) -> float | None:
    try:
        return datetime.strptime(text, _RQ_TIME).replace(tzinfo=UTC).timestamp()
    except ValueError:  # not yet, or rq's tools wrote something else there
        return None
