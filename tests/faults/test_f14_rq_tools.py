"""F14: rq's own tools at work on our queue, all at once, of both majors, and rq's own worker."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis import Redis
from rq.job import Job
from rq.registry import FailedJobRegistry

from mixfleet import ChatStream, Client
from mixfleet.errors import (
    EngineFailedError,
    JobCancelledError,
    JobFailedError,
    UnknownJobError,
)
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.queue import JobQueue
from support import rq_commands
from support.fault_fleet import MODEL, SLOW_STEP, Asked, FaultWorker, check_invariants
from support.invariants import Expected
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

RQ3 = Path(sys.executable)
RQ2 = Path(__file__).parents[2] / ".venv-rq2" / "bin" / "python"
PYTHONS = [RQ3, RQ2 if RQ2.exists() else RQ3]
"""Of an rq 3 and, where it is installed, an rq 2."""
FOREIGN = ("rq:clean", "rq:worker", "rq:scheduler", "rq:pubsub")
"""What rq's tools leave behind."""
QUESTIONS = [f"question {number}" for number in range(12)]


@contextmanager
def running(*command: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program until the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_janitors_and_rq_info_at_work_all_the_time_change_nothing(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with ExitStack() as tools:
        for python in PYTHONS:
            janitor = (python, rq_commands.__file__, redis_url, "clean_for_ever", MODEL)
            looker = (python, "-m", "rq.cli", "info", "-i", "0.1", "-u", redis_url)
            processes = [tools.enter_context(running(*tool)) for tool in (janitor, looker)]
        redis.zadd(f"rq:finished:{MODEL}", {"what-a-janitor-sweeps-out": 1})
        until(lambda: not redis.exists(f"rq:finished:{MODEL}"), "they are at work")
        with (
            FaultWorker(
                redis_url, "victim", tmp_path, *SLOW_STEP, faults=("--die-at", "after-flush:9")
            ) as victim,
            WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP, "--max-batch-size", "4"),
        ):
            asked = Asked(client, *QUESTIONS)
            asked.read_all()
            victim.await_death()
            check_invariants(redis, asked.jobs, foreign=FOREIGN)
            assert [process.poll() for process in processes] == [None, None]


def test_what_rqs_workers_take_by_mistake_has_failed_and_runs_here_once_requeued(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    flags = (*SLOW_STEP, "--max-batch-size", "4")
    with WorkerProcess(redis_url, "w1", tmp_path, *flags):
        with ExitStack() as stock:
            for python in PYTHONS:
                command = (python, "-m", "rq.cli", "worker", "-u", redis_url, MODEL)
                stock.enter_context(running(*command))
            until(lambda: redis.scard("rq:workers") == 3, "rq's workers are there")
            asked = Asked(client, *QUESTIONS)
            # No reader is left without a word: an answer, or an error that says who did it.
            failed = [stream for stream in asked.streams if not ended_well(stream)]
            assert failed
        queue = JobQueue(redis, MODEL)
        for stream in failed:
            assert queue.info(stream.job_id).state == "failed"
            queue.requeue(stream.job_id)
        texts = [client.attach(stream.job_id).result().text for stream in asked.streams]
        assert texts == asked.texts
        check_invariants(redis, asked.jobs, foreign=FOREIGN)


def ended_well(stream: ChatStream) -> bool:
    try:
        return bool(stream.result().text)
    except JobFailedError as error:
        assert "rq's own worker or tools failed it" in str(error)  # noqa: PT017 - not of all jobs
        return False


def test_jobs_that_rqs_tools_cancel_delete_or_requeue_are_what_they_say(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    faults = ("--raise-for", "bad:2")
    flags = (*SLOW_STEP, "--max-batch-size", "2")
    with FaultWorker(redis_url, "w1", tmp_path, *flags, faults=faults):
        bad = Asked(client, "a bad question")
        with pytest.raises(EngineFailedError):
            bad.streams[0].result()
        running_one, running_two = Asked(client, "to cancel"), Asked(client, "to delete")
        for asked in (running_one, running_two):
            next(iter(asked.streams[0]))
        queued_one, queued_two = Asked(client, "to cancel too"), Asked(client, "to delete too")
        good = Asked(client, "a good question")
        for asked in (running_one, queued_one):
            Job.fetch(asked.streams[0].job_id, connection=redis).cancel()
        for asked in (running_two, queued_two):
            Job.fetch(asked.streams[0].job_id, connection=redis).delete()
        for asked in (running_one, queued_one):
            with pytest.raises(JobCancelledError):
                asked.streams[0].result()
        for asked in (running_two, queued_two):
            with pytest.raises(UnknownJobError):
                asked.streams[0].result()
        # All that is left of a deleted job that ran is what had been said, for its time to live.
        channel = CHANNEL(running_two.streams[0].job_id)
        assert redis.ttl(channel) > 0
        redis.delete(channel)
        good.read_all()
        [bad_id] = bad.jobs
        FailedJobRegistry(MODEL, connection=redis).requeue(bad_id)
        until(lambda: JobQueue(redis, MODEL).info(bad_id).state == "failed", "it has failed again")
        cancelled = {
            asked.streams[0].job_id: Expected(text=asked.texts[0], states=frozenset({"canceled"}))
            for asked in (running_one, queued_one)
        }
        failed = {bad_id: Expected(states=frozenset({"failed"}), code="engine_failed")}
        jobs = good.jobs | cancelled | failed
        check_invariants(redis, jobs)
        for job_id in jobs:
            seen = Job.fetch(job_id, connection=redis).get_status()
            assert seen.value == JobQueue(redis, MODEL).info(job_id).state
