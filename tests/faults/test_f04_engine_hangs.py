"""F4: an engine that makes no step any more while its process lives."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    SLOW_STEP,
    Asked,
    FaultWorker,
    check_invariants,
)
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

STALL_S = 1.0
QUESTIONS = ("first question", "second question")


@pytest.mark.parametrize("moment", ["in-prefill:1", "in-decode:5"])
def test_the_jobs_of_an_engine_that_hangs_go_on_elsewhere(
    moment: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    flags = (*SLOW_STEP, "--stall-s", str(STALL_S))
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP):
        give_order(redis, "heir", "pause")  # so that the other one gets the jobs
        asked = Asked(client, *QUESTIONS)
        with FaultWorker(redis_url, "hung", tmp_path, *flags, faults=("--hang-at", moment)) as hung:
            queue = JobQueue(redis, MODEL)
            until(lambda: queue.num_started() == len(QUESTIONS), "the jobs have started")
            until(lambda: queue.num_started() == 0, "no lease is renewed any more")
            # It lives, says so, and takes nothing: the jobs are left to others.
            assert (hung.is_dead, hung.record() is None, queue.depth()) == (False, False, 2)
            withdraw_order(redis, "heir")
            results = asked.read_all()
            hung.wake_engine()
            until(lambda: hung.num_known_losses == len(QUESTIONS), "it knows its losses")
            check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("hung", "heir")}


def test_a_long_prefill_is_no_hang(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    """A step far longer than a lease, and shorter than the time that a step may take."""
    flags = ("--simulated", "--simulated-step-s", "2.5", "--stall-s", "10")
    with (
        WorkerProcess(redis_url, "slow", tmp_path, *flags),
        WorkerProcess(redis_url, "eager", tmp_path, *FAST_STEP),
    ):
        give_order(redis, "eager", "pause")
        asked = Asked(client, "a question", max_tokens=1)
        until(lambda: JobQueue(redis, MODEL).num_started() == 1, "the job has started")
        withdraw_order(redis, "eager")
        [result] = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert result.worker_ids == ("slow",)
