"""F1: kill -9 of a worker at every step of a job's life. Every job that was accepted ends, once."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker.channel import read_events
from mixfleet_broker.messages import (
    Requeued,
)
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    PERIOD_S,
    SLOW_STEP,
    Asked,
    FaultWorker,
    check_invariants,
)
from support.worker_process import LEASE_S, WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTIONS = ("first question", "second question", "third question")
"""One more than the batch of a worker that dies."""
VICTIM = (*SLOW_STEP, "--max-batch-size", "2")
SLACK_S = 0.5
"""What two busy cores may cost."""


@pytest.mark.parametrize(
    "moment",
    [
        "before-claim:1",
        "after-claim:1",
        "after-hand-over:2",
        "in-prefill:1",
        "in-decode:5",
        "after-flush:1",
        "before-flush:7",
        "before-renew:1",
        "after-renew:2",
        "before-finish:1",
        "after-finish:1",
    ],
)
def test_the_answers_of_a_worker_killed_at_any_step_go_on_elsewhere(
    moment: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP):
        give_order(redis, "heir", "pause")  # so that the victim gets the jobs
        asked = Asked(client, *QUESTIONS)
        with FaultWorker(
            redis_url, "victim", tmp_path, *VICTIM, faults=("--die-at", moment)
        ) as victim:
            victim.await_death()
        withdraw_order(redis, "heir")
        asked.read_all()
        check_invariants(redis, asked.jobs)


@pytest.mark.parametrize("moment", ["before-release:1", "after-release:1", "before-sign-off:1"])
def test_a_worker_may_be_killed_while_it_hands_its_jobs_back(
    moment: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    asked = Asked(client, *QUESTIONS)
    with FaultWorker(
        redis_url, "victim", tmp_path, *VICTIM, "--drain-s", "0.1", faults=("--die-at", moment)
    ) as victim:
        next(iter(asked.streams[0]))
        victim.terminate()
        victim.await_death()
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP):
        asked.read_all()
        check_invariants(redis, asked.jobs)


def test_a_worker_may_be_killed_while_it_drains(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    asked = Asked(client, *QUESTIONS)
    with WorkerProcess(redis_url, "victim", tmp_path, *VICTIM) as victim:
        next(iter(asked.streams[0]))
        victim.terminate()
        until(lambda: (r := victim.record()) is not None and r.state == "draining", "it drains")
        victim.kill()
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP):
        asked.read_all()
        check_invariants(redis, asked.jobs)


def test_the_jobs_of_a_dead_worker_wait_again_within_a_lease_and_a_third(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP):
        give_order(redis, "heir", "pause")
        asked = Asked(client, "a question")
        with FaultWorker(
            redis_url, "victim", tmp_path, *VICTIM, faults=("--die-at", "after-renew:1")
        ) as victim:
            victim.await_death()
        seconds, microseconds = redis.time()
        died_at = seconds + microseconds / 1e6
        until(lambda: JobQueue(redis, MODEL).num_started() == 0, "the lease is over")
        [(event_id, _)] = [
            found
            for found in read_events(redis, asked.streams[0].job_id)
            if isinstance(found[1], Requeued)
        ]
        # The id of an event is the time at which Redis took it.
        requeued_at = int(event_id.partition("-")[0]) / 1000
        assert requeued_at - died_at < LEASE_S + PERIOD_S + SLACK_S
        withdraw_order(redis, "heir")
        asked.read_all()


def test_two_workers_may_die_on_the_same_jobs_and_the_third_ends_them(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    asked = Asked(client, *QUESTIONS)
    with ExitStack() as workers:
        for name in ("first", "second"):
            faults = ("--die-at", "after-flush:3")
            victim = FaultWorker(redis_url, name, tmp_path, *SLOW_STEP, faults=faults)
            workers.enter_context(victim).await_death()
        workers.enter_context(WorkerProcess(redis_url, "third", tmp_path, *FAST_STEP))
        results = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("first", "second", "third")}
