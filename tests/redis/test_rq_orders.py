"""What an operator orders from rq-dashboard or rq's commands happens, and nothing else does."""

import pytest
from redis import Redis

from mixfleet.events import EventReader, Patience
from mixfleet.transport import RedisTransport
from mixfleet_broker.channel import read_events
from mixfleet_broker.errors import UnknownJobError
from mixfleet_broker.keys import JOB, QUEUE, READY, RQ_WORKER, SUSPENDED
from mixfleet_broker.messages import (
    JobEnd,
    RunStarted,
)
from mixfleet_broker.queue import JobQueue, Lease
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.settings import Settings
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    submit_and_claim,
)
from support.rq_tools import Tools

pytestmark = pytest.mark.slow

BOOM = JobEnd(state="failed", code="engine_failed", message="boom")


def press(tools: Tools, path: str) -> dict[str, object]:
    """Press a button of the dashboard."""
    answer = tools.dashboard.post(path)
    assert answer.status_code == 200, answer.text
    result: dict[str, object] = answer.json()
    return result


def fail_one(queue: JobQueue) -> Lease:
    lease = submit_and_claim(queue).lease
    assert append_chunk(queue, lease, chunk(1, 5))
    assert queue.finish(lease, BOOM)
    return lease


def test_a_failed_job_is_requeued_runs_again_and_finishes(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    failed = fail_one(queue)
    assert press(tools, f"/job/{failed.job_id}/requeue") == {"status": "OK"}
    assert tools.dashboard.jobs(MODEL, "failed") == []
    assert (queue.info(failed.job_id).state, queue.depth()) == ("queued", 1)
    again = claim_one(queue, "w2")
    assert (again.lease.job_id, again.attempt, again.num_delivered) == (failed.job_id, 2, 0)
    assert queue.finish(again.lease, DONE, chunk(1, 7))
    assert [event for _, event in read_events(redis, failed.job_id)][1:] == [chunk(1, 7), DONE]
    assert queue.info(failed.job_id).state == "finished"


def test_all_failed_jobs_are_requeued_at_once(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    failed = {fail_one(queue).job_id for _ in range(3)}
    assert press(tools, f"/requeue/{MODEL}") == {"status": "OK", "count": 3}
    claimed = queue.claim("w2", 8, "c9")
    assert {c.lease.job_id for c in claimed} == failed
    assert all(queue.finish(c.lease, DONE) for c in claimed)
    assert tools.dashboard.jobs(MODEL, "failed") == []


def test_rq_requeue_requeues_too(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    failed = fail_one(queue)
    done = tools.run("requeue", "--all", "--queue", MODEL)
    assert done.returncode == 0, done.stderr
    assert claim_one(queue).lease.job_id == failed.job_id


def test_a_queued_job_that_is_deleted_is_never_claimed(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    deleted, kept = chat_job(), chat_job()
    queue.submit(deleted)
    queue.submit(kept)
    assert press(tools, f"/job/{deleted.job_id}/delete") == {"status": "OK"}
    assert queue.depth() == 1
    assert [c.lease.job_id for c in queue.claim("w1", 8, "c1")] == [kept.job_id]
    with pytest.raises(UnknownJobError):
        queue.info(deleted.job_id)


def test_a_started_job_that_is_deleted_is_lost_to_its_worker(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    deleted, kept = submit_and_claim(queue).lease, submit_and_claim(queue).lease
    assert press(tools, f"/job/{deleted.job_id}/delete") == {"status": "OK"}
    assert queue.renew("w1", [deleted, kept]) == {deleted.job_id}
    assert not queue.finish(deleted, DONE)
    assert queue.num_started() == 1
    [row] = tools.dashboard.jobs(MODEL, "started")
    assert row["id"] == kept.job_id


def test_the_page_of_workers_survives_the_deletion_of_what_one_runs(
    redis: Redis, hardened: Tools
) -> None:
    lease = submit_and_claim(JobQueue(redis, MODEL)).lease
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=8, context_length=4096, started_at=0.0
    )
    Registration(redis, record, lease_s=15.0).beat(state="busy", in_flight=1)
    redis.hset(RQ_WORKER("w1"), "current_job", lease.job_id)  # where rq 2 looks for it
    [worker] = hardened.dashboard.json("workers")["workers"]
    assert worker["current_job"]["job_id"] == lease.job_id
    redis.delete(JOB(lease.job_id))
    [worker] = hardened.dashboard.json("workers")["workers"]
    assert (worker["name"], worker["current_job"]) == ("w1", "idle")


@pytest.mark.parametrize("registry", ["queued", "started", "finished", "failed", "canceled"])
def test_a_list_that_is_emptied_loses_its_own_jobs_alone(
    redis: Redis, tools: Tools, registry: str
) -> None:
    queue = JobQueue(redis, MODEL)
    finished, started = submit_and_claim(queue).lease, submit_and_claim(queue).lease
    queue.finish(finished, DONE)
    canceled, queued = submit_and_claim(queue).lease.job_id, chat_job().job_id
    queue.cancel(canceled)
    failed = fail_one(queue)
    queue.submit(chat_job(job_id=queued))
    ids = {
        "queued": queued,
        "started": started.job_id,
        "finished": finished.job_id,
        "failed": failed.job_id,
        "canceled": canceled,
    }
    assert press(tools, f"/queue/{MODEL}/{registry}/empty") == {"status": "OK"}
    assert tools.dashboard.jobs(MODEL, registry) == []
    for state, job_id in ids.items():
        if state == registry:
            with pytest.raises(UnknownJobError):
                queue.info(job_id)
        else:
            assert queue.info(job_id).state == state
    assert queue.renew("w1", [started]) == ({started.job_id} if registry == "started" else set())
    claimed = [c.lease.job_id for c in queue.claim("w1", 8, "c9")]
    assert claimed == ([] if registry == "queued" else [queued])


def test_an_emptied_queue_can_be_used_again(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(3):
        queue.submit(chat_job())
    done = tools.run("empty", MODEL)
    assert "3 jobs removed" in done.stdout, done.stderr
    assert queue.depth() == 0
    job = chat_job()
    queue.submit(job)
    assert [c.lease.job_id for c in queue.claim("w1", 8, "c1")] == [job.job_id]
    assert not redis.exists(READY(MODEL), QUEUE(MODEL))
    assert queue.submit(chat_job()) == 0


def test_a_compacted_queue_keeps_its_jobs_and_their_order(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    ids = [chat_job().job_id for _ in range(3)]
    for job_id in ids:
        queue.submit(chat_job(job_id=job_id))
    assert press(tools, f"/queue/{MODEL}/compact") == {"status": "OK"}
    assert [c.lease.job_id for c in queue.claim("w1", 8, "c1")] == ids


def test_suspend_stops_claims_and_resume_starts_them(redis: Redis, tools: Tools) -> None:
    queue = JobQueue(redis, MODEL)
    running = submit_and_claim(queue).lease
    queue.submit(chat_job())
    assert tools.run("suspend").returncode == 0
    assert redis.exists(SUSPENDED())
    assert queue.claim("w1", 1, "c1") == []
    assert queue.renew("w1", [running]) == set()
    assert queue.finish(running, DONE)
    assert tools.run("resume").returncode == 0
    assert len(queue.claim("w1", 1, "c2")) == 1


def test_the_reader_of_a_deleted_job_is_told_after_a_silence(
    redis: Redis, redis_url: str, tools: Tools
) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 5))
    press(tools, f"/job/{lease.job_id}/delete")
    queue.renew("w1", [lease])
    transport = RedisTransport(Settings(redis=redis_url))
    reader = EventReader(transport, lease.job_id, model=MODEL, patience=Patience(silence_s=0.05))
    assert isinstance(reader.next_event(), RunStarted)
    assert reader.next_event() == chunk(1, 5)
    with pytest.raises(UnknownJobError):
        reader.next_event()
    transport.close()
