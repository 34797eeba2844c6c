"""Who goes first: shares between tenants, classes of priority, and ageing."""

from dataclasses import replace

import pytest
from redis import Redis

from mixfleet_broker.keys import AGEING, LOADS, READY, TAGS, WAITING
from mixfleet_broker.messages import (
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.shares import set_share
from mixfleet_broker.terms import JobTerms, Priority, QueueRules
from support.queue_jobs import DONE, MODEL, chat_job, texts

BATCH = 16


class Fleet:
    """A queue, and workers that take jobs in turns of a batch."""

    def __init__(self, redis: Redis, **rules: float) -> None:
        self.queue = JobQueue(redis, MODEL, QueueRules(queue_limit=100_000, **rules))  # type: ignore[arg-type]
        self._tenant_of: dict[str, str] = {}

    def submit(self, tenant: str, count: int = 1, priority: Priority = "default") -> list[str]:
        jobs = [chat_job(max_tokens=10) for _ in range(count)]
        for job in jobs:
            self.queue.submit(job, JobTerms(tenant=tenant, priority=priority))
            self._tenant_of[job.job_id] = tenant
        return [job.job_id for job in jobs]

    def turn(self, batch: int = BATCH) -> list[str]:
        """The job ids of one batch, which is answered at once, as was expected."""
        end = replace(DONE, usage=Usage(prompt_tokens=1, completion_tokens=10))
        claimed = self.queue.claim("w1", batch, new_job_id())
        for job in claimed:
            assert self.queue.finish(job.lease, end)
        return [job.lease.job_id for job in claimed]

    def tenants_of_turn(self, batch: int = BATCH) -> list[str]:
        return [self._tenant_of[job_id] for job_id in self.turn(batch)]


@pytest.mark.slow
def test_a_tenant_with_ten_thousand_jobs_delays_anothers_job_by_one_turn_at_most(
    redis: Redis,
) -> None:
    fleet = Fleet(redis)
    fleet.submit("hog", 10_000)
    for _ in range(5):
        [single] = fleet.submit("other")
        assert fleet.queue.position(single) in (0, 1)
        assert single in fleet.turn()
        assert fleet.tenants_of_turn() == ["hog"] * BATCH


def test_many_tenants_are_served_in_turns(redis: Redis) -> None:
    fleet = Fleet(redis)
    for tenant in "abcd":
        fleet.submit(tenant, 8)
    for _ in range(4):
        assert sorted(fleet.tenants_of_turn(8)) == sorted("abcd" * 2)


def test_shares_go_by_weight(redis: Redis) -> None:
    set_share(redis, "b", 3.0)
    fleet = Fleet(redis)
    fleet.submit("a", 40)
    fleet.submit("b", 40)
    tenants = [tenant for _ in range(5) for tenant in fleet.tenants_of_turn(8)]
    assert 29 <= tenants.count("b") <= 31


def test_shares_go_by_tokens_not_by_jobs(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    owner = {}
    for tenant, max_tokens in (("short", 20), ("long", 200)):
        for _ in range(40):
            job = chat_job(max_tokens=max_tokens)
            queue.submit(job, JobTerms(tenant=tenant))
            owner[job.job_id] = tenant
    first = [owner[c.lease.job_id] for c in queue.claim("w1", 22, new_job_id())]
    assert first.count("long") == 2
    assert first.count("short") == 20


def test_what_an_answer_really_took_is_charged(redis: Redis) -> None:
    """Two tenants foresee alike; one's answers turn out ten times as long."""
    queue = JobQueue(redis, MODEL)
    owner = {}
    taken = {"brief": 0, "wordy": 0}

    def submit(tenant: str) -> None:
        job = chat_job()  # of unknown length
        queue.submit(job, JobTerms(tenant=tenant))
        owner[job.job_id] = tenant

    for tenant in ("brief", "wordy", "brief", "wordy"):
        submit(tenant)
    for _ in range(300):
        [claimed] = queue.claim("w1", 1, new_job_id())
        tenant = owner[claimed.lease.job_id]
        tokens = 20 if tenant == "brief" else 200
        taken[tenant] += tokens
        usage = Usage(prompt_tokens=1, completion_tokens=tokens)
        assert queue.finish(claimed.lease, replace(DONE, usage=usage))
        submit(tenant)
    assert 0.7 < taken["brief"] / taken["wordy"] < 1.4


def test_a_class_goes_before_the_next(redis: Redis) -> None:
    fleet = Fleet(redis)
    batch = fleet.submit("a", 2, "batch")
    default = fleet.submit("a", 2, "default")
    interactive = fleet.submit("b", 2, "interactive")
    assert fleet.turn() == [*interactive, *default, *batch]


def test_what_has_waited_for_long_moves_up_class_by_class(redis: Redis) -> None:
    fleet = Fleet(redis, ageing_s=60.0)
    [old] = fleet.submit("patient", 1, "batch")
    fleet.submit("hog", 50, "interactive")
    due = redis.zscore(AGEING(MODEL), old)
    assert isinstance(due, float)
    assert 50_000 < due - redis.time()[0] * 1000 < 70_000
    redis.zadd(AGEING(MODEL), {old: 1})
    assert old not in fleet.turn(1)
    # Now it is a default one, and in a minute it will be among the interactive ones.
    redis.zadd(AGEING(MODEL), {old: 1})
    assert old in fleet.turn(1)
    assert redis.zscore(AGEING(MODEL), old) is None


def test_a_crowd_of_the_old_is_served_in_fair_shares_too(redis: Redis) -> None:
    fleet = Fleet(redis)
    old = fleet.submit("hog", 30, "batch")
    for _ in range(2):
        redis.zadd(AGEING(MODEL), dict.fromkeys(old, 1))
        fleet.queue.reap(limit=100)
    [young] = fleet.submit("guest", 1, "interactive")
    assert young in fleet.turn(2)


def test_an_interactive_hog_cannot_starve_the_rest_for_ever(redis: Redis) -> None:
    fleet = Fleet(redis, ageing_s=60.0)
    [single] = fleet.submit("patient", 1, "batch")
    for turn in range(12):
        fleet.submit("hog", 8, "interactive")
        if turn in (3, 6):  # a minute passes
            redis.zadd(AGEING(MODEL), {single: 1})
        if single in fleet.turn(4):
            assert turn in (6, 7)
            return
    raise AssertionError("it was never served")


def test_an_idle_queue_forgets_what_tenants_owe(redis: Redis) -> None:
    fleet = Fleet(redis)
    fleet.submit("hog", 40)
    while fleet.turn():
        pass
    assert not redis.keys(TAGS(MODEL, "*"))
    hog, guest = fleet.submit("hog"), fleet.submit("guest")
    assert fleet.turn(2) in ([*hog, *guest], [*guest, *hog])


def test_tenants_that_owe_nothing_are_not_remembered(redis: Redis) -> None:
    fleet = Fleet(redis)
    fleet.submit("hog", 60)
    for number in range(30):
        fleet.submit(f"guest{number}")
    while len(fleet.turn(8)) == 8:
        assert redis.zcard(TAGS(MODEL, "1")) <= 32
    for number in range(5):
        fleet.submit("hog", 2)
        fleet.submit(f"late{number}")
        fleet.turn(2)
    assert redis.zcard(TAGS(MODEL, "1")) <= 5


def test_nothing_is_left_of_those_who_waited(redis: Redis) -> None:
    fleet = Fleet(redis)
    for priority in ("interactive", "default", "batch"):
        fleet.submit("a", 3, priority)
    cancelled = fleet.submit("b", 2, "batch")
    for job_id in cancelled:
        fleet.queue.cancel(job_id)
    fleet.turn()
    for key in (READY, WAITING, LOADS, AGEING):
        assert not redis.exists(key(MODEL)), key.name
    assert texts(redis.keys("mixfleet:tags:*")) == []
