"""Bytes and names planted in a job run in rq's stock tools, and do not run in ours."""

import json
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from redis import Redis

from mixfleet_broker.keys import JOB, RQ_WORKER, WIP
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.plain_pickle import MAX_BYTES
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.rq_hardening import UNREADABLE
from support.planted import plant, plant_module
from support.queue_jobs import DONE, MODEL, chat_job, claim_one, submit_and_claim
from support.rq_tools import OURS, Tools, environment

pytestmark = pytest.mark.slow

PROBE = Path(__file__).parents[1] / "support" / "rq_probe.py"
KNOWN = {"2.12.0", "3.0.0"}
PLANTED = ("data", "meta", "result", "return_value")
BOMB = zlib.compress(bytes(2 * MAX_BYTES))
CALLBACKS = ("success_callback_name", "failure_callback_name", "stopped_callback_name")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What exists once something planted has run."""
    return tmp_path / "marker"


@pytest.fixture
def planted_path(tmp_path: Path, marker: Path) -> dict[str, str]:
    """The environment in which what a planted callback names can be imported."""
    path = f"{OURS}:{plant_module(tmp_path)}"
    return {"PYTHONPATH": path, "PLANTED_MARKER": str(marker)}


def check(marker: Path, tools: Tools) -> None:
    """Stock must have run it, or this test shows nothing of the hardened one, which must not."""
    if not tools.hardened and not marker.exists() and version_of(tools) not in KNOWN:
        pytest.skip("this rq refuses by itself")
    assert marker.exists() is not tools.hardened


def version_of(tools: Tools) -> str:
    show = "from rq.version import VERSION; print(VERSION)"
    done = subprocess.run([tools.python, "-c", show], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run_a_job(redis: Redis, fields: Sequence[str], marker: Path) -> str:
    """A job in which all of ``fields`` are planted, run by a worker that rq's tools can see."""
    job_id = submit_and_claim(JobQueue(redis, MODEL)).lease.job_id
    for field in fields:
        plant(redis, job_id, field, marker)
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=8, context_length=4096, started_at=0.0
    )
    Registration(redis, record, lease_s=15.0).beat(state="busy", in_flight=1)
    redis.hset(RQ_WORKER("w1"), "current_job", job_id)  # where rq 2 looks for it
    return job_id


@pytest.mark.parametrize("mode", ["stock", "hardened", "one-lock"])
def test_all_that_rq_would_run_is_refused(
    redis_url: str, rq_python: Path, planted_path: dict[str, str], mode: str
) -> None:
    done = subprocess.run(
        [rq_python, PROBE, mode, redis_url],
        env=environment(**planted_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["touched"]) > 15
    only_by_hand = ["anything pickled"]
    expected = {"stock": seen["touched"], "hardened": [], "one-lock": only_by_hand}
    assert seen["fired"] == expected[mode]
    assert seen["named"] is (mode == "stock")


@pytest.mark.parametrize("field", ["meta", "result", "failure_callback_name"])
def test_rq_info_looks_at_an_abandoned_job(
    redis: Redis, tools: Tools, marker: Path, planted_path: dict[str, str], field: str
) -> None:
    queue = JobQueue(redis, MODEL)
    job_id, other = chat_job().job_id, chat_job()
    queue.submit(chat_job(job_id=job_id))
    queue.submit(other)
    plant(redis, job_id, field, marker)
    redis.hset(JOB(job_id), "status", "started")
    redis.zadd(WIP(MODEL), {f"{job_id}:gone": 1})
    lines = tools.info(**planted_path)
    check(marker, tools)
    if tools.hardened:
        # And it was looked at, not moved.
        assert f"queue {MODEL} 2, 1 executing, 0 finished, 0 failed" in lines
        assert redis.hget(JOB(job_id), "status") == b"started"


@pytest.mark.parametrize("field", PLANTED)
def test_the_dashboard_shows_a_running_job(
    redis: Redis, tools: Tools, marker: Path, field: str
) -> None:
    job_id = run_a_job(redis, [field], marker)
    for page in ("queues", "workers", f"jobs/{MODEL}/started/8/asc/1", f"job/{job_id}"):
        tools.dashboard.get(f"/0/data/{page}.json")
        tools.dashboard.get(f"/0/view/{page}")
    check(marker, tools)


def test_a_spoilt_job_is_one_unreadable_row_among_good_ones(
    redis: Redis, hardened: Tools, marker: Path
) -> None:
    spoilt = run_a_job(redis, (*PLANTED, *CALLBACKS), marker)
    good = submit_and_claim(JobQueue(redis, MODEL), "w1").lease.job_id
    rows = {row["id"]: row for row in hardened.dashboard.jobs(MODEL, "started")}
    assert set(rows) == {spoilt, good}
    assert rows[spoilt]["exc_info"] == UNREADABLE
    assert rows[good]["exc_info"] is None
    page = hardened.dashboard.json(f"job/{spoilt}")
    assert (page["status"], page["result"]) == ("started", UNREADABLE)
    assert json.loads(page["metadata"].replace("&quot;", '"')) == {"meta": UNREADABLE}
    [worker] = hardened.dashboard.json("workers")["workers"]
    assert (worker["name"], worker["state"]) == ("w1", "busy")
    assert hardened.dashboard.get(f"/0/view/job/{spoilt}").status_code == 200
    assert not marker.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("created_at", b"yesterday"), ("status", b"asleep"), ("exc_info", BOMB)],
    ids=["time", "status", "bomb"],
)
def test_a_row_that_rq_cannot_read_at_all_is_unreadable_too(
    redis: Redis, hardened: Tools, field: str, value: bytes
) -> None:
    queue = JobQueue(redis, MODEL)
    spoilt, good = chat_job(), chat_job()
    queue.submit(spoilt)
    queue.submit(good)
    redis.hset(JOB(spoilt.job_id), field, value)
    rows = hardened.dashboard.jobs(MODEL, "queued")
    assert [row["id"] for row in rows] == [spoilt.job_id, good.job_id]
    assert [row["description"] for row in rows] == [UNREADABLE, "chat"]


def test_a_planted_job_can_be_requeued_and_deleted_from_our_page(
    redis: Redis, hardened: Tools, marker: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    first, second = submit_and_claim(queue).lease, submit_and_claim(queue).lease
    for lease in (first, second):
        queue.finish(lease, JobEnd(state="failed", code="engine_failed", message="boom"))
        for field in (*PLANTED, *CALLBACKS):
            plant(redis, lease.job_id, field, marker)
    planted_meta = redis.hget(JOB(first.job_id), "meta")
    assert hardened.dashboard.post(f"/job/{first.job_id}/requeue").status_code == 200
    assert hardened.dashboard.post(f"/job/{second.job_id}/delete").status_code == 200
    # What it could not read it did not write over.
    assert redis.hget(JOB(first.job_id), "meta") == planted_meta
    again = claim_one(queue)
    assert again.lease.job_id == first.job_id
    assert queue.finish(again.lease, DONE)
    assert not redis.exists(JOB(second.job_id))
    assert not marker.exists()


def test_the_exporter_counts_planted_jobs_and_reads_none(
    redis: Redis, exporting: Tools, marker: Path
) -> None:
    run_a_job(redis, (*PLANTED, *CALLBACKS), marker)
    metrics = exporting.exporter.get("/metrics").text
    assert f'rq_jobs{{queue="{MODEL}",status="started"}} 1.0' in metrics
    assert not marker.exists()


def test_html_in_a_job_reaches_the_page_as_text(redis: Redis, hardened: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    html = "<img src=x onerror=alert(1)>"
    queue.finish(lease, JobEnd(state="failed", code="invalid_request", message=html))
    redis.hset(JOB(lease.job_id), "description", html)
    answer = hardened.dashboard.get(f"/0/data/job/{lease.job_id}.json")
    assert "&lt;img src=x" in answer.json()["exc_info"]
    assert "&lt;img src=x" in answer.json()["description"]
    assert "<" not in answer.text
