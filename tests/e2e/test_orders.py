"""Operators and clients reach real workers: pause, resume, drain, cancel, a reader that is gone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import DeadlineExceededError, JobCancelledError
from mixfleet_broker.channel import read_events
from mixfleet_broker.keys import READER
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.queue import JobQueue
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

MODEL = "simulated"
STEP_S = 0.1
SLOW_STEP = ("--simulated", "--simulated-step-s", str(STEP_S))
FAST_STEP = ("--simulated", "--simulated-step-s", "0")


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, model=MODEL) as client:
        yield client


def mixfleet(*arguments: str) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("mixfleet"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def num_tokens(redis: Redis, job_id: str) -> int:
    events = [event for _, event in read_events(redis, job_id)]
    return max([e.num_tokens for e in events if isinstance(e, TokenChunk)], default=0)


def test_a_worker_is_paused_and_resumed_from_anywhere(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP) as worker:
        assert mixfleet("worker", "pause", "--redis", redis_url, "w1").startswith("w1: takes no")
        until(lambda: state(worker) == "paused", "the worker says that it is paused")
        stream = client.chat("one", max_tokens=5, seed=1)
        until(lambda: stream.status().outlook == "paused", "its client sees it")
        rows = json.loads(mixfleet("worker", "ls", "--redis", redis_url, "--json"))
        assert [(row["worker_id"], row["state"]) for row in rows] == [("w1", "paused")]
        mixfleet("worker", "resume", "--redis", redis_url, "--all")
        assert stream.result().usage.completion_tokens == 5
        until(lambda: state(worker) == "idle", "the worker is idle again")


def test_a_paused_worker_finishes_what_it_has(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP) as worker:
        running = client.chat("one", max_tokens=15, seed=1)
        next(iter(running))
        mixfleet("worker", "pause", "--redis", redis_url, "w1")
        waiting = client.chat("two", max_tokens=5, seed=1)
        assert running.result().usage.completion_tokens == 15
        assert waiting.status().state == "queued"
        assert state(worker) == "paused"


def test_a_worker_is_drained_from_anywhere(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP, "--drain-s", "0.2") as worker:
        stream = client.chat("one", max_tokens=60, seed=1)
        next(iter(stream))
        mixfleet("worker", "drain", "--redis", redis_url, "w1")
        assert worker.exit_status() == 0
        info = JobQueue(redis, MODEL).info(stream.job_id)
        assert (info.state, info.num_losses) == ("queued", 0)
        assert num_tokens(redis, stream.job_id) > 0
        assert worker.record() is None


def test_a_cancel_reaches_the_engine_within_a_step(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    """One slot, so the next job starts when the first has left the engine."""
    arguments = (*SLOW_STEP, "--max-batch-size", "1")
    with WorkerProcess(redis_url, "w1", tmp_path, *arguments):
        stream = client.chat("one", max_tokens=500, seed=1)
        pieces = iter(stream)
        for _ in range(3):
            next(pieces)
        follower = client.chat("two", max_tokens=2, seed=1)
        stream.cancel("seen enough")
        with pytest.raises(JobCancelledError, match="seen enough"):
            stream.result()
        follower.result()
        cancelled_at = ms_of_end(redis, stream.job_id)
        started_at = ms_of_start(redis, follower.job_id)
        # The step that was going on, and the hand-over; two more steps would be too late.
        assert started_at - cancelled_at < 1000 * 3 * STEP_S


def test_a_job_whose_time_is_over_stops_and_says_so(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP):
        stream = client.chat("one", max_tokens=500, seed=1, finish_within_s=1.0)
        with pytest.raises(DeadlineExceededError, match=r"after [0-9]+ tokens"):
            stream.result()
        assert stream.text
        assert client.chat("two", max_tokens=2, seed=1).result().usage.completion_tokens == 2


def test_a_job_that_nobody_takes_ends_when_its_time_is_over(client: Client) -> None:
    stream = client.chat("one", start_within_s=0.2)
    with pytest.raises(DeadlineExceededError, match=r"was to start within 0\.2 s"):
        stream.result()


def test_a_job_stops_when_its_reader_is_gone(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP):
        stream = client.chat("one", max_tokens=500, seed=1, on_disconnect="cancel")
        next(iter(stream))
        redis.delete(READER(stream.job_id))  # as if its time were over
        with pytest.raises(JobCancelledError, match="its reader is gone"):
            stream.result()


def test_jobs_are_listed_shown_cancelled_and_requeued(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    waiting = client.chat("one", max_tokens=5, seed=1)
    rows = json.loads(mixfleet("job", "ls", "--redis", redis_url, "--json"))
    assert [(row["job_id"], row["state"]) for row in rows] == [(waiting.job_id, "queued")]
    assert waiting.job_id in mixfleet("job", "ls", "--redis", redis_url)
    shown = json.loads(mixfleet("job", "show", "--redis", redis_url, "--json", waiting.job_id))
    assert (shown["standing"]["outlook"], shown["tenant"]) == ("no_worker", "default")
    out = mixfleet("job", "cancel", "--redis", redis_url, waiting.job_id, "--reason", "too late")
    assert out == f"{waiting.job_id}: cancelled\n"
    with pytest.raises(JobCancelledError, match="too late"):
        waiting.result()
    failing = client.chat("two", max_tokens=100_000, seed=1)
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP):
        until(lambda: failing.status().state == "failed", "it is too long and fails")
        [row] = json.loads(
            mixfleet("job", "ls", "--state", "failed", "--redis", redis_url, "--json")
        )
        assert (row["job_id"], row["reason"]) == (failing.job_id, "prompt_too_long")
        out = mixfleet("job", "requeue", "--redis", redis_url, "--all-failed")
        assert out == f"{failing.job_id}: queued again\n"
        until(lambda: failing.status().attempt == 1, "it ran again")
        until(lambda: failing.status().state == "failed", "it failed again")


def test_a_fleet_behind_a_prefix_is_a_fleet_of_its_own(
    redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXFLEET_KEY_PREFIX", "{team}:")
    arguments = (*FAST_STEP, "--key-prefix", "{team}:")
    worker = WorkerProcess(redis_url, "w1", tmp_path, *arguments, key_prefix="{team}:")
    with worker, Client(redis_url, model=MODEL) as client:
        assert client.chat("one", max_tokens=5, seed=1).result().usage.completion_tokens == 5
        keys: Any = redis.keys()
        assert all(key.startswith(b"{team}:") for key in keys)
        [status] = json.loads(mixfleet("queue", "--redis", redis_url, "--json"))
        assert (status["model"], status["num_finished"]) == (MODEL, 1)


def state(worker: WorkerProcess) -> str | None:
    record = worker.record()
    return None if record is None else record.state


def ms_of_end(redis: Redis, job_id: str) -> int:
    return next(
        int(event_id.split("-")[0])
        for event_id, event in read_events(redis, job_id)
        if isinstance(event, JobEnd)
    )


def ms_of_start(redis: Redis, job_id: str) -> int:
    event_id, _ = read_events(redis, job_id)[0]
    return int(event_id.split("-")[0])
