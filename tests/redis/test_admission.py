"""What the queue takes, and what it says to what it does not take."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.channel import ended
from mixfleet_broker.errors import (
    DeadlineUnreachableError,
    MessageError,
    NotDurableError,
    QueueFullError,
    TenantQueueFullError,
)
from mixfleet_broker.keys import CAPACITY, DEADLINES, JOB, RATES
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    SamplingSettings,
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import JobTerms, QueueRules
from support.queue_jobs import DONE, MODEL, chat_job, claim_one, end_all_leases, texts
from support.worker_process import until


def serve(redis: Redis, worker_id: str = "w1", slots: int = 4, state: str = "idle") -> None:
    """A live worker, as far as the registry tells."""
    record = WorkerRecord.of_this_process(
        worker_id=worker_id, model=MODEL, max_batch_size=slots, context_length=64, started_at=0.0
    )
    Registration(redis, record, lease_s=15.0).beat(state=state, in_flight=0)  # type: ignore[arg-type]


def let_time_pass(redis: Redis, job_id: str, seconds: float) -> None:
    """Make a job so much older, with all its deadlines."""
    for name in ("mf_at", "mf_start_by", "mf_end_by"):
        value: Any = redis.hget(JOB(job_id), name)
        if value:
            redis.hset(JOB(job_id), name, int(value) - round(seconds * 1000))
    redis.zincrby(DEADLINES(MODEL), -round(seconds * 1000), job_id)


def keys_of(redis: Redis) -> set[str]:
    return set(texts(redis.keys()))


def test_tokens_are_limited_as_well_as_jobs(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_token_limit=100))
    queue.submit(chat_job(max_tokens=80))
    before = keys_of(redis)
    with pytest.raises(QueueFullError) as caught:
        queue.submit(chat_job(max_tokens=30))
    assert (caught.value.unit, caught.value.depth, caught.value.limit) == ("tokens", 81, 100)
    assert caught.value.retry_after_s == 5.0
    assert keys_of(redis) == before
    queue.submit(chat_job(max_tokens=10))


def test_a_prompt_of_tokens_counts_by_its_tokens(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_token_limit=100))
    sampling = SamplingSettings(max_tokens=20)
    job = ChatJob(job_id="a", model=MODEL, prompt_token_ids=(7,) * 60, sampling=sampling)
    queue.submit(job)
    with pytest.raises(QueueFullError) as caught:
        queue.submit(replace(job, job_id="b"))
    assert (caught.value.unit, caught.value.depth) == ("tokens", 80)


def test_an_empty_queue_takes_a_job_larger_than_its_limit_of_tokens(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_token_limit=10, tenant_token_limit=5))
    assert queue.submit(chat_job(max_tokens=200)) == 0


def test_one_tenants_limits_leave_room_for_others(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(tenant_queue_limit=2, tenant_token_limit=50))
    for _ in range(2):
        queue.submit(chat_job(max_tokens=10), JobTerms(tenant="a"))
    with pytest.raises(TenantQueueFullError) as caught:
        queue.submit(chat_job(max_tokens=10), JobTerms(tenant="a"))
    assert (caught.value.tenant, caught.value.depth, caught.value.limit) == ("a", 2, 2)
    queue.submit(chat_job(max_tokens=40), JobTerms(tenant="b"))
    with pytest.raises(TenantQueueFullError) as caught:
        queue.submit(chat_job(max_tokens=40), JobTerms(tenant="b"))
    assert (caught.value.unit, caught.value.depth, caught.value.limit) == ("tokens", 41, 50)


def test_a_limit_holds_against_many_at_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=20))

    def submit(_: int) -> bool:
        try:
            queue.submit(chat_job())
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit, range(60))) == 20
    assert queue.depth() == 20


def test_room_comes_back_with_every_way_out(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=1))
    for leave in ("claim", "cancel", "expire"):
        job = chat_job()
        queue.submit(job, JobTerms(start_within_s=100))
        with pytest.raises(QueueFullError):
            queue.submit(chat_job())
        if leave == "claim":
            queue.finish(claim_one(queue).lease, DONE)
        elif leave == "cancel":
            queue.cancel(job.job_id)
        else:
            redis.zadd(DEADLINES(MODEL), {job.job_id: 1})
            queue.reap()
        assert queue.depth() == 0


def test_a_known_job_is_known_also_when_the_queue_is_full(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(queue_limit=2))
    jobs = [chat_job(), chat_job()]
    for job in jobs:
        queue.submit(job)
    assert queue.submit(jobs[1]) == 1


def test_a_job_that_cannot_start_in_time_is_refused_with_the_numbers(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    serve(redis, slots=1)
    slow(redis, service_s=10.0)
    claim_after_submit(queue)
    for _ in range(3):
        queue.submit(chat_job(max_tokens=10))
    before = keys_of(redis)
    with pytest.raises(DeadlineUnreachableError) as caught:
        queue.submit(chat_job(max_tokens=10), JobTerms(start_within_s=20.0))
    assert caught.value.within_s == 20.0
    assert caught.value.eta_s == pytest.approx(40.0, rel=0.2)
    assert keys_of(redis) == before
    queue.submit(chat_job(max_tokens=10), JobTerms(start_within_s=100.0))
    # A class that goes first is before them all.
    queue.submit(chat_job(max_tokens=10), JobTerms(start_within_s=20.0, priority="interactive"))


def test_while_nothing_is_known_of_the_speed_no_deadline_is_refused(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(50):
        queue.submit(chat_job())
    assert queue.submit(chat_job(), JobTerms(start_within_s=0.5)) == 50


def test_a_job_that_was_not_started_in_time_fails_with_the_reason(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job, JobTerms(start_within_s=5.0))
    let_time_pass(redis, job.job_id, 8.0)
    assert queue.claim("w1", 1, "c1") == []
    end = ended(redis, job.job_id)
    assert end is not None
    assert (end.state, end.code) == ("failed", "deadline_exceeded")
    assert end.message == "waited 8.0 s, was to start within 5.0 s"
    assert queue.info(job.job_id).state == "failed"
    assert queue.depth() == 0
    assert redis.ttl(JOB(job.job_id)) > 0


def test_the_reaper_ends_what_is_late_also_where_nobody_claims(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    late, patient = chat_job(), chat_job()
    queue.submit(late, JobTerms(finish_within_s=5.0))
    let_time_pass(redis, late.job_id, 6.0)
    queue.submit(patient, JobTerms(finish_within_s=1000))
    assert queue.reap().expired == (late.job_id,)
    assert queue.depth() == 1
    end = ended(redis, late.job_id)
    assert end is not None
    assert end.message == "waited 6.0 s, was to be complete within 5.0 s"


def test_a_client_can_end_what_is_late_and_nothing_else(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    late, patient = chat_job(), chat_job()
    queue.submit(late, JobTerms(start_within_s=5.0))
    queue.submit(patient, JobTerms(start_within_s=1000))
    let_time_pass(redis, late.job_id, 6.0)
    assert [queue.expire(job.job_id) for job in (late, late, patient)] == [True, False, False]
    assert queue.info(patient.job_id).state == "queued"


def test_a_started_job_knows_how_much_time_is_left(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job(), JobTerms(start_within_s=5, finish_within_s=60))
    queue.submit(chat_job())
    timed, patient = queue.claim("w1", 2, "c1")
    assert timed.time_left_s is not None
    assert 59 < timed.time_left_s <= 60
    assert patient.time_left_s is None


def test_a_start_in_time_is_in_time_for_all_later_runs(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job, JobTerms(start_within_s=1000))
    lease = claim_one(queue).lease
    queue.release([lease])
    redis.hset(JOB(job.job_id), "mf_start_by", 1)
    assert claim_one(queue).lease.job_id == job.job_id


def test_a_started_job_whose_worker_does_not_end_it_is_ended_by_the_reaper(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job, JobTerms(finish_within_s=60))
    lease = claim_one(queue).lease
    redis.zadd(DEADLINES(MODEL), {job.job_id: 1})
    assert queue.reap().expired == (job.job_id,)
    assert queue.renew("w1", [lease]) == {job.job_id}
    assert not queue.finish(lease, DONE)
    assert queue.num_started() == 0


@pytest.mark.parametrize(
    "terms",
    [
        JobTerms(tenant="a b"),
        JobTerms(tenant=""),
        JobTerms(priority="urgent"),  # type: ignore[arg-type]
        JobTerms(start_within_s=0),
        JobTerms(start_within_s=float("nan")),
        JobTerms(finish_within_s=-1),
        JobTerms(finish_within_s=1e9),
    ],
)
def test_terms_that_make_no_sense_are_refused(redis: Redis, terms: JobTerms) -> None:
    with pytest.raises(MessageError):
        JobQueue(redis, MODEL).submit(chat_job(), terms)
    assert redis.keys() == []


def test_a_submit_that_wants_a_replica_says_so_where_none_is(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(durability="replica", durability_s=0.05))
    job = chat_job()
    with pytest.raises(NotDurableError, match="a replica has not confirmed it within"):
        queue.submit(job)
    # It is queued all the same, and the same submit may be tried again.
    assert JobQueue(redis, MODEL).submit(job) == 0


# Where a job stands


def slow(redis: Redis, service_s: float) -> None:
    """Let the fleet have measured that a job of ten tokens takes so long."""
    redis.hset(
        RATES(MODEL),
        mapping={
            "samples": 100,
            "service_ms": service_s * 1000,
            "answer_tokens": 10,
            "expected_tokens": 10,
        },
    )


def claim_after_submit(queue: JobQueue) -> str:
    queue.submit(chat_job(max_tokens=10))
    return claim_one(queue).lease.job_id


def test_the_eta_follows_from_slots_and_measured_times(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    serve(redis, "w1", slots=2)
    serve(redis, "w2", slots=2)
    slow(redis, service_s=8.0)
    for _ in range(4):
        claim_after_submit(queue)
    jobs = [chat_job(max_tokens=10) for _ in range(6)]
    for job in jobs:
        queue.submit(job)
    etas = [queue.info(job.job_id).eta_s for job in jobs]
    # Each two seconds one of four slots comes free.
    assert etas == [pytest.approx(2.0 * (n + 1), abs=0.01) for n in range(6)]
    assert queue.info(jobs[5].job_id).tokens_ahead == 5 * 11


def test_longer_answers_ahead_make_a_longer_wait(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    serve(redis, slots=1)
    slow(redis, service_s=10.0)
    claim_after_submit(queue)
    queue.submit(chat_job(max_tokens=5))
    last = chat_job()
    queue.submit(last)
    assert queue.info(last.job_id).eta_s == pytest.approx(10.0, abs=0.01)


def test_a_free_slot_is_no_wait(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    serve(redis, slots=2)
    job = chat_job()
    queue.submit(job)
    assert queue.info(job.job_id).eta_s == 0.0


def test_what_is_not_known_is_not_guessed(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    serve(redis, slots=1)
    claim_after_submit(queue)
    job = chat_job()
    queue.submit(job)
    assert queue.info(job.job_id).eta_s is None


@pytest.mark.parametrize(
    ("states", "outlook"),
    [
        ([], "no_worker"),
        (["paused"], "paused"),
        (["draining"], "paused"),
        (["paused", "idle"], "queued"),
    ],
)
def test_no_worker_is_a_state_of_its_own(redis: Redis, states: list[str], outlook: str) -> None:
    queue = JobQueue(redis, MODEL)
    for number, state in enumerate(states):
        serve(redis, f"w{number}", state=state)
    job = chat_job()
    queue.submit(job)
    info = queue.info(job.job_id)
    assert info.outlook == outlook
    assert info.num_workers == sum(state == "idle" for state in states)


def test_a_worker_that_died_serves_no_more_once_its_life_is_over(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=1, context_length=64, started_at=0.0
    )
    Registration(redis, record, lease_s=0.001).beat(state="idle", in_flight=0)
    job = chat_job()
    queue.submit(job)
    until(lambda: queue.info(job.job_id).outlook == "no_worker", "its life is over")
    queue.reap()
    assert not redis.exists(CAPACITY(MODEL))


def test_the_measured_means_come_from_finished_jobs(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for tokens in (10, 30):
        queue.submit(chat_job("x" * 40))
        usage = Usage(prompt_tokens=10, completion_tokens=tokens)
        end = JobEnd(state="finished", finish_reason="stop", usage=usage)
        queue.finish(claim_one(queue).lease, end)
    found: Any = redis.hgetall(RATES(MODEL))
    rates = {name.decode(): float(value) for name, value in found.items()}
    assert (rates["samples"], rates["answer_tokens"], rates["bytes_per_token"]) == (2, 20, 4)
    assert rates["service_ms"] >= 1


def test_a_run_that_went_on_with_anothers_answer_teaches_nothing(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    claim_one(queue)
    end_all_leases(redis)
    queue.reap()
    queue.finish(claim_one(queue).lease, DONE)
    assert not redis.exists(RATES(MODEL))


def test_a_long_queue_is_added_up_by_its_mean(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(200):
        queue.submit(chat_job(max_tokens=10))
    last = chat_job(max_tokens=10)
    queue.submit(last)
    assert queue.info(last.job_id).tokens_ahead == 200 * 11


def test_new_ids_sort_by_time_so_equals_keep_their_order() -> None:
    ids = [new_job_id() for _ in range(3)]
    assert [i[:12] for i in ids] == sorted(i[:12] for i in ids)
