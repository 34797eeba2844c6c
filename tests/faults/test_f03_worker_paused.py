"""F3: a worker that stands still for longer than its leases, and wakes up as a zombie."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client, RunStarted
from mixfleet_broker.channel import read_events
from mixfleet_broker.orders import give_order, withdraw_order
from support.fault_fleet import (
    FAST_STEP,
    SLOW_STEP,
    Asked,
    FaultWorker,
    check_invariants,
)
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTIONS = ("first question", "second question")


@pytest.mark.parametrize(
    "moment",
    [
        "after-claim:1",
        "in-decode:5",
        "before-flush:5",
        "before-renew:1",
        "before-finish:1",
    ],
)
def test_a_zombie_can_neither_write_nor_finish_and_then_works_on(
    moment: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP) as heir:
        give_order(redis, "heir", "pause")  # so that the zombie gets the jobs
        asked = Asked(client, *QUESTIONS)
        faults = ("--stop-at", moment)
        with FaultWorker(redis_url, "zombie", tmp_path, *SLOW_STEP, faults=faults) as zombie:
            zombie.await_stop()
            withdraw_order(redis, "heir")
            results = asked.read_all()
            said = [read_events(redis, stream.job_id) for stream in asked.streams]
            zombie.resume()
            until(lambda: zombie.num_known_losses == len(QUESTIONS), "it knows its losses")
            # Not a word from it has come since.
            assert [read_events(redis, stream.job_id) for stream in asked.streams] == said
            for events in said:
                runs = [event.worker_id for _, event in events if isinstance(event, RunStarted)]
                assert runs[-1] == "heir"
            check_invariants(redis, asked.jobs)
            heir.kill()
            later = Asked(client, "a later question")
            [result] = later.read_all()
            assert result.worker_ids == ("zombie",)
    assert all(result.worker_ids[-1] == "heir" for result in results)
