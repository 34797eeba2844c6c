"""The end of a job: finished, failed or cancelled, once, and kept for a while."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from mixfleet_broker.channel import delivered_tokens, ended, read_events
from mixfleet_broker.keys import (
    CANCELED,
    CHANNEL,
    FAILED,
    FINISHED,
    JOB,
    LEASES,
    READY,
    RQ_WORKER,
    WIP,
    WORKER_EXECUTIONS,
)
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    Usage,
)
from mixfleet_broker.queue import CancelOutcome, JobQueue
from mixfleet_broker.terms import QueueRules
from mixfleet_broker.write_outcome import WriteOutcome
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    end_all_leases,
    event_ids,
    submit_and_claim,
    texts,
)

FAILURE = JobEnd(state="failed", code="engine_failed", message="it broke")


def places(redis: Redis, job_id: str) -> set[str]:
    """The names of the sets that hold a job or a run of it."""
    found = set()
    for key in (READY, LEASES, WIP, FINISHED, FAILED, CANCELED):
        members = texts(redis.zrange(key(MODEL), 0, -1))
        if any(member.partition(":")[0] == job_id for member in members):
            found.add(key.name)
    return found


def test_chunk_end_and_state_are_one_step(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(result_ttl_s=60))
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 11))
    assert queue.finish(lease, DONE, chunk(2, 12))
    events = [event for _, event in read_events(redis, lease.job_id)][1:]
    assert events == [chunk(1, 11), chunk(2, 12), DONE]
    assert queue.info(lease.job_id).state == "finished"
    assert places(redis, lease.job_id) == {"finished"}
    assert 50 < redis.ttl(JOB(lease.job_id)) <= 60
    assert 50 < redis.ttl(CHANNEL(lease.job_id)) <= 60
    assert redis.smembers(WORKER_EXECUTIONS("w1")) == set()


def test_a_finish_whose_reply_was_lost_is_done_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    assert [queue.finish(lease, DONE, chunk(1, 11)) for _ in range(3)] == [True] * 3
    assert [e for _, e in read_events(redis, lease.job_id)][1:] == [chunk(1, 11), DONE]
    assert redis.zcard(FINISHED(MODEL)) == 1


def test_text_without_tokens_may_come_with_the_end(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(2, 11, 12))
    rest = TokenChunk(num_tokens=2, text="held back", token_ids=())
    assert queue.finish(lease, DONE, rest)
    assert [e for _, e in read_events(redis, lease.job_id)][2:] == [rest, DONE]
    ids = [tuple(map(int, i.split("-"))) for i in event_ids(redis, lease.job_id)]
    assert ids == sorted(set(ids))
    assert delivered_tokens(redis, lease.job_id) == (11, 12)


def test_a_last_chunk_that_had_arrived_is_not_said_twice(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 11))  # its reply was lost, so it comes with the end
    assert queue.finish(lease, DONE, chunk(1, 11))
    assert delivered_tokens(redis, lease.job_id) == (11,)


@pytest.mark.parametrize("last", [chunk(3, 13), chunk(1, 11, text=""), chunk(3, text="!")])
def test_an_end_that_would_leave_a_gap_changes_nothing(redis: Redis, last: TokenChunk) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    if last.num_tokens == 1:
        append_chunk(queue, lease, chunk(2, 11, 12))
    assert not queue.finish(lease, DONE, last)
    assert queue.info(lease.job_id).state == "started"
    assert ended(redis, lease.job_id) is None


def test_a_failed_job_keeps_its_reason_for_a_day(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    assert queue.finish(lease, FAILURE)
    assert ended(redis, lease.job_id) == FAILURE
    assert queue.info(lease.job_id).state == "failed"
    assert places(redis, lease.job_id) == {"failed"}
    assert 86_000 < redis.ttl(JOB(lease.job_id)) <= 86_400
    assert redis.ttl(CHANNEL(lease.job_id)) <= 900


def test_a_zombie_can_neither_append_nor_finish(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    zombie = submit_and_claim(queue).lease
    append_chunk(queue, zombie, chunk(1, 11))
    end_all_leases(redis)
    queue.reap()
    heir = claim_one(queue, "w2").lease
    for late in (chunk(2, 99), chunk(50, *range(49))):
        assert append_chunk(queue, zombie, late) is WriteOutcome.LOST
    assert not queue.finish(zombie, DONE, chunk(2, 99))
    assert queue.finish(heir, DONE, chunk(2, 12))
    assert not queue.finish(zombie, DONE, chunk(2, 99))
    assert delivered_tokens(redis, zombie.job_id) == (11, 12)


def test_a_finish_after_the_lease_ended_counts_while_nobody_reaped(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    end_all_leases(redis)
    assert queue.finish(lease, DONE)
    assert queue.reap().requeued == ()


def test_ends_are_counted_for_a_registered_worker_only(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    redis.hset(RQ_WORKER("w1"), "name", "w1")
    for end in (DONE, DONE, FAILURE):
        queue.finish(submit_and_claim(queue, "w1").lease, end)
    queue.finish(submit_and_claim(queue, "w2").lease, DONE)
    assert redis.hget(RQ_WORKER("w1"), "successful_job_count") == b"2"
    assert redis.hget(RQ_WORKER("w1"), "failed_job_count") == b"1"
    assert not redis.exists(RQ_WORKER("w2"))


def test_a_queued_job_that_is_cancelled_is_never_claimed(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    assert queue.cancel(job.job_id) is CancelOutcome.CANCELED
    assert queue.cancel(job.job_id) is CancelOutcome.ALREADY_ENDED
    assert queue.claim("w1", 1, "c1") == []
    assert ended(redis, job.job_id) == JobEnd(state="canceled")
    assert queue.depth() == 0
    assert places(redis, job.job_id) == {"canceled"}
    assert 290 < redis.ttl(JOB(job.job_id)) <= 300
    assert 290 < redis.ttl(CHANNEL(job.job_id)) <= 300


def test_a_started_job_that_is_cancelled_fences_its_worker_at_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 11))
    assert queue.cancel(lease.job_id) is CancelOutcome.CANCELED
    assert append_chunk(queue, lease, chunk(2, 12)) is WriteOutcome.LOST
    assert queue.renew("w1", [lease]) == {lease.job_id}
    assert not queue.finish(lease, DONE, chunk(2, 12))
    assert [e for _, e in read_events(redis, lease.job_id)][1:] == [
        chunk(1, 11),
        JobEnd(state="canceled"),
    ]
    end_all_leases(redis)
    assert queue.reap().requeued == ()
    assert places(redis, lease.job_id) == {"canceled"}


def test_a_job_that_has_ended_cannot_be_cancelled(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    queue.finish(lease, DONE)
    assert queue.cancel(lease.job_id) is CancelOutcome.ALREADY_ENDED
    assert ended(redis, lease.job_id) == DONE
    assert queue.info(lease.job_id).state == "finished"


def test_of_a_finish_and_a_cancel_at_once_one_wins(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            lease = submit_and_claim(queue).lease
            cancel = pool.submit(queue.cancel, lease.job_id)
            finished = pool.submit(queue.finish, lease, DONE).result()
            assert finished == (cancel.result() is CancelOutcome.ALREADY_ENDED)
            ends = [e for _, e in read_events(redis, lease.job_id) if isinstance(e, JobEnd)]
            assert ends == [DONE if finished else JobEnd(state="canceled")]


def test_a_job_that_waits_for_its_second_run_can_be_cancelled(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 11))
    queue.release([lease])
    assert queue.cancel(lease.job_id) is CancelOutcome.CANCELED
    assert queue.claim("w2", 1, "c9") == []
    assert delivered_tokens(redis, lease.job_id) == (11,)


def test_usage_reaches_the_reader(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    end = JobEnd(
        state="finished",
        finish_reason="length",
        usage=Usage(prompt_tokens=9, completion_tokens=1),
    )
    queue.finish(lease, end, chunk(1, 5))
    assert ended(redis, lease.job_id) == end


@pytest.mark.parametrize("message", ["\x80" * 1_500_000, "half a pair: \ud800"])
def test_a_reason_of_any_length_and_content_can_be_said(redis: Redis, message: str) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    assert queue.finish(lease, JobEnd(state="failed", code="invalid_request", message=message))
    end = ended(redis, lease.job_id)
    assert end is not None
    assert end.message is not None
    assert len(end.message) < 2100
    assert end.message.endswith(("(1500000 characters in all)", "half a pair: \\ud800"))
