"""Keys that others changed: the queue finds its way back, and one bad key hurts only itself."""

import pytest
from redis import Redis

from mixfleet_broker.channel import ended
from mixfleet_broker.errors import MessageError
from mixfleet_broker.flush import Flush
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.keys import CHANNEL, JOB, LEASES, LIST_BASE, QUEUE, READY
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.write_outcome import WriteOutcome
from support.queue_jobs import (
    DONE,
    MODEL,
    chat_job,
    chunk,
    claim_one,
    end_all_leases,
    submit_and_claim,
    texts,
)


def push_stock(redis: Redis, job_id: str, data: bytes = b"[]", **fields: str) -> None:
    """What rq's enqueue does, as far as it matters here."""
    redis.hset(JOB(job_id), mapping={"status": "queued", "data": data, "origin": MODEL})
    for name, value in fields.items():
        redis.hset(JOB(job_id), name, value)
    redis.rpush(QUEUE(MODEL), job_id)


def claimed_ids(queue: JobQueue, max_jobs: int = 100) -> list[str]:
    token = f"c{queue.redis.incr('claims')}"
    return [claimed.lease.job_id for claimed in queue.claim("w1", max_jobs, token)]


def test_jobs_pushed_to_the_list_are_claimed_in_their_order(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    first, last = chat_job(), chat_job()
    queue.submit(first)
    push_stock(redis, "stock1")
    push_stock(redis, "stock2")
    assert claimed_ids(queue) == [first.job_id, "stock1", "stock2"]
    queue.submit(last)
    assert claimed_ids(queue) == [last.job_id]


def test_a_foreign_job_far_back_in_a_long_queue_gets_its_place(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    before = [chat_job().job_id for _ in range(300)]
    for job_id in before:
        queue.submit(chat_job(job_id=job_id))
    push_stock(redis, "stock")
    assert claimed_ids(queue, 1) == before[:1]
    assert queue.position("stock") == 299
    queue.submit(chat_job())
    assert claimed_ids(queue, 300)[-1] == "stock"


def test_a_stock_job_with_a_time_to_live_keeps_none_while_it_runs(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    push_stock(redis, "stock")
    redis.expire(JOB("stock"), 100)
    claim_one(queue)
    assert redis.ttl(JOB("stock")) == -1


def test_what_rqs_tools_would_call_or_load_is_taken_off_at_the_claim(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    planted = {
        "meta": "x",
        "result": "x",
        "success_callback_name": "os.abort",
        "failure_callback_name": "os.abort",
        "stopped_callback_name": "os.abort",
        "webhooks": "[]",
        "retries_left": "5",
        "repeats_left": "5",
    }
    push_stock(redis, "stock", b"[]", **planted)
    claim_one(queue)
    assert not set(planted) & set(texts(redis.hkeys(JOB("stock"))))


@pytest.mark.parametrize("job_id", ["a:b", "a.b", "x" * 129, "\x00", "ü"])
def test_ids_that_rq_would_not_make_are_left_out(redis: Redis, job_id: str) -> None:
    queue = JobQueue(redis, MODEL)
    push_stock(redis, job_id)
    good = chat_job()
    queue.submit(good)
    assert claimed_ids(queue) == [good.job_id]
    assert queue.depth() == 0


def test_entries_without_a_job_are_swept_out(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    redis.rpush(QUEUE(MODEL), "ghost1", "ghost1", "ghost2")
    redis.zadd(READY(MODEL), {"ghost3": 0})
    good = chat_job()
    queue.submit(good)
    assert claimed_ids(queue) == [good.job_id]
    claimed_ids(queue)
    assert queue.depth() == 0
    assert not redis.exists(READY(MODEL))


def test_an_id_that_is_twice_in_the_list_runs_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    redis.rpush(QUEUE(MODEL), job.job_id)
    assert claimed_ids(queue) == [job.job_id]
    assert claimed_ids(queue) == []
    assert queue.depth() == 0
    assert queue.info(job.job_id).state == "started"


def test_a_lost_list_is_no_lost_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    redis.delete(QUEUE(MODEL))
    assert claimed_ids(queue) == [job.job_id for job in jobs]


def test_a_lost_order_is_no_lost_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    redis.delete(READY(MODEL))
    assert claimed_ids(queue) == [job.job_id for job in jobs]


def test_a_job_key_of_a_wrong_type_hurts_only_itself(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    redis.set(JOB("planted"), "not a hash")
    redis.rpush(QUEUE(MODEL), "planted")
    good = chat_job()
    queue.submit(good)
    assert claimed_ids(queue) == [good.job_id]


def test_a_channel_of_a_wrong_type_is_replaced(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.delete(CHANNEL(lease.job_id))
    redis.set(CHANNEL(lease.job_id), "not a stream")
    end_all_leases(redis)
    queue.reap()
    again = claim_one(queue)
    assert again.num_delivered == 0
    assert queue.finish(again.lease, DONE, chunk(1, 5))
    assert ended(redis, lease.job_id) == DONE


def test_a_run_whose_channel_is_gone_cannot_end_its_job_and_the_next_run_can(
    redis: Redis,
) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.delete(CHANNEL(lease.job_id))
    assert not queue.finish(lease, DONE, chunk(5, 5))
    end_all_leases(redis)
    queue.reap()
    assert queue.finish(claim_one(queue).lease, DONE, chunk(5, *range(5)))


def test_data_that_is_too_large_is_refused_where_it_is_decoded(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    push_stock(redis, "huge", b"x" * (1 << 20))
    good = chat_job()
    queue.submit(good)
    fine, huge = queue.claim("w1", 2, "c1")
    assert decode_job(fine.payload) == good
    with pytest.raises(MessageError):
        decode_job(huge.payload)


def test_a_lease_for_a_job_that_is_gone_is_dropped(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    redis.zadd(LEASES(MODEL), {"nobody:t-1": 1})
    assert queue.reap().requeued == ()
    assert queue.num_started() == 0


def test_an_emptied_server_is_an_empty_queue(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    lease = claim_one(queue).lease
    redis.flushall()
    redis.script_flush()
    assert queue.renew("w1", [lease]) == {job.job_id}
    assert not queue.finish(lease, DONE)
    assert queue.submit(job) == 0
    assert claimed_ids(queue) == [job.job_id]


def test_a_lease_that_names_no_run_is_swept_out_and_others_are_reaped(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.zadd(LEASES(MODEL), {"foo": 1})
    end_all_leases(redis)
    assert queue.reap().requeued == (lease.job_id,)
    assert queue.num_started() == 0


def test_a_channel_that_can_grow_no_more_hurts_its_own_job_only(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    spoilt, sound = submit_and_claim(queue).lease, submit_and_claim(queue).lease
    last = 2**64 - 1
    redis.xadd(CHANNEL(spoilt.job_id), {"k": "t", "d": "x"}, id=f"{last}-{last}")
    flush = Flush(queue)
    flush.append(spoilt, chunk(1, 5))
    flush.append(sound, chunk(1, 6))
    assert flush.send().outcomes == (WriteOutcome.LOST, WriteOutcome.DONE)
    end_all_leases(redis)
    assert sorted(queue.reap().requeued) == sorted([spoilt.job_id, sound.job_id])
    delivered = {c.lease.job_id: c.num_delivered for c in queue.claim("w2", 2, "again")}
    assert delivered == {spoilt.job_id: 0, sound.job_id: 1}


def test_a_list_of_runs_of_a_wrong_type_does_not_stop_the_claim(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    redis.set(f"rq:executions:{job.job_id}", "planted")
    assert claimed_ids(queue) == [job.job_id]
    assert queue.num_started() == 1


def test_a_job_that_has_failed_here_stays_so(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    end = JobEnd(state="failed", code="engine_failed", message="boom")
    assert queue.finish(lease, end)
    assert queue.finish(lease, end)
    assert queue.renew("w1", [lease]) == {lease.job_id}
    assert queue.release([lease]) == 0
    assert queue.info(lease.job_id).state == "failed"


def test_the_base_of_an_emptied_list_goes_with_it(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(3):
        queue.submit(chat_job())
    queue.claim("w1", 1, "c1")
    assert redis.exists(LIST_BASE(MODEL))
    redis.delete(QUEUE(MODEL))
    queue.reap()
    assert not redis.exists(LIST_BASE(MODEL))
