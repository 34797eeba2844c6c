"""How the queues stand: one row per model, read in three round trips. Looking changes nothing."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

from redis import Redis
from redis.client import Pipeline

from mixfleet_broker import keys
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.registry import TAKES_NONE, models, workers

_REPLIES: Final = 8
_RQ_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """How the queue of one model stands."""

    model: str
    num_queued: int
    queued_tokens: int
    """Expected of the queued jobs, prompts and answers; those of rq producers count once a worker
    has seen them."""
    num_suspects: int
    """Of the queued: those that are to be run alone, because each may have killed workers."""
    num_started: int
    """Held by workers now."""
    num_finished: int
    """Whose answer can still be read."""
    num_failed: int
    """That are kept for their operator."""
    num_workers: int
    """Alive."""
    num_slots: int
    """Jobs that the workers which take jobs run at once."""
    oldest_queued_s: float | None
    """How long the next job has waited; None if none waits."""


def model_statuses(redis: Redis, *, prefix: str = "") -> list[ModelStatus]:
    """Return the models that are served, were served lately or have jobs, by name.

    Raises:
        BrokerError: See :mod:`mixfleet_broker.redis_errors`.
    """
    records = workers(redis, prefix=prefix)
    num_workers = Counter(record.model for record in records)
    num_slots: Counter[str] = Counter()
    for record in records:
        num_slots[record.model] += 0 if record.state in TAKES_NONE else record.max_batch_size
    with redis_errors():
        served = models(redis, prefix=prefix)
        names = sorted({*served, *num_workers, *_models_with_jobs(redis, prefix)})
        seconds, microseconds = redis.time()
        now = seconds + microseconds / 1e6
        with redis.pipeline(transaction=False) as pipeline:
            for model in names:
                _ask(pipeline, model, seconds, prefix)
            replies = pipeline.execute()
        rows = [replies[i : i + _REPLIES] for i in range(0, len(replies), _REPLIES)]
        queued_at = _queued_at(redis, [row[7] for row in rows], prefix)
    return [
        ModelStatus(
            model=model,
            num_queued=row[0] - row[1],
            queued_tokens=int(row[2] or 0),
            num_suspects=row[3],
            num_started=row[4],
            num_finished=row[5],
            num_failed=row[6],
            num_workers=num_workers[model],
            num_slots=num_slots[model],
            oldest_queued_s=None if since is None else max(0.0, now - since),
        )
        for model, row, since in zip(names, rows, queued_at, strict=True)
    ]


def _ask(pipeline: Pipeline, model: str, seconds: int, prefix: str) -> None:
    """Put the commands for one model on a pipeline, ``_REPLIES`` of them."""
    pipeline.llen(keys.QUEUE(model, prefix=prefix))
    pipeline.scard(keys.UNLISTED(model, prefix=prefix))
    pipeline.hget(keys.LOADS(model, prefix=prefix), "tokens")
    pipeline.zcard(keys.SUSPECTS(model, prefix=prefix))
    pipeline.zcard(keys.LEASES(model, prefix=prefix))
    # What has expired is trimmed only now and then.
    pipeline.zcount(keys.FINISHED(model, prefix=prefix), seconds, "+inf")
    pipeline.zcount(keys.FAILED(model, prefix=prefix), seconds, "+inf")
    pipeline.zrange(keys.READY(model, prefix=prefix), 0, 0)


def _models_with_jobs(redis: Redis, prefix: str) -> list[str]:
    """Return the queues in rq's list that hold jobs of ours; rq may have others beside them."""
    before = keys.QUEUE("", prefix=prefix)
    members = cast("set[bytes]", redis.smembers(keys.QUEUES(prefix=prefix)))
    queues = [member.decode().removeprefix(before) for member in members]
    with redis.pipeline(transaction=False) as pipeline:
        for model in queues:
            pipeline.exists(keys.WAITING(model, prefix=prefix), keys.LEASES(model, prefix=prefix))
        exist = pipeline.execute()
    return [model for model, is_ours in zip(queues, exist, strict=True) if is_ours]


def _queued_at(redis: Redis, heads: list[list[bytes]], prefix: str) -> list[float | None]:
    """Return the Unix time at which the first job of each queue was queued."""
    with redis.pipeline(transaction=False) as pipeline:
        for head in heads:
            job_id = head[0].decode() if head else ""
            pipeline.hget(keys.JOB(job_id, prefix=prefix), "enqueued_at")
        replies = pipeline.execute()
    return [None if reply is None else _unix_time(reply) for reply in replies]


def _unix_time(text: bytes) -> float | None:
    try:
        return datetime.strptime(text.decode(), _RQ_TIME).replace(tzinfo=UTC).timestamp()
    except ValueError:  # rq's tools wrote something else there
        return None
