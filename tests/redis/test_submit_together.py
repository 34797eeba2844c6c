"""Jobs that go into their queues in one round trip, each with an outcome of its own."""

from dataclasses import replace

import pytest
from redis import Redis

from mixfleet_broker.errors import (
    BrokerError,
    BrokerUnavailableError,
    JobConflictError,
    MessageError,
    QueueFullError,
)
from mixfleet_broker.keys import QUEUE
from mixfleet_broker.messages import ChatJob
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.submitting_together import Submission, submit_together
from mixfleet_broker.terms import JobTerms, QueueRules
from support.queue_jobs import MODEL, chat_job


def submissions(queue: JobQueue, *jobs: ChatJob) -> list[Submission]:
    return [Submission(queue=queue, job=job, terms=JobTerms()) for job in jobs]


@pytest.mark.parametrize("number", [1, 2, 40])
def test_all_jobs_are_queued_in_their_order(redis: Redis, number: int) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(number)]
    assert submit_together(redis, submissions(queue, *jobs)) == list(range(number))
    assert [queue.position(job.job_id) for job in jobs] == list(range(number))


def test_they_may_be_for_several_queues(redis: Redis) -> None:
    queues = [JobQueue(redis, model) for model in ("one", "two")]
    jobs = [chat_job(model=queue.model) for queue in queues]
    together = [*submissions(queues[0], jobs[0]), *submissions(queues[1], jobs[1])]
    assert submit_together(redis, together) == [0, 0]
    assert [queue.depth() for queue in queues] == [1, 1]


def test_what_is_wrong_with_one_job_hurts_no_other(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=3))
    first, invalid, last = chat_job(), chat_job(temperature=9.0), chat_job()
    other = replace(first, messages=chat_job("another question").messages)
    late = chat_job()
    outcomes = submit_together(redis, submissions(queue, first, invalid, other, last, first, late))
    kinds = [outcome if isinstance(outcome, int) else type(outcome) for outcome in outcomes]
    assert kinds == [0, MessageError, JobConflictError, 1, 0, 2]
    assert isinstance(
        submit_together(redis, submissions(queue, *[chat_job()] * 2))[1], QueueFullError
    )
    assert queue.depth() == 3


def test_jobs_that_are_all_invalid_send_nothing(redis: Redis) -> None:
    jobs = [chat_job(temperature=9.0) for _ in range(2)]
    outcomes = submit_together(redis, submissions(JobQueue(redis, MODEL), *jobs))
    assert [type(outcome) for outcome in outcomes] == [MessageError, MessageError]


def test_a_server_that_lost_its_scripts_is_given_them_again(redis: Redis) -> None:
    redis.script_flush()
    jobs = [chat_job() for _ in range(3)]
    assert submit_together(redis, submissions(JobQueue(redis, MODEL), *jobs)) == [0, 1, 2]


def test_a_key_of_another_kind_is_the_brokers_error_for_each(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job(model=MODEL))
    redis.delete(QUEUE(MODEL))
    redis.set(QUEUE(MODEL), "no list")
    outcomes = submit_together(redis, submissions(queue, chat_job(), chat_job()))
    assert all(isinstance(outcome, BrokerError) for outcome in outcomes)


def test_without_redis_all_of_them_fail(no_redis: Redis) -> None:
    queue = JobQueue(no_redis, MODEL)
    with pytest.raises(BrokerUnavailableError):
        submit_together(no_redis, submissions(queue, chat_job(), chat_job()))
