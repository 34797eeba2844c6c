"""Operators tell workers what to do, and a reader that is gone ends its job."""

from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.attendance import attend
from mixfleet_broker.channel import ended
from mixfleet_broker.errors import UnknownWorkerError
from mixfleet_broker.flush import Flush
from mixfleet_broker.keys import CONTROL, ORDER, READER
from mixfleet_broker.messages import (
    JobEnd,
    new_job_id,
)
from mixfleet_broker.orders import cancelled_run, give_order, order_of, withdraw_order
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import JobTerms
from support.queue_jobs import DONE, MODEL, chat_job, claim_one

GONE = JobEnd(state="canceled", message="its reader is gone")


@pytest.fixture
def registration(redis: Redis) -> Registration:
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=4, context_length=64, started_at=0.0
    )
    registration = Registration(redis, record, lease_s=15.0)
    registration.beat(state="idle", in_flight=0)
    return registration


def words(queue: JobQueue) -> tuple[str, ...]:
    """What the next flush of the worker brings back."""
    return Flush(queue, "w1").send().words


def test_a_paused_worker_gets_nothing_until_it_is_resumed(
    redis: Redis, registration: Registration
) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    give_order(redis, "w1", "pause")
    assert queue.claim("w1", 1, new_job_id()) == []
    assert order_of(redis, "w1") == "pause"
    assert registration.beat(state="paused", in_flight=0) == "pause"
    withdraw_order(redis, "w1")
    assert registration.beat(state="idle", in_flight=0) is None
    assert len(queue.claim("w1", 1, new_job_id())) == 1


def test_others_go_on_while_one_is_paused(redis: Redis, registration: Registration) -> None:
    assert registration.record.worker_id == "w1"
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    give_order(redis, "w1", "drain")
    assert len(queue.claim("w2", 1, new_job_id())) == 1


def test_an_order_comes_as_a_word_and_wakes_the_waiting(
    redis: Redis, registration: Registration
) -> None:
    assert registration.record.worker_id == "w1"
    queue = JobQueue(redis, MODEL)
    give_order(redis, "w1", "pause")
    assert words(queue) == ("o",)
    assert words(queue) == ()
    withdraw_order(redis, "w1")
    assert queue.wait_for_jobs_or_word("w1", 1.0) == "o"
    assert queue.wait_for_jobs_or_word("w1", 0.02) is None


def test_an_order_lives_as_long_as_its_worker(redis: Redis, registration: Registration) -> None:
    give_order(redis, "w1", "pause")
    registration.beat(state="paused", in_flight=0)
    assert 0 < redis.pttl(ORDER("w1")) <= 45_000
    registration.deregister()
    assert not redis.exists(ORDER("w1"), CONTROL("w1"))


def test_an_order_to_nobody_is_an_error(redis: Redis) -> None:
    with pytest.raises(UnknownWorkerError, match="w9"):
        give_order(redis, "w9", "pause")
    with pytest.raises(UnknownWorkerError):
        withdraw_order(redis, "w9")
    assert redis.keys() == []


def test_an_order_of_another_version_is_none(redis: Redis) -> None:
    redis.set(ORDER("w1"), "dance")
    assert order_of(redis, "w1") is None


def test_a_cancel_tells_the_worker_which_run(redis: Redis, registration: Registration) -> None:
    assert registration.record.worker_id == "w1"
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    lease = claim_one(queue).lease
    queue.cancel(lease.job_id, "enough")
    [word] = words(queue)
    assert cancelled_run(word) == (lease.job_id, lease.token)
    assert ended(redis, lease.job_id) == JobEnd(state="canceled", message="enough")
    assert cancelled_run("o") is None


def test_words_for_a_worker_that_is_not_there_are_not_kept(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    queue.cancel(claim_one(queue).lease.job_id)
    assert not redis.exists(CONTROL("w1"))


# Readers


def attended(redis: Redis, queue: JobQueue) -> str:
    job = chat_job()
    queue.submit(job, JobTerms(ends_with_reader=True))
    assert 0 < redis.pttl(READER(job.job_id)) <= 30_000
    return job.job_id


def test_a_job_whose_reader_stays_runs_to_its_end(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = attended(redis, queue)
    lease = claim_one(queue).lease
    for _ in range(3):
        redis.delete(READER(job_id))
        attend(redis, [job_id])
        assert queue.renew("w1", [lease]) == set()
    assert queue.finish(lease, DONE)
    assert not redis.exists(READER(job_id))


def test_a_job_whose_reader_is_missed_twice_is_cancelled(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = attended(redis, queue)
    lease = claim_one(queue).lease
    redis.delete(READER(job_id))
    assert queue.renew("w1", [lease]) == set()
    assert queue.renew("w1", [lease]) == {job_id}
    assert ended(redis, job_id) == GONE
    assert queue.num_started() == 0
    assert not queue.finish(lease, DONE)


def test_a_reader_that_was_missed_once_and_is_back_is_there(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = attended(redis, queue)
    lease = claim_one(queue).lease
    for _ in range(3):  # as after an outage of Redis
        redis.delete(READER(job_id))
        assert queue.renew("w1", [lease]) == set()
        attend(redis, [job_id])
        assert queue.renew("w1", [lease]) == set()


def test_a_queued_job_whose_reader_is_gone_is_not_computed_for_long(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = attended(redis, queue)
    redis.delete(READER(job_id))
    lease = claim_one(queue).lease
    assert queue.renew("w1", [lease]) == {job_id}
    assert queue.release([lease]) == 0
    assert ended(redis, job_id) == GONE


def test_a_job_that_needs_no_reader_goes_on_without(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    lease = claim_one(queue).lease
    for _ in range(3):
        assert queue.renew("w1", [lease]) == set()
    assert not redis.exists(READER(job.job_id))


def test_every_end_is_logged_once_with_its_reason(redis: Redis, caplog: Any) -> None:
    caplog.set_level("INFO", logger="mixfleet_broker.ends")
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    for _ in range(2):
        queue.cancel(job.job_id, "enough of it")
    attendee = attended(redis, queue)
    redis.delete(READER(attendee))
    lease = claim_one(queue).lease
    for _ in range(3):
        queue.renew("w1", [lease])
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"job ended job_id={job.job_id} state=canceled reason=enough of it model={MODEL}",
        f"job ended job_id={attendee} state=canceled reason=its reader is gone model={MODEL}",
    ]
