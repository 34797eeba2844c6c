"""F13: scripts gone, keys gone, keys of a wrong type."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import BrokerError, UnknownJobError
from mixfleet_broker import keys
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import FAST_STEP, MODEL, SLOW_STEP, Asked, check_invariants
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

OF_THE_QUEUE = (
    *(keys.READY, keys.SUSPECTS, keys.WAITING, keys.LOADS, keys.AGEING, keys.DEADLINES),
    *(keys.LIST_BASE, keys.LEASES, keys.BELL, keys.RATES, keys.CAPACITY, keys.QUEUE, keys.WIP),
    keys.FINISHED,
)
QUESTIONS = ("first question", "second question", "third question")


def test_a_server_that_forgets_its_scripts_again_and_again_is_given_them_again(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP):
        asked = Asked(client, *QUESTIONS)
        for stream in asked.streams:
            for _ in stream:
                redis.script_flush()
        results = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("w1",)}


def test_after_everything_was_deleted_jobs_are_unknown_and_the_fleet_works_on(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP) as w1:
        lost = Asked(client, *QUESTIONS)
        next(iter(lost.streams[0]))
        redis.flushall()
        with pytest.raises(UnknownJobError, match=lost.streams[0].job_id):
            lost.streams[0].result()
        later = Asked(client, *QUESTIONS)
        later.read_all()
        # What the lost runs still wanted to write has made no key.
        check_invariants(redis, later.jobs)
        assert w1.process.poll() is None


def test_a_key_of_a_wrong_type_is_a_typed_error_and_nobody_dies_of_it(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    num_refused = 0
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP) as w1:
        for key in OF_THE_QUEUE:
            with spoilt(redis, key(MODEL)):
                try:
                    asked = [Asked(client, f"while {key.name} is spoilt")]
                except BrokerError:
                    asked, num_refused = [], num_refused + 1
            # Whoever was told that the job is queued gets an answer.
            for one in [*asked, Asked(client, f"after {key.name} was spoilt")]:
                one.read_all()
            assert w1.process.poll() is None
        until(lambda: JobQueue(redis, MODEL).num_started() == 0, "nothing runs any more")
    assert num_refused > 5


# Scripts, so that no worker comes between.
SPOIL = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('RENAME', KEYS[1], 'aside') end
redis.call('PFADD', KEYS[1], 'x')
"""
RESTORE = """
redis.call('DEL', KEYS[1])
if redis.call('EXISTS', 'aside') == 1 then redis.call('RENAME', 'aside', KEYS[1]) end
"""


@contextmanager
def spoilt(redis: Redis, name: str) -> Iterator[None]:
    """Let there be something else meanwhile in the place of a key."""
    redis.eval(SPOIL, 1, name)
    yield
    redis.eval(RESTORE, 1, name)
