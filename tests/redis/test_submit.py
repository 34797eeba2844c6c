"""Putting jobs into the queue, and what is known of them there."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime

import pytest
from redis import Redis

from mixfleet_broker.channel import read_events
from mixfleet_broker.errors import (
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    JobConflictError,
    MessageError,
    QueueFullError,
    UnknownJobError,
)
from mixfleet_broker.keys import BELL, JOB, QUEUE, READY
from mixfleet_broker.queue import CancelOutcome, JobInfo, JobQueue
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import DONE, MODEL, chat_job, chunk, claim_one, submit_and_claim, texts


def test_a_job_is_queued_behind_those_before_it(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(3)]
    assert [queue.submit(job) for job in jobs] == [0, 1, 2]
    assert queue.depth() == 3
    assert [queue.position(job.job_id) for job in jobs] == [0, 1, 2]
    assert replace(queue.info(jobs[1].job_id), waited_s=None) == JobInfo(
        job_id=jobs[1].job_id,
        state="queued",
        position=1,
        worker_id=None,
        attempt=0,
        num_losses=0,
        tokens_ahead=257,  # 1 of the prompt by its bytes, 256 of an answer of unknown length
        outlook="no_worker",
    )


def test_the_same_job_again_is_the_same_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    job = chat_job()
    assert [queue.submit(job) for _ in range(3)] == [1, 1, 1]
    assert queue.depth() == 2
    claims = queue.claim("w1", 5, "c1")
    assert queue.submit(job) == 0
    assert queue.finish(claims[1].lease, DONE)
    assert queue.submit(job) == 0
    assert queue.info(job.job_id).state == "finished"
    assert queue.depth() == 0


def test_another_job_of_the_same_id_is_a_conflict(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job("Hi")
    queue.submit(job)
    with pytest.raises(JobConflictError, match=job.job_id):
        queue.submit(chat_job("Ho", job_id=job.job_id))
    assert queue.depth() == 1


def test_a_full_queue_refuses_with_its_numbers_and_writes_nothing(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=2))
    first = chat_job()
    queue.submit(first)
    queue.submit(chat_job())
    before = sorted(redis.keys())
    refused = chat_job()
    with pytest.raises(QueueFullError) as caught:
        queue.submit(refused)
    assert (caught.value.depth, caught.value.limit) == (2, 2)
    assert sorted(redis.keys()) == before
    assert queue.submit(first) == 0  # it is in, so the limit is not its business
    claim_one(queue)
    assert queue.submit(refused) == 1


def test_a_job_for_another_model_is_not_taken(redis: Redis) -> None:
    with pytest.raises(MessageError, match="'other' on the queue of 'tiny'"):
        JobQueue(redis, MODEL).submit(chat_job(model="other"))


def test_a_full_server_refuses_jobs_and_still_drains(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    running = submit_and_claim(queue)
    waiting = chat_job()
    queue.submit(waiting)
    before = sorted(redis.keys())
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerFullError):
            queue.submit(chat_job())
        assert sorted(redis.keys()) == before
        assert queue.renew("w1", [running.lease]) == set()
        assert queue.finish(running.lease, DONE, chunk(1, 5))
        assert claim_one(queue).lease.job_id == waiting.job_id
        assert queue.cancel(waiting.job_id) is CancelOutcome.CANCELED
    finally:
        redis.config_set("maxmemory", 0)


def test_nobody_sees_the_prompt_outside_its_own_field(redis: Redis) -> None:
    job = chat_job("the secret question")
    JobQueue(redis, MODEL).submit(job)
    fields = redis.hgetall(JOB(job.job_id))
    assert [name for name, value in fields.items() if b"secret" in value] == [b"mf_request"]
    others = [key for key in redis.scan_iter() if key.decode() != JOB(job.job_id)]
    assert not any(b"secret" in (redis.dump(key) or b"") for key in others)


def test_times_are_those_of_redis_in_rqs_form(redis: Redis) -> None:
    job = chat_job()
    before = redis.time()
    JobQueue(redis, MODEL).submit(job)
    after = redis.time()
    [shown] = texts(redis.hmget(JOB(job.job_id), "created_at"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", shown)
    moment = datetime.fromisoformat(shown.replace("Z", "+00:00")).timestamp()
    assert before[0] + before[1] / 1e6 <= moment <= after[0] + after[1] / 1e6


def test_an_unknown_job_is_unknown(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    with pytest.raises(UnknownJobError, match="nobody"):
        queue.info("nobody")
    assert queue.position("nobody") is None
    assert queue.cancel("nobody") is CancelOutcome.UNKNOWN


def test_a_state_that_is_not_ours_is_not_guessed_at(redis: Redis) -> None:
    redis.hset(JOB("job1"), mapping={"status": "scheduled", "origin": MODEL})
    with pytest.raises(MessageError, match="'scheduled'"):
        JobQueue(redis, MODEL).info("job1")


def test_the_queues_of_two_models_are_two_queues(redis: Redis) -> None:
    one, other = JobQueue(redis, "one"), JobQueue(redis, "other")
    job = chat_job(model="one")
    one.submit(job)
    assert (one.depth(), other.depth()) == (1, 0)
    assert other.claim("w1", 5, "c1") == []
    assert other.cancel(job.job_id) is CancelOutcome.UNKNOWN
    assert one.info(job.job_id).state == "queued"


def test_the_bell_rings_for_a_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    assert not queue.wait_for_jobs(0.01)
    assert not queue.wait_for_jobs(0)
    queue.submit(chat_job())
    assert queue.wait_for_jobs(1.0)


def test_the_bell_wakes_a_worker_that_waits(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.wait_for_jobs, 5.0)
        queue.submit(chat_job())
        assert waiting.result(timeout=5.0)


def test_the_bell_never_grows_beyond_64_rings(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(80):
        queue.submit(chat_job())
    assert redis.llen(BELL(MODEL)) == 64
    assert 0 < redis.ttl(BELL(MODEL)) <= 3600


def test_a_server_that_lost_its_scripts_is_given_them_again(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    redis.script_flush()
    assert queue.submit(chat_job()) == 1


def test_a_key_of_a_wrong_type_is_an_error_of_the_broker(redis: Redis) -> None:
    redis.set(READY(MODEL), "not a zset")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        JobQueue(redis, MODEL).submit(chat_job())


def test_no_server_is_a_broker_that_is_unavailable(no_redis: Redis) -> None:
    with pytest.raises(BrokerUnavailableError):
        JobQueue(no_redis, MODEL).submit(chat_job())


def test_a_resubmitted_id_starts_with_an_empty_channel(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    queue.finish(claim_one(queue).lease, DONE, chunk(1, 5))
    redis.delete(JOB(job.job_id))  # as when its time is over
    assert queue.submit(job) == 0
    assert read_events(redis, job.job_id) == []
    claimed = claim_one(queue)
    assert (claimed.num_delivered, claimed.attempt) == (0, 1)


def test_the_mirror_for_rq_holds_the_ids_in_order(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    mirror = texts(redis.lrange(QUEUE(MODEL), 0, -1))
    assert mirror == [job.job_id for job in jobs]
    assert redis.smembers("rq:queues") == {b"rq:queue:tiny"}
