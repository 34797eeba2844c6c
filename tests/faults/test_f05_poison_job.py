"""F5: a job that kills every worker that runs it, in a full batch."""

from pathlib import Path
from typing import cast

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import WorkerLostError
from mixfleet_broker.keys import FAILED, JOB
from mixfleet_broker.packing import unpack
from support.fault_fleet import MODEL, Asked, FaultWorker, Fleet, check_invariants
from support.invariants import Expected
from support.queue_jobs import texts

pytestmark = pytest.mark.slow

BATCH = 8
STEP = ("--simulated", "--simulated-step-s", "0.01", "--max-batch-size", str(BATCH))
POISON = "poison"


@pytest.mark.parametrize("place", [0, BATCH - 1])
def test_a_poison_job_kills_three_workers_at_most_and_no_neighbour(
    place: int, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    questions = [f"question {number}" for number in range(2 * BATCH)]
    before, after = questions[:place], questions[place:]
    asked = Asked(client, *before)
    poison = Asked(client, POISON)
    others = Asked(client, *after)
    [poison_id] = poison.jobs
    jobs = asked.jobs | others.jobs | poison.jobs

    def start(name: str) -> FaultWorker:
        return FaultWorker(redis_url, name, tmp_path, *STEP, faults=("--kill-for", f"{POISON}:3"))

    with Fleet(start) as fleet:
        fleet.tend_until_ended(redis, jobs)
        asked.read_all()
        others.read_all()
        with pytest.raises(WorkerLostError, match="3 workers that ran it died"):
            poison.streams[0].result()
        fate = Expected(
            text=poison.texts[0], states=frozenset({"failed"}), code=WorkerLostError.code
        )
        check_invariants(redis, jobs | {poison_id: fate})
        assert fleet.num_deaths == 3
    assert texts(redis.zrange(FAILED(MODEL), 0, -1)) == [poison_id]
    assert _history(redis, poison_id) == [(f"w{n}", "lost") for n in (1, 2, 3)]


def _history(redis: Redis, job_id: str) -> list[tuple[str, str]]:
    [data] = redis.hmget(JOB(job_id), "mf_history")
    history = unpack(cast("bytes", data))
    assert isinstance(history, list)
    return [(run["w"], run["r"]) for run in history]
