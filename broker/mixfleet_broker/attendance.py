"""Readers that say that they are there, for jobs that are to end with them.

A job submitted with ``ends_with_reader`` lives as long as its reader's key. The key is renewed by
whoever reads; when two looks in a row (a claim, renewals) have found it gone, the job is cancelled.
"""

from collections.abc import Iterable

from redis import Redis

from mixfleet_broker.keys import (
    READER,
)
from mixfleet_broker.names import (
    check_job_id,
)
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.terms import READER_S


def attend(redis: Redis, job_ids: Iterable[str], *, prefix: str = "") -> None:
    """Say that the readers of these jobs are there, in one round trip."""
    with redis_errors(), redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.set(READER(check_job_id(job_id), prefix=prefix), 1, px=round(READER_S * 1000))
        pipeline.execute()
