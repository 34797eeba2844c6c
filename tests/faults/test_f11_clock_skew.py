"""F11: hosts whose clocks are wrong by ten minutes. Only Redis's clock counts."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import workers
from support.client_process import ClientProcess
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    NUM_TOKENS,
    SLOW_STEP,
    Asked,
    FaultWorker,
    check_invariants,
)
from support.invariants import Expected
from support.undisturbed import undisturbed_text
from support.worker_process import LEASE_S, WorkerProcess, until

pytestmark = pytest.mark.slow

SKEWS = [600.0, -600.0]


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_worker_whose_clock_is_wrong_neither_takes_live_jobs_nor_loses_its_own(
    skew_s: float, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    faults = ("--clock-skew", str(skew_s))
    with (
        FaultWorker(redis_url, "wrong", tmp_path, *SLOW_STEP, faults=faults),
        FaultWorker(redis_url, "right", tmp_path, *SLOW_STEP),
    ):
        asked = []
        for taker, other in (("wrong", "right"), ("right", "wrong")):
            give_order(redis, other, "pause")
            asked.append(Asked(client, f"a question for {taker}", finish_within_s=30.0))
            queue, jobs = JobQueue(redis, MODEL), len(asked)
            until(lambda queue=queue, jobs=jobs: queue.num_started() == jobs, "it runs")  # type: ignore[misc]
            withdraw_order(redis, other)
        assert {record.worker_id for record in workers(redis)} == {"wrong", "right"}
        runs = [asked_one.read_all()[0].worker_ids for asked_one in asked]
        check_invariants(redis, asked[0].jobs | asked[1].jobs)
    assert runs == [("wrong",), ("right",)]


@pytest.mark.parametrize("skew_s", SKEWS)
def test_the_leases_of_a_worker_whose_clock_is_wrong_end_on_time(
    skew_s: float, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    faults = ("--clock-skew", str(skew_s))
    asked = Asked(client, "a question")
    dying = (*faults, "--die-at", "after-flush:3")
    with FaultWorker(redis_url, "victim", tmp_path, *SLOW_STEP, faults=dying) as victim:
        victim.await_death()
    with FaultWorker(redis_url, "heir", tmp_path, *FAST_STEP, faults=faults):
        queue = JobQueue(redis, MODEL)
        [job_id] = asked.jobs
        until(lambda: queue.info(job_id).attempt == 2, "it runs again", 3 * LEASE_S)
        asked.read_all()
        check_invariants(redis, asked.jobs)


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_client_whose_clock_is_wrong_gets_its_answer_and_its_deadlines(
    skew_s: float, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    flags = ("--clock-skew", str(skew_s), "--finish-within-s")
    with WorkerProcess(redis_url, "w1", tmp_path, "--simulated", "--simulated-step-s", "0.05"):
        with ClientProcess(redis_url, "a question", tmp_path, *flags, "30") as patient:
            assert patient.await_end() == "finished"
        with ClientProcess(redis_url, "another one", tmp_path, *flags, "0.5") as hasty:
            assert hasty.await_end() == "failed"
        late = Expected(
            text=undisturbed_text("another one", NUM_TOKENS),
            states=frozenset({"failed"}),
            code="deadline_exceeded",
        )
        on_time = Expected(text=undisturbed_text("a question", NUM_TOKENS))
        check_invariants(redis, {patient.job_id: on_time, hasty.job_id: late})
