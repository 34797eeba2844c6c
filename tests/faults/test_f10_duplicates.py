"""F10: whatever is done twice, at once or after a lost reply, is done once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from redis import Redis

from mixfleet import Client, RunStarted
from mixfleet.errors import JobConflictError
from mixfleet_broker.channel import read_events
from mixfleet_broker.keys import QUEUE
from mixfleet_broker.messages import (
    JobEnd,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import FAST_STEP, MODEL, Asked, check_invariants
from support.invariants import Expected
from support.queue_jobs import DONE, chat_job, chunk
from support.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

T = TypeVar("T")
AT_ONCE = 8


def at_once(call: Callable[[], T]) -> list[T]:
    """Return what several calls at the same time returned."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(AT_ONCE)]]


def test_a_job_that_is_submitted_many_times_is_one_job_and_another_of_its_id_is_refused(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job("a question", model=MODEL, max_tokens=5)
    assert set(at_once(lambda: queue.submit(job))) == {0}
    assert queue.depth() == 1
    with pytest.raises(JobConflictError):
        queue.submit(replace(chat_job("another", model=MODEL), job_id=job.job_id))
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP):
        check_invariants(redis, {job.job_id: Expected()})
        # It is known for as long as its answer is.
        queue.submit(job)
        assert queue.depth() == 0
        check_invariants(redis, {job.job_id: Expected()})


def test_a_claim_that_is_sent_many_times_gives_its_jobs_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(6):
        queue.submit(chat_job(model=MODEL))
    first, *others = at_once(lambda: queue.claim("w1", 2, "one-token"))
    assert all(jobs == first for jobs in others)
    assert (len(first), queue.num_started(), queue.depth()) == (2, 2, 4)


def test_an_end_that_is_sent_many_times_is_said_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job(model=MODEL)
    queue.submit(job)
    [claimed] = queue.claim("w1", 1, new_job_id())
    last = chunk(2, 7, 8, text="all of it")
    assert set(at_once(lambda: queue.finish(claimed.lease, DONE, last))) == {True}
    events = [event for _, event in read_events(redis, job.job_id)]
    assert [type(event) for event in events] == [RunStarted, type(last), JobEnd]
    check_invariants(redis, {job.job_id: Expected(text="all of it")}, limit_s=0.0)


def test_a_job_that_is_delivered_twice_runs_once(
    redis: Redis, redis_url: str, client: Client, tmp_path: Path
) -> None:
    asked = Asked(client, "first question", "second question")
    for job_id in [*asked.jobs, *asked.jobs]:
        redis.rpush(QUEUE(MODEL), job_id)
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP),
        WorkerProcess(redis_url, "w2", tmp_path, *FAST_STEP),
    ):
        results = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert [len(result.worker_ids) for result in results] == [1, 1]
