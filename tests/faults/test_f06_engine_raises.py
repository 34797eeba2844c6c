"""F6: an engine that raises because of one job of its batch."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import EngineFailedError
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import MODEL, Asked, FaultWorker, Fleet, check_invariants
from support.invariants import Expected

pytestmark = pytest.mark.slow

STEP = ("--simulated", "--simulated-step-s", "0.01", "--max-batch-size", "4")
BAD = "bad"


@pytest.mark.parametrize("place", [0, 2])
def test_an_exception_of_the_engine_fails_the_one_job_that_caused_it(
    place: int, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    """The job is found by running each of the batch alone.

    If it happens to come first then, the engine has raised twice in a row and may be broken for
    good: the worker ends, and the next one knows better.
    """
    questions = [f"question {number}" for number in range(6)]
    first = Asked(client, *questions[:place])
    bad = Asked(client, BAD)
    others = Asked(client, *questions[place:])
    [bad_id] = bad.jobs

    def start(name: str) -> FaultWorker:
        return FaultWorker(redis_url, name, tmp_path, *STEP, faults=("--raise-for", f"{BAD}:3"))

    with Fleet(start) as fleet:
        fleet.tend_until_ended(redis, [*first.jobs, bad_id, *others.jobs])
        first.read_all()
        others.read_all()
        with pytest.raises(EngineFailedError, match="does not like this job"):
            bad.streams[0].result()
        assert JobQueue(redis, MODEL).info(bad_id).num_losses == 0
        fate = Expected(text=bad.texts[0], states=frozenset({"failed"}), code="engine_failed")
        check_invariants(redis, first.jobs | others.jobs | {bad_id: fate})
        assert fleet.num_deaths <= 1
