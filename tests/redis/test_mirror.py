"""rq's list holds who waits, whatever happens, and nobody searches it."""

import random
from typing import Any

from redis import Redis

from mixfleet_broker.keys import JOB, LIST_BASE, QUEUE
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.terms import JobTerms, QueueRules
from support.queue_jobs import DONE, MODEL, chat_job, texts


def listed(redis: Redis) -> list[str]:
    return texts(redis.lrange(QUEUE(MODEL), 0, -1))


def assert_places_are_true(redis: Redis) -> None:
    base = int(redis.get(LIST_BASE(MODEL)) or 0)
    for index, job_id in enumerate(listed(redis)):
        place: Any = redis.hget(JOB(job_id), "mf_place")
        assert int(place) == base + index


def num_searches(redis: Redis) -> int:
    stats: Any = redis.info("commandstats")
    return int(stats.get("cmdstat_lrem", {}).get("calls", 0))


def test_jobs_leave_from_anywhere_without_a_search(redis: Redis) -> None:
    """Tenants in turns: most leave from the middle of the list."""
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=10_000))
    source = random.Random(1)
    waiting = set()
    for tenant in "abcdef":
        for _ in range(50):
            job = chat_job(max_tokens=source.randrange(1, 100))
            queue.submit(job, JobTerms(tenant=tenant))
            waiting.add(job.job_id)
    redis.config_resetstat()
    held = []
    for _ in range(120):
        action = source.choice(["claim", "claim", "cancel", "submit", "release"])
        if action == "claim":
            claimed = queue.claim("w1", 3, new_job_id())
            held += [job.lease for job in claimed]
            waiting -= {job.lease.job_id for job in claimed}
        elif action == "cancel" and waiting:
            job_id = source.choice(sorted(waiting))
            queue.cancel(job_id)
            waiting.discard(job_id)
        elif action == "submit":
            job = chat_job()
            queue.submit(job, JobTerms(tenant="z"))
            waiting.add(job.job_id)
        elif action == "release" and held:
            lease = held.pop(source.randrange(len(held)))
            queue.release([lease])
            waiting.add(lease.job_id)
        assert set(listed(redis)) == waiting
        assert len(listed(redis)) == len(waiting)
        assert_places_are_true(redis)
    assert num_searches(redis) == 0


def test_first_come_is_first_listed_while_one_tenant_waits(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job().job_id for _ in range(6)]
    for job_id in jobs:
        queue.submit(chat_job(job_id=job_id))
    for expected in (jobs, jobs[2:], jobs[4:]):
        assert listed(redis) == expected
        queue.claim("w1", 2, new_job_id())


def test_what_rqs_tools_take_out_of_the_middle_confuses_nobody(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job().job_id for _ in range(40)]
    for number, job_id in enumerate(jobs):
        queue.submit(chat_job(job_id=job_id), JobTerms(tenant="ab"[number % 2]))
    for job_id in jobs[3:20:4]:
        redis.lrem(QUEUE(MODEL), 1, job_id)
    while claimed := queue.claim("w1", 4, new_job_id()):
        for job in claimed:
            assert queue.finish(job.lease, DONE)
    assert listed(redis) == []
    assert not redis.exists(LIST_BASE(MODEL))


def test_a_place_that_is_far_off_is_found_by_a_search(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job().job_id for _ in range(3)]
    for number, job_id in enumerate(jobs):
        queue.submit(chat_job(job_id=job_id), JobTerms(tenant=f"t{number}"))
    redis.hset(JOB(jobs[1]), "mf_place", 10_000)
    redis.hdel(JOB(jobs[2]), "mf_place")
    queue.cancel(jobs[1])
    queue.cancel(jobs[2])
    assert listed(redis) == [jobs[0]]


def test_an_emptied_list_counts_from_nought_again(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(3):
        queue.submit(chat_job())
        queue.finish(queue.claim("w1", 1, new_job_id())[0].lease, DONE)
        assert not redis.exists(LIST_BASE(MODEL), QUEUE(MODEL))
