"""How the queues stand: one row per model, read in three round trips. Looking changes nothing."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

from redis import Redis

from mixfleet_broker import keys
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.registry import models, workers

_RQ_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """How the queue of one model stands."""

    model: str
    num_queued: int
    num_started: int
    """Held by workers now."""
    num_finished: int
    """Whose answer can still be read."""
    num_failed: int
    """That are kept for their operator."""
    num_workers: int
    """Alive."""
    oldest_queued_s: float | None
    """How long the next job has waited; None if none waits."""


def model_statuses(redis: Redis) -> list[ModelStatus]:
    """Return the models that are served, were served lately or have jobs, by name.

    Raises:
        BrokerError: See :mod:`mixfleet_broker.redis_errors`.
    """
    num_workers = Counter(record.model for record in workers(redis))
    with redis_errors():
        names = sorted({*models(redis), *num_workers, *_models_with_jobs(redis)})
        seconds, microseconds = redis.time()
        now = seconds + microseconds / 1e6
        with redis.pipeline(transaction=False) as pipeline:
            for model in names:
                pipeline.llen(keys.QUEUE(model))
                pipeline.zcard(keys.LEASES(model))
                # What has expired is trimmed only now and then.
                pipeline.zcount(keys.FINISHED(model), seconds, "+inf")
                pipeline.zcount(keys.FAILED(model), seconds, "+inf")
                pipeline.zrange(keys.READY(model), 0, 0)
            replies = pipeline.execute()
        rows = [replies[i : i + 5] for i in range(0, len(replies), 5)]
        queued_at = _queued_at(redis, [row[4] for row in rows])
    return [
        ModelStatus(
            model=model,
            num_queued=row[0],
            num_started=row[1],
            num_finished=row[2],
            num_failed=row[3],
            num_workers=num_workers[model],
            oldest_queued_s=None if since is None else max(0.0, now - since),
        )
        for model, row, since in zip(names, rows, queued_at, strict=True)
    ]


def _models_with_jobs(redis: Redis) -> list[str]:
    """Return the queues in rq's list that were ever ours; rq may have others beside them."""
    prefix = keys.QUEUE("")
    members = cast("set[bytes]", redis.smembers(keys.QUEUES()))
    queues = [member.decode().removeprefix(prefix) for member in members]
    with redis.pipeline(transaction=False) as pipeline:
        for model in queues:
            pipeline.exists(keys.SEQUENCE(model))
        exist = pipeline.execute()
    return [model for model, is_ours in zip(queues, exist, strict=True) if is_ours]


def _queued_at(redis: Redis, heads: list[list[bytes]]) -> list[float | None]:
    """Return the Unix time at which the first job of each queue was queued."""
    with redis.pipeline(transaction=False) as pipeline:
        for head in heads:
            pipeline.hget(keys.JOB(head[0].decode() if head else ""), "enqueued_at")
        replies = pipeline.execute()
    return [None if reply is None else _unix_time(reply) for reply in replies]


def _unix_time(text: bytes) -> float | None:
    try:
        return datetime.strptime(text.decode(), _RQ_TIME).replace(tzinfo=UTC).timestamp()
    except ValueError:  # rq's tools wrote something else there
        return None
