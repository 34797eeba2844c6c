"""What rq's tools, stock and ours, say of a queue at work is the truth."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from redis import Redis

from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from support.queue_jobs import DONE, MODEL, chat_job
from support.rq_tools import Tools

pytestmark = pytest.mark.slow

BOOM = JobEnd(state="failed", code="engine_failed", message="boom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A queue at work, with a worker of it."""

    ids: Mapping[str, list[str]]
    """By state, in the order in which each list shows them."""
    registration: Registration


@pytest.fixture
def scene(redis: Redis) -> Scene:
    queue = JobQueue(redis, MODEL)
    jobs = [chat_job("the secret question").job_id for _ in range(8)]
    for job_id in jobs:
        queue.submit(chat_job("the secret question", job_id=job_id))
    record = WorkerRecord.of_this_process(
        worker_id="gpu-1", model=MODEL, max_batch_size=8, context_length=4096, started_at=0.0
    )
    registration = Registration(redis, record, lease_s=15.0)
    registration.beat(state="idle", in_flight=0)
    leases = [claimed.lease for claimed in queue.claim("gpu-1", 5, "c1")]
    registration.beat(state="busy", in_flight=5)
    queue.finish(leases[1], DONE)
    queue.finish(leases[2], DONE)
    queue.finish(leases[3], BOOM)
    queue.cancel(jobs[4])
    registration.beat(state="busy", in_flight=1)
    ids = {
        "queued": jobs[5:],
        "started": jobs[:1],
        "finished": jobs[1:3],
        "failed": jobs[3:4],
        "canceled": jobs[4:5],
    }
    return Scene(ids=ids, registration=registration)


def test_rq_info_counts_jobs_and_shows_the_worker(scene: Scene, tools: Tools) -> None:
    record = scene.registration.record
    queue_line, worker_line = (line for line in tools.info() if line)
    assert queue_line == f"queue {MODEL} 3, 1 executing, 2 finished, 1 failed"
    who = f"worker gpu-1 ({record.host} unknown {record.pid})"
    assert worker_line == f"{who} busy {MODEL}. jobs: 2 finished, 1 failed"
    scene.registration.beat(state="idle", in_flight=0)
    assert f"{who} idle {MODEL}. jobs: 2 finished, 1 failed" in tools.info()
    scene.registration.deregister()
    assert not any(line.startswith("worker") for line in tools.info())


def test_the_dashboard_counts_the_jobs_of_each_state(scene: Scene, tools: Tools) -> None:
    [shown] = tools.dashboard.json("queues")["queues"]
    assert (shown["name"], shown["count"]) == (MODEL, 3)
    for state in ("started", "finished", "failed", "canceled"):
        assert shown[f"{state}_job_registry_count"] == len(scene.ids[state])
    for state in ("deferred", "scheduled"):
        assert shown[f"{state}_job_registry_count"] == 0


def test_the_dashboard_lists_the_jobs_of_each_state_without_prompts(
    scene: Scene, tools: Tools
) -> None:
    for state, ids in scene.ids.items():
        rows = tools.dashboard.jobs(MODEL, state)
        assert sorted(row["id"] for row in rows) == sorted(ids)
        assert {row["description"] for row in rows} == {"chat"}
        assert "secret" not in str(rows)
    assert [row["id"] for row in tools.dashboard.jobs(MODEL, "queued")] == scene.ids["queued"]
    [failed] = tools.dashboard.jobs(MODEL, "failed")
    assert failed["exc_info"] == "engine_failed: boom"


def test_the_dashboard_shows_the_worker_and_each_job(scene: Scene, tools: Tools) -> None:
    [worker] = tools.dashboard.json("workers")["workers"]
    shown = {name: worker[name] for name in ("name", "state", "queues", "pid")}
    pid = scene.registration.record.pid
    assert shown == {"name": "gpu-1", "state": "busy", "queues": [MODEL], "pid": pid}
    assert (worker["successful_job_count"], worker["failed_job_count"]) == (2, 1)
    for state, (job_id, *_) in scene.ids.items():
        job = tools.dashboard.json(f"job/{job_id}")
        assert (job["id"], job["status"], job["origin"]) == (job_id, state, MODEL)
        assert tools.dashboard.get(f"/0/view/job/{job_id}").status_code == 200
    for page in ("queues", "workers", "jobs", f"jobs/{MODEL}/failed/8/asc/1"):
        assert tools.dashboard.get(f"/0/view/{page}").status_code == 200


def test_the_exporter_gives_prometheus_the_same_counts(scene: Scene, exporting: Tools) -> None:
    metrics = exporting.exporter.get("/metrics").text.splitlines()
    for state in ("queued", "started", "finished", "failed"):
        sample = f'rq_jobs{{queue="{MODEL}",status="{state}"}} {len(scene.ids[state])}.0'
        assert sample in metrics
    assert f'rq_workers{{name="gpu-1",queues="{MODEL}",state="busy"}} 1.0' in metrics
    assert f'rq_workers_success_total{{name="gpu-1",queues="{MODEL}"}} 2.0' in metrics
    assert f'rq_workers_failed_total{{name="gpu-1",queues="{MODEL}"}} 1.0' in metrics


def test_looking_changes_no_job(redis: Redis, scene: Scene, tools: Tools) -> None:
    def contents() -> dict[object, object]:
        keys = [*redis.scan_iter("rq:job:*"), *redis.scan_iter("rq:wip:*")]
        return {key: redis.dump(key) for key in keys}

    before = contents()
    tools.info()
    for page in ("queues", "workers", f"job/{scene.ids['started'][0]}"):
        tools.dashboard.json(page)
    for state in scene.ids:
        tools.dashboard.jobs(MODEL, state)
    assert contents() == before
