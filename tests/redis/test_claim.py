"""Claims, leases and what happens to the jobs of workers that are lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from mixfleet_broker.channel import delivered_tokens, ended, read_events
from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.keys import (
    CANCELED,
    CHANNEL,
    CLAIM,
    FAILED,
    JOB,
    LEASES,
    QUEUE,
    READY,
    SUSPENDED,
    WIP,
    WORKER_EXECUTIONS,
)
from mixfleet_broker.messages import (
    JobEnd,
    RunStarted,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue, Lease, Reaped
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    end_all_leases,
    submit_and_claim,
    texts,
)


def test_a_claim_gives_the_first_jobs_in_order(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job(str(i)) for i in range(5)]
    for job in jobs:
        queue.submit(job)
    claimed = queue.claim("w1", 3, "c1")
    assert [decode_job(c.payload) for c in claimed] == jobs[:3]
    assert [c.lease.job_id for c in claimed] == [job.job_id for job in jobs[:3]]
    assert [(c.num_delivered, c.attempt, c.num_losses) for c in claimed] == [(0, 1, 0)] * 3
    assert (queue.depth(), queue.num_started()) == (2, 3)
    assert queue.position(jobs[3].job_id) == 0
    assert redis.llen(QUEUE(MODEL)) == redis.zcard(READY(MODEL)) == 2
    info = queue.info(jobs[0].job_id)
    assert (info.state, info.worker_id, info.position) == ("started", "w1", None)


def test_a_claim_of_an_empty_queue_gives_nothing(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    assert queue.claim("w1", 4, "c1") == []
    assert redis.keys() == []


def test_a_claim_of_no_jobs_gives_none(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    assert queue.claim("w1", 0, "c1") == []
    assert queue.claim("w1", -3, "c1") == []


def test_a_repeated_claim_gives_the_same_jobs_and_no_more(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(5):
        queue.submit(chat_job())
    first = queue.claim("w1", 2, "c1")
    assert queue.claim("w1", 2, "c1") == first
    assert queue.claim("w1", 5, "c1") == first
    assert queue.depth() == 3
    other = queue.claim("w1", 2, "c1-1")  # a token that only looks alike
    assert {c.lease.job_id for c in other}.isdisjoint(c.lease.job_id for c in first)


def test_a_repeated_claim_leaves_out_what_is_lost_meanwhile(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(3):
        queue.submit(chat_job())
    first = queue.claim("w1", 2, "c1")
    queue.cancel(first[0].lease.job_id)
    assert queue.claim("w1", 2, "c1") == first[1:]


def test_a_repeated_claim_leaves_out_what_another_worker_has_now(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    queue.claim("w1", 1, "c1")
    end_all_leases(redis)
    queue.reap()
    heir = claim_one(queue, "w2").lease
    assert queue.claim("w1", 1, "c1") == []
    assert queue.renew("w2", [heir]) == set()


def test_a_claim_is_remembered_for_two_leases_only(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(lease_s=2.0))
    submit_and_claim(queue)
    [key] = redis.keys(CLAIM(MODEL, "w1", "*"))
    assert 2000 < redis.pttl(key) <= 4000


def test_many_workers_never_get_the_same_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = {chat_job().job_id for _ in range(60)}
    for job_id in jobs:
        queue.submit(chat_job(job_id=job_id))
    with ThreadPoolExecutor(6) as pool:
        claims = [pool.submit(queue.claim, f"w{i}", 5, f"c{i}") for i in range(12)]
        given = [c.lease.job_id for claim in claims for c in claim.result()]
    assert sorted(given) == sorted(jobs)


@pytest.mark.parametrize("token", ["", "a:b", "a b", "x" * 129])
def test_a_claim_token_must_not_break_the_lease(redis: Redis, token: str) -> None:
    with pytest.raises(MessageError):
        JobQueue(redis, MODEL).claim("w1", 1, token)


def test_a_claim_tells_the_reader_who_runs_the_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    [(event_id, event)] = read_events(redis, lease.job_id)
    assert event_id == f"{lease.run}-0"
    assert event == RunStarted(run=lease.run, worker_id="w1", num_tokens=0)


def test_nothing_is_claimed_while_rq_is_suspended(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    redis.set(SUSPENDED(), 1)
    assert queue.claim("w1", 1, "c1") == []
    redis.delete(SUSPENDED())
    assert len(queue.claim("w1", 1, "c1")) == 1


def test_renewal_moves_the_deadline_and_finds_nothing_lost(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(lease_s=5.0))
    lease = submit_and_claim(queue).lease
    end_all_leases(redis)
    assert queue.renew("w1", [lease]) == set()
    seconds, micros = redis.time()
    deadline = redis.zscore(LEASES(MODEL), f"{lease.job_id}:{lease.token}")
    assert isinstance(deadline, float)
    assert 4000 < deadline - seconds * 1000 - micros / 1000 <= 5000
    assert queue.reap() == Reaped(requeued=(), failed=())
    assert queue.renew("w1", []) == set()


def test_a_lease_that_ended_and_was_not_reaped_can_still_be_renewed(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.delete(LEASES(MODEL))  # gone astray: the hash is the truth
    assert queue.renew("w1", [lease]) == set()
    assert queue.num_started() == 1


def test_jobs_of_a_lost_worker_go_back_to_the_head_of_the_queue(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(4)]
    for job in jobs:
        queue.submit(job)
    lost = queue.claim("w1", 2, "c1")
    end_all_leases(redis)
    reaped = queue.reap()
    assert set(reaped.requeued) == {c.lease.job_id for c in lost}
    assert reaped.failed == ()
    assert queue.reap() == Reaped(requeued=(), failed=())
    again = queue.claim("w2", 4, "c2")
    assert [c.lease.job_id for c in again] == [job.job_id for job in jobs]
    assert [(c.attempt, c.num_losses) for c in again] == [(2, 1), (2, 1), (1, 0), (1, 0)]
    assert queue.renew("w1", [c.lease for c in lost]) == {c.lease.job_id for c in lost}
    assert queue.renew("w2", [c.lease for c in again]) == set()


def test_a_reap_takes_no_more_than_its_limit(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(5):
        submit_and_claim(queue)
    end_all_leases(redis)
    assert [len(queue.reap(limit=2).requeued) for _ in range(4)] == [2, 2, 1, 0]


def test_a_claim_takes_over_jobs_of_ended_leases_unless_it_is_told_not_to(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lost = submit_and_claim(queue, "w1")
    end_all_leases(redis)
    assert queue.claim("w2", 1, "c2", reaps=False) == []
    assert queue.renew("w1", [lost.lease]) == set()
    end_all_leases(redis)
    [found] = queue.claim("w2", 1, "c3")
    assert (found.lease.job_id, found.num_losses) == (lost.lease.job_id, 1)


def test_a_live_lease_is_not_reaped(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    submit_and_claim(queue)
    assert queue.reap() == Reaped(requeued=(), failed=())
    assert queue.num_started() == 1


def test_the_next_run_goes_on_after_the_delivered_tokens(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    first = submit_and_claim(queue).lease
    append_chunk(queue, first, chunk(1, 11))
    append_chunk(queue, first, chunk(3, 12, 13))
    end_all_leases(redis)
    queue.reap()
    second = claim_one(queue, "w2")
    assert second.num_delivered == 3
    assert second.lease.run > first.run
    assert delivered_tokens(redis, first.job_id) == (11, 12, 13)
    append_chunk(queue, second.lease, chunk(4, 14))
    assert queue.finish(second.lease, DONE, chunk(5, 15))
    assert delivered_tokens(redis, first.job_id) == (11, 12, 13, 14, 15)
    runs = [e for _, e in read_events(redis, first.job_id) if isinstance(e, RunStarted)]
    assert [(run.worker_id, run.num_tokens) for run in runs] == [("w1", 0), ("w2", 3)]


def test_a_run_is_above_all_in_the_channel_even_when_the_clock_fell_back(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    first = submit_and_claim(queue).lease
    ahead = first.run + 3_600_000
    redis.xadd(CHANNEL(first.job_id), {"k": "t", "d": b"\x82\xa1t\xa0\xa1i\x91\x07"}, f"{ahead}-1")
    end_all_leases(redis)
    queue.reap()
    assert claim_one(queue).lease.run == ahead + 2  # the requeue was said at ahead + 1


def test_a_job_lost_three_times_has_failed_and_says_so(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(max_losses=3))
    job_id = submit_and_claim(queue).lease.job_id
    for _ in range(2):
        end_all_leases(redis)
        assert queue.reap().requeued == (job_id,)
        claim_one(queue)
    end_all_leases(redis)
    assert queue.reap() == Reaped(requeued=(), failed=(job_id,))
    info = queue.info(job_id)
    assert (info.state, info.num_losses, info.attempt) == ("failed", 3, 3)
    end = ended(redis, job_id)
    assert end == JobEnd(state="failed", code="worker_lost", message="3 workers that ran it died")
    assert redis.zscore(FAILED(MODEL), job_id) is not None
    assert 86_000 < redis.ttl(JOB(job_id)) <= 86_400
    assert queue.claim("w1", 1, "last") == []


def test_released_jobs_go_back_without_blame_in_their_order(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(4)]
    for job in jobs:
        queue.submit(job)
    claimed = queue.claim("w1", 3, "c1")
    assert queue.release([c.lease for c in claimed]) == 3
    assert queue.release([c.lease for c in claimed]) == 0
    assert queue.release([]) == 0
    mirror = texts(redis.lrange(QUEUE(MODEL), 0, -1))
    assert mirror == [job.job_id for job in jobs]
    again = queue.claim("w2", 4, "c2")
    assert [c.lease.job_id for c in again] == [job.job_id for job in jobs]
    assert [c.num_losses for c in again] == [0, 0, 0, 0]


def test_a_zombie_cannot_release_what_is_not_its_own(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    zombie = submit_and_claim(queue).lease
    end_all_leases(redis)
    queue.reap()
    heir = claim_one(queue, "w2").lease
    assert queue.release([zombie]) == 0
    assert queue.renew("w2", [heir]) == set()


def test_the_channel_of_a_job_that_waits_again_is_kept_for_a_day(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    assert 7000 < redis.ttl(CHANNEL(lease.job_id)) <= 7200
    queue.release([lease])
    assert 86_000 < redis.ttl(CHANNEL(lease.job_id)) <= 86_400


def test_what_a_run_leaves_behind_goes_away_by_itself(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    queue.renew("w1", [lease])
    forever = {key.decode() for key in redis.scan_iter() if redis.ttl(key) == -1}
    assert forever == {
        "rq:queues",
        JOB(lease.job_id),
        LEASES(MODEL),
        WIP(MODEL),
    }
    queue.finish(lease, DONE)
    forever = {key.decode() for key in redis.scan_iter() if redis.ttl(key) == -1}
    assert forever == {"rq:queues", "rq:finished:tiny"}


def test_registries_are_trimmed_by_the_reaper(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for registry in (FAILED(MODEL), CANCELED(MODEL)):
        redis.zadd(registry, {"old": 5, "new": 9e9})
    queue.reap()
    assert redis.zrange(FAILED(MODEL), 0, -1) == [b"new"]
    assert redis.zrange(CANCELED(MODEL), 0, -1) == [b"new"]


def test_a_lease_of_a_run_that_never_was_is_lost(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    forged = Lease(job_id=lease.job_id, token=f"forged-{lease.run}", run=lease.run)
    unknown = Lease(job_id=new_job_id(), token="t-1", run=1)
    assert queue.renew("w1", [forged, unknown, lease]) == {forged.job_id, unknown.job_id}
    assert not queue.finish(forged, DONE)
    assert redis.scard(WORKER_EXECUTIONS("w1")) == 1
