"""F7: a Redis that is killed, stands still, or comes back with nothing."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet.errors import UnknownJobError
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import (
    MODEL,
    Asked,
    check_invariants,
    connect_client,
)
from support.redis_server import ALWAYS, EVERYSEC, UNSYNCED, RedisServer
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

BATCH = 2
QUESTIONS = [f"question {number}" for number in range(2 * BATCH)]
WORKER = ("--simulated", "--simulated-step-s", "0.15", "--max-batch-size", str(BATCH))
"""An answer takes three leases."""
LONG_LEASE_S = "10"
"""More than passes between a write that Redis loses and its return."""


def await_despair(*workers: WorkerProcess) -> None:
    """Wait until Redis has been away for so long that no lease can hold any more."""

    def all_gave_up() -> bool:
        return all(worker.log.count("lease gone") == BATCH for worker in workers)

    until(all_gave_up, "the leases are taken for lost")


def blame(redis: Redis, asked: Asked) -> int:
    """How many lost workers are held against the jobs."""
    return sum(JobQueue(redis, MODEL).info(job_id).num_losses for job_id in asked.jobs)


@pytest.mark.parametrize(
    ("log", "is_long"),
    [(EVERYSEC, False), (ALWAYS, False), (EVERYSEC, True)],
    ids=["everysec", "always", "for longer than a lease"],
)
def test_a_redis_killed_and_restarted_on_its_log_loses_no_job_and_blames_none(
    log: tuple[str, ...], is_long: bool, tmp_path: Path
) -> None:
    with (
        RedisServer(*log) as server,
        server.client() as redis,
        connect_client(server.url) as client,
        WorkerProcess(server.url, "first", tmp_path, *WORKER) as first,
        WorkerProcess(server.url, "second", tmp_path, *WORKER) as second,
    ):
        asked = Asked(client, *QUESTIONS)
        asked.read_on()
        server.await_written()
        server.kill()
        if is_long:
            await_despair(first, second)
        server.start()
        asked.read_all()
        assert blame(redis, asked) == 0
        check_invariants(redis, asked.jobs)
        # Neither the workers nor the client were started anew.
        assert (first.process.poll(), second.process.poll()) == (None, None)


def test_a_redis_that_lost_its_last_writes_is_told_of_them_again(tmp_path: Path) -> None:
    """Who had read on misses nothing and hears nothing twice, and who comes later neither."""
    with (
        RedisServer(*UNSYNCED) as server,
        server.client() as redis,
        connect_client(server.url) as client,
        WorkerProcess(server.url, "w1", tmp_path, *WORKER, "--lease-s", LONG_LEASE_S) as worker,
    ):
        asked = Asked(client, *QUESTIONS[:BATCH])
        asked.read_on()
        server.keep_log()
        asked.read_on(4)
        server.kill()
        server.lose_what_followed()
        server.start()
        asked.read_all()
        late = [client.attach(stream.job_id).result().text for stream in asked.streams]
        assert late == asked.texts
        assert blame(redis, asked) == 0
        check_invariants(redis, asked.jobs)
        assert worker.log.count("redis has lost tokens") == BATCH


def test_a_redis_that_stands_still_for_longer_than_a_lease_loses_no_job_and_blames_none(
    tmp_path: Path,
) -> None:
    with (
        RedisServer() as server,
        server.client() as redis,
        connect_client(server.url) as client,
        WorkerProcess(server.url, "first", tmp_path, *WORKER) as first,
        WorkerProcess(server.url, "second", tmp_path, *WORKER) as second,
    ):
        asked = Asked(client, *QUESTIONS)
        asked.read_on()
        server.pause()
        await_despair(first, second)
        server.resume()
        asked.read_all()
        assert blame(redis, asked) == 0
        check_invariants(redis, asked.jobs)


def test_after_a_redis_that_lost_everything_the_jobs_are_unknown_and_can_be_sent_again(
    tmp_path: Path,
) -> None:
    with (
        RedisServer(*EVERYSEC) as server,
        server.client() as redis,
        connect_client(server.url) as client,
        WorkerProcess(server.url, "first", tmp_path, *WORKER) as first,
    ):
        job_id = new_job_id()
        lost = Asked(client, "a question", job_id=job_id)
        next(iter(lost.streams[0]))
        server.kill()
        server.lose_everything()
        server.start()
        with pytest.raises(UnknownJobError, match=job_id):
            lost.streams[0].result()
        until(lambda: first.record() is not None, "the worker says again that it lives")
        again = Asked(client, "a question", job_id=job_id)
        again.read_all()
        check_invariants(redis, again.jobs)
