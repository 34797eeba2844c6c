"""`mixfleet queue` against a real queue."""

import json
from pathlib import Path
from typing import Any

import pytest
import rq
from click.testing import CliRunner, Result
from redis import Redis
from rq.serializers import JSONSerializer

from mixfleet_broker import keys
from mixfleet_broker.cli import queue
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    JobEnd,
    new_job_id,
)
from mixfleet_broker.overview import ModelStatus, model_statuses
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.shown import format_age

MODEL = "mixtral-8x7b"


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REDIS_URL", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(queue, arguments)


def submit(redis: Redis, num_jobs: int, model: str = MODEL) -> JobQueue:
    jobs = JobQueue(redis, model)
    for _ in range(num_jobs):
        message = ChatMessage(role="user", content="hello")
        jobs.submit(ChatJob(job_id=new_job_id(), model=model, messages=(message,)))
    return jobs


def serve(redis: Redis, worker_id: str = "gpu-1", model: str = MODEL) -> None:
    record = WorkerRecord.of_this_process(
        worker_id=worker_id, model=model, max_batch_size=8, context_length=4096, started_at=0.0
    )
    Registration(redis, record, lease_s=15.0).beat(state="idle", in_flight=0)


def run_jobs(jobs: JobQueue) -> None:
    """Claim five jobs: two stay started, two finish, one fails."""
    leases = [claimed.lease for claimed in jobs.claim("gpu-1", 5, "claim-1")]
    for lease in leases[:2]:
        assert jobs.finish(lease, JobEnd(state="finished", finish_reason="stop"))
    assert jobs.finish(leases[2], JobEnd(state="failed", code="engine_error", message="oh"))


def test_each_state_is_counted_where_it_belongs(redis: Redis) -> None:
    jobs = submit(redis, 8)
    serve(redis)
    run_jobs(jobs)
    (status,) = model_statuses(redis)
    assert status.oldest_queued_s is not None
    assert 0 <= status.oldest_queued_s < 5
    assert status == ModelStatus(
        model=MODEL,
        num_queued=3,
        queued_tokens=3 * 258,
        num_suspects=0,
        num_started=2,
        num_finished=2,
        num_failed=1,
        num_workers=1,
        num_slots=status.num_slots,
        oldest_queued_s=status.oldest_queued_s,
    )


def test_the_age_is_that_of_the_first_job_in_the_order(redis: Redis) -> None:
    submit(redis, 2)
    ids: Any = redis.zrange(keys.READY(MODEL), 0, -1)
    first, second = (job_id.decode() for job_id in ids)
    redis.hset(keys.JOB(first), "enqueued_at", "2000-01-01T00:00:00.000000Z")
    (status,) = model_statuses(redis)
    assert status.oldest_queued_s is not None
    assert status.oldest_queued_s > 20 * 365 * 86_400
    redis.hset(keys.JOB(first), "enqueued_at", "yesterday")
    assert model_statuses(redis)[0].oldest_queued_s is None
    JobQueue(redis, MODEL).cancel(first)
    (status,) = model_statuses(redis)
    assert status.num_queued == 1
    assert status.oldest_queued_s is not None
    assert status.oldest_queued_s < 5
    JobQueue(redis, MODEL).cancel(second)
    assert model_statuses(redis) == []


def test_an_answer_that_can_no_longer_be_read_is_not_counted(redis: Redis) -> None:
    redis.zadd(keys.FINISHED(MODEL), {"old": 1, "new": redis.time()[0] + 100})
    serve(redis)
    assert model_statuses(redis)[0].num_finished == 1


def test_models_with_jobs_and_without_workers_are_listed_and_other_rq_queues_are_not(
    redis: Redis,
) -> None:
    submit(redis, 1, "waiting")
    serve(redis, "a", "served")
    serve(redis, "b", "served")
    rq.Queue("mails", connection=redis, serializer=JSONSerializer).enqueue("mails.send")
    found = [(status.model, status.num_workers) for status in model_statuses(redis)]
    assert found == [("served", 2), ("waiting", 0)]


def test_the_table_has_one_row_per_model(redis: Redis, redis_url: str) -> None:
    jobs = submit(redis, 8)
    run_jobs(jobs)
    serve(redis, "a", "another")
    result = run("--redis", redis_url)
    assert result.exit_code == 0, result.output
    heading, another, mixtral = (line.split() for line in result.output.splitlines())
    assert heading == [
        "model",
        "queued",
        "tokens",
        "started",
        "finished",
        "failed",
        "workers",
        "slots",
        "oldest",
        "queued",
    ]
    assert another == ["another", "0", "0", "0", "0", "0", "1", "8", "-"]
    assert mixtral[:8] == [MODEL, "3", "774", "2", "2", "1", "0", "0"]
    assert mixtral[9] == "s"


def test_json_holds_the_same_numbers(redis: Redis, redis_url: str) -> None:
    submit(redis, 2)
    serve(redis)
    result = run("--redis", redis_url, "--json")
    (row,) = json.loads(result.output)
    assert 0 <= row.pop("oldest_queued_s") < 5
    assert row == {
        "model": MODEL,
        "num_queued": 2,
        "queued_tokens": 2 * 258,
        "num_suspects": 0,
        "num_slots": 8,
        "num_started": 0,
        "num_finished": 0,
        "num_failed": 0,
        "num_workers": 1,
    }


def test_an_empty_fleet_says_how_to_start_one(redis_url: str) -> None:
    assert "start `mixfleet up`" in run("--redis", redis_url).output
    assert json.loads(run("--redis", redis_url, "--json").output) == []


def test_without_any_redis_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    result = run("--data-dir", str(tmp_path))
    assert result.exit_code == 1
    assert result.output.startswith("Error: no Redis is set and none runs for")
    assert "mixfleet up" in result.output


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
        (400_000, "111.1 h"),
    ],
)
def test_ages_are_shown_in_the_unit_that_people_would_use(seconds: float, shown: str) -> None:
    assert format_age(seconds) == shown
