"""What a worker's step says for all its jobs at once."""

import pytest
from redis import Redis

from mixfleet_broker.channel import delivered_tokens, ended
from mixfleet_broker.errors import BrokerUnavailableError, MessageError
from mixfleet_broker.flush import Flush
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.queue import JobQueue, Lease
from mixfleet_broker.write_outcome import Behind, WriteOutcome
from support.queue_jobs import DONE, MODEL, append_chunk, chat_job, chunk, end_all_leases

DONE_, LOST = WriteOutcome.DONE, WriteOutcome.LOST


def leases_of(queue: JobQueue, num_jobs: int) -> list[Lease]:
    for _ in range(num_jobs):
        queue.submit(chat_job())
    return [claimed.lease for claimed in queue.claim("w1", num_jobs, "c1")]


def test_all_writes_take_one_round_trip(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two, three = leases_of(queue, 3)
    warm_up = Flush(queue)  # loads the scripts
    warm_up.append(Lease(job_id="other", token="up-1", run=1), chunk(1, 5))
    warm_up.finish(Lease(job_id="another", token="up-1", run=1), DONE)
    assert warm_up.send().outcomes == (LOST, LOST)
    queue.submit(chat_job())
    before = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    flush = Flush(queue)
    flush.append(one, chunk(1, 5))
    flush.finish(two, DONE, chunk(2, 6, 7))
    flush.append(three, chunk(2, 8, 9))
    assert len(flush) == 3
    result = flush.send()
    assert (result.outcomes, result.num_queued) == ((DONE_, DONE_, DONE_), 1)
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 2
    assert [delivered_tokens(redis, lease.job_id) for lease in (one, two, three)] == [
        (5,),
        (6, 7),
        (8, 9),
    ]
    assert ended(redis, two.job_id) == DONE


def test_a_flush_of_nothing_says_how_many_jobs_wait(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    result = Flush(queue).send()
    assert (result.outcomes, result.num_queued) == ((), 1)


def test_a_flush_that_is_sent_again_writes_nothing_twice(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two = leases_of(queue, 2)
    flush = Flush(queue)
    flush.append(one, chunk(1, 5))
    flush.finish(two, DONE, chunk(1, 6))
    assert flush.send().outcomes == (DONE_, DONE_)
    assert flush.send().outcomes == (DONE_, DONE_)
    assert delivered_tokens(redis, one.job_id) == (5,)
    assert delivered_tokens(redis, two.job_id) == (6,)


def test_a_lost_job_is_refused_and_its_neighbour_is_not_hurt(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    cancelled, lost, ending, kept = leases_of(queue, 4)
    queue.cancel(cancelled.job_id)
    redis.delete(CHANNEL(lost.job_id))
    queue.cancel(ending.job_id)
    flush = Flush(queue)
    flush.append(cancelled, chunk(1, 5))
    flush.append(lost, chunk(1, 6))
    flush.finish(ending, DONE, chunk(1, 7))
    flush.append(kept, chunk(1, 8))
    assert flush.send().outcomes == (LOST, LOST, LOST, DONE_)
    assert queue.renew("w1", [cancelled, kept]) == {cancelled.job_id}


def test_a_zombies_flush_is_refused_whole(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two = leases_of(queue, 2)
    end_all_leases(redis)
    queue.reap()
    assert len(queue.claim("w2", 2, "c2")) == 2
    flush = Flush(queue)
    flush.append(one, chunk(1, 5))
    flush.finish(two, DONE, chunk(1, 6))
    assert flush.send().outcomes == (LOST, LOST)
    assert queue.renew("w1", [one, two]) == {one.job_id, two.job_id}


def test_a_server_that_lost_its_scripts_still_ends_the_job(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two = leases_of(queue, 2)
    redis.script_flush()
    flush = Flush(queue)
    flush.append(one, chunk(1, 5))
    flush.finish(two, DONE, chunk(1, 6))
    assert flush.send().outcomes == (DONE_, DONE_)
    assert ended(redis, two.job_id) == DONE


def test_what_does_not_follow_is_not_written(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two, three = leases_of(queue, 3)
    append_chunk(queue, one, chunk(2, 5, 6))
    flush = Flush(queue)
    flush.append(one, chunk(4, 8))
    flush.finish(two, DONE, chunk(2, 7))
    flush.append(three, chunk(1, 9))
    assert flush.send().outcomes == (Behind(2), Behind(0), DONE_)
    assert delivered_tokens(redis, one.job_id) == (5, 6)
    assert ended(redis, two.job_id) is None
    assert queue.renew("w1", [one, two, three]) == set()


def test_a_full_server_still_takes_chunks_and_ends(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    one, two, gone = leases_of(queue, 3)
    queue.cancel(gone.job_id)
    redis.config_set("maxmemory", 1)
    try:
        flush = Flush(queue)
        flush.append(one, chunk(1, 5))
        flush.finish(two, DONE, chunk(1, 6))
        flush.append(gone, chunk(1, 7))
        assert flush.send().outcomes == (DONE_, DONE_, LOST)
    finally:
        redis.config_set("maxmemory", 0)
    assert delivered_tokens(redis, one.job_id) == (5,)


def test_a_job_has_one_write_in_a_flush(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    [lease] = leases_of(queue, 1)
    flush = Flush(queue)
    flush.append(lease, chunk(1, 5))
    with pytest.raises(MessageError, match="a second write"):
        flush.finish(lease, DONE)


def test_a_channel_of_a_wrong_type_hurts_its_own_job_only(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    planted, ending, sound = leases_of(queue, 3)
    for lease in (planted, ending):
        redis.delete(CHANNEL(lease.job_id))
        redis.set(CHANNEL(lease.job_id), "planted")
    flush = Flush(queue)
    flush.append(planted, chunk(1, 5))
    flush.finish(ending, DONE, chunk(2, 6))
    flush.append(sound, chunk(1, 7))
    assert flush.send().outcomes == (LOST, Behind(0), DONE_)
    assert delivered_tokens(redis, sound.job_id) == (7,)


def test_a_flush_without_a_server_can_be_sent_later(redis: Redis, no_redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    [lease] = leases_of(queue, 1)
    flush = Flush(queue)
    flush.append(lease, chunk(1, 5))
    queue.redis = no_redis
    with pytest.raises(BrokerUnavailableError):
        flush.send()
    queue.redis = redis
    assert flush.send().outcomes == (DONE_,)
