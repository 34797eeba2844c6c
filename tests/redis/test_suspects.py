"""Jobs that may have killed workers run alone, and take no neighbour with them."""

import pytest
from redis import Redis

from mixfleet_broker.channel import read_events
from mixfleet_broker.jobs import find_job
from mixfleet_broker.keys import LEASES, QUARANTINE, SUSPECTS
from mixfleet_broker.messages import (
    Requeued,
    new_job_id,
)
from mixfleet_broker.queue import ClaimedJob, JobQueue
from mixfleet_broker.write_outcome import WriteOutcome
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    end_all_leases,
    submit_and_claim,
)


def claim(
    queue: JobQueue, worker_id: str, max_jobs: int = 16, *, idle: bool = True
) -> list[ClaimedJob]:
    return queue.claim(worker_id, max_jobs, new_job_id(), idle=idle)


def ids(claimed: list[ClaimedJob]) -> list[str]:
    return [job.lease.job_id for job in claimed]


def die(redis: Redis, queue: JobQueue) -> None:
    """All workers die."""
    end_all_leases(redis)
    queue.reap()


def a_suspect(redis: Redis, queue: JobQueue) -> str:
    """A job two of whose workers died."""
    lease = submit_and_claim(queue).lease
    die(redis, queue)
    claim_one(queue)
    die(redis, queue)
    return lease.job_id


def test_a_poison_job_costs_three_workers_and_no_neighbour(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(16)]
    poison = jobs[7].job_id
    for job in jobs:
        queue.submit(job)
    deaths, finished = 0, set()
    while claimed := claim(queue, f"w{deaths}"):
        if poison in ids(claimed):
            deaths += 1
            die(redis, queue)
            continue
        for given in claimed:
            assert queue.finish(given.lease, DONE)
            finished.add(given.lease.job_id)
    assert deaths == 3
    assert finished == {job.job_id for job in jobs} - {poison}
    row = find_job(redis, poison)
    assert (row.state, row.reason, row.num_losses) == ("failed", "worker_lost", 3)
    assert [(run.reason, run.worker_id) for run in row.history] == [
        ("lost", "w0"),
        ("lost", "w1"),
        ("lost", "w2"),
    ]
    assert [find_job(redis, job.job_id).state for job in jobs].count("failed") == 1


def test_a_suspect_is_given_alone_and_marked(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    suspect = a_suspect(redis, queue)
    queue.submit(chat_job())
    info = queue.info(suspect)
    assert (info.state, info.position) == ("queued", None)
    [alone] = claim(queue, "w1")
    assert (alone.lease.job_id, alone.alone, alone.num_losses) == (suspect, True, 2)


def test_a_repeated_claim_of_a_suspect_gives_it_again_as_alone(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    suspect = a_suspect(redis, queue)
    first = queue.claim("w1", 4, "c1", idle=True)
    again = queue.claim("w1", 4, "c1", idle=False)
    assert first == again
    assert (first[0].lease.job_id, first[0].alone) == (suspect, True)


def test_one_busy_worker_empties_itself_for_a_suspect_and_the_others_go_on(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    suspect = a_suspect(redis, queue)
    for _ in range(8):
        queue.submit(chat_job())
    assert claim(queue, "w1", 2, idle=False) == []
    assert len(claim(queue, "w2", 2, idle=False)) == 2
    assert claim(queue, "w1", 2, idle=False) == []
    assert ids(claim(queue, "w1", 2, idle=True)) == [suspect]
    assert not redis.exists(SUSPECTS(MODEL))
    assert len(claim(queue, "w3", 2, idle=False)) == 2


def test_a_worker_that_dies_while_it_empties_itself_is_replaced(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    a_suspect(redis, queue)
    queue.submit(chat_job())
    assert claim(queue, "w1", idle=False) == []
    assert 0 < redis.pttl(QUARANTINE(MODEL)) <= 30_000
    redis.delete(QUARANTINE(MODEL))  # its time is over
    assert claim(queue, "w2", idle=False) == []
    assert len(claim(queue, "w1", idle=False)) == 1


def test_what_an_engine_failed_on_is_run_alone_without_blame(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    leases = [job.lease for job in claim(queue, "w1")]
    assert queue.isolate(leases) == 3
    assert queue.isolate(leases) == 0
    given = []
    while claimed := claim(queue, "w1"):
        [alone] = claimed
        assert (alone.alone, alone.num_losses) == (True, 0)
        given.append(alone.lease.job_id)
        assert queue.finish(alone.lease, DONE)
    assert sorted(given) == sorted(job.job_id for job in jobs)


def test_a_cancelled_suspect_runs_no_more(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    suspect = a_suspect(redis, queue)
    queue.cancel(suspect)
    assert claim(queue, "w1") == []
    assert queue.depth() == 0


def test_a_suspect_that_an_operator_requeues_is_one_among_others(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    suspect = a_suspect(redis, queue)
    claim_one(queue)
    die(redis, queue)
    assert queue.info(suspect).state == "failed"
    assert queue.requeue(suspect)
    queue.submit(chat_job())
    first, _ = claim(queue, "w1")
    assert (first.lease.job_id, first.alone, first.num_losses) == (suspect, False, 0)
    assert first.num_delivered == 0


@pytest.mark.parametrize("reason", ["lost", "released", "isolated"])
def test_readers_hear_why_a_job_waits_again_and_its_worker_is_fenced_at_once(
    redis: Redis, reason: str
) -> None:
    queue = JobQueue(redis, MODEL)
    claimed = submit_and_claim(queue)

    assert append_chunk(queue, claimed.lease, chunk(1, 1)) is WriteOutcome.DONE
    if reason == "lost":
        die(redis, queue)
    else:
        (queue.release if reason == "released" else queue.isolate)([claimed.lease])
    assert append_chunk(queue, claimed.lease, chunk(2, 2)) is WriteOutcome.LOST
    assert not queue.finish(claimed.lease, DONE, chunk(2, 2))
    events = [event for _, event in read_events(redis, claimed.lease.job_id)]
    assert events[-1] == Requeued(num_tokens=1, reason=reason)  # type: ignore[arg-type]


def test_a_dead_workers_jobs_come_back_with_anothers_claim(redis: Redis) -> None:
    """Nobody has to wait for the next round of the reaper."""
    queue = JobQueue(redis, MODEL)
    lost = submit_and_claim(queue, "dead").lease
    end_all_leases(redis)
    [heir] = claim(queue, "w2")
    assert heir.lease.job_id == lost.job_id
    assert redis.zcard(LEASES(MODEL)) == 1
