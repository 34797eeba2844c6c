"""A stock `rq worker` that is pointed at our queue by mistake runs nothing of ours.

It fails the jobs that it takes, with a clear reason where mixfleet is installed beside it; an
operator requeues them.
"""

import json
import subprocess
from pathlib import Path

import pytest
from redis import Redis

from mixfleet_broker.channel import ended
from mixfleet_broker.keys import JOB, LEASES, QUEUE
from mixfleet_broker.queue import JobQueue
from support.queue_jobs import DONE, MODEL, chat_job, chunk, claim_one, submit_and_claim
from support.rq_tools import Tools, environment, python_of

pytestmark = pytest.mark.slow

COMMANDS = Path(__file__).parents[1] / "support" / "rq_commands.py"
NO_MIXFLEET = "/nowhere"


def rq_worker(python: Path, url: str, *, path: str | None = None) -> str:
    """Let a stock worker take all that waits; return what it said."""
    env = environment(RQ_REDIS_URL=url)
    done = subprocess.run(
        [python, "-m", "rq.cli", "worker", "--burst", MODEL],
        env=env if path is None else env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def command(python: Path, url: str, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [python, COMMANDS, url, name, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return str(json.loads(done.stdout))


def test_it_reaches_a_refusal_and_our_job_has_failed(
    redis: Redis, redis_url: str, rq_python: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job("the secret question")
    queue.submit(job)
    said = rq_worker(rq_python, redis_url)
    assert "this queue belongs to mixfleet" in said
    assert "secret" not in said
    assert queue.info(job.job_id).state == "failed"
    why = command(rq_python, redis_url, "failure", job.job_id)
    assert "its jobs are run by `mixfleet worker`, not by `rq worker`" in why
    assert 0 < redis.ttl(JOB(job.job_id)) <= 86_400
    # None of our workers runs it by accident afterwards, and nothing stays behind.
    assert queue.claim("w1", 8, "c1") == []
    assert (queue.depth(), queue.num_started()) == (0, 0)


def test_without_mixfleet_beside_it_it_finds_nothing_to_run(redis: Redis, redis_url: str) -> None:
    python = python_of("rq2")  # the other has it installed
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    said = rq_worker(python, redis_url, path=NO_MIXFLEET)
    assert "mixfleet_broker.rq_compat.refuse" in said
    assert queue.info(job.job_id).state == "failed"
    assert queue.claim("w1", 8, "c1") == []


def test_a_chat_of_a_stock_producer_fails_in_it_too(
    redis: Redis, redis_url: str, rq_python: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    job_id = command(rq_python, redis_url, "enqueue", MODEL, json.dumps(chat))
    rq_worker(rq_python, redis_url)
    assert queue.info(job_id).state == "failed"
    assert queue.claim("w1", 8, "c1") == []


def test_what_it_failed_is_requeued_and_finishes_here(
    redis: Redis, redis_url: str, hardened: Tools
) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    rq_worker(hardened.python, redis_url)
    assert hardened.run("requeue", "--all", "--queue", MODEL).returncode == 0
    again = claim_one(queue)
    assert again.lease.job_id == job.job_id
    assert queue.finish(again.lease, DONE, chunk(1, 5))
    assert ended(redis, job.job_id) == DONE


def test_it_leaves_the_jobs_that_our_workers_hold(
    redis: Redis, redis_url: str, rq_python: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    held = submit_and_claim(queue).lease
    rq_worker(rq_python, redis_url)
    assert queue.renew("w1", [held]) == set()
    assert queue.finish(held, DONE)
    assert queue.info(held.job_id).state == "finished"


def test_a_job_that_it_popped_and_never_began_is_still_ours(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    assert redis.lpop(f"rq:queue:{MODEL}") == job.job_id.encode()  # and then it was killed
    assert claim_one(queue).lease.job_id == job.job_id


def test_a_job_that_both_took_is_lost_to_ours_once_it_has_failed(
    redis: Redis, redis_url: str, rq_python: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.rpush(f"rq:queue:{MODEL}", lease.job_id)  # as if it had been popped before our claim
    rq_worker(rq_python, redis_url)
    assert queue.info(lease.job_id).state == "failed"
    assert queue.renew("w1", [lease]) == {lease.job_id}
    assert not redis.exists(LEASES(MODEL))


def test_the_reader_of_a_job_that_it_failed_is_told_at_the_next_claim(
    redis: Redis, redis_url: str, rq_python: Path
) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    rq_worker(rq_python, redis_url)
    assert queue.claim("w1", 8, "c1") == []
    end = ended(redis, job.job_id)
    assert end is not None
    assert (end.state, end.code) == ("failed", "failed")
    assert end.message == "rq's own worker or tools failed it"


def test_a_job_that_it_had_begun_when_it_died_runs_in_ours(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    redis.lpop(QUEUE(MODEL))
    redis.hset(JOB(job.job_id), mapping={"status": "started", "worker_name": "stock"})
    [claimed] = queue.claim("w1", 8, "c1")
    assert claimed.lease.job_id == job.job_id
    assert queue.finish(claimed.lease, DONE)


def test_what_a_stranger_failed_under_our_feet_is_not_done_by_us(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    [claimed] = queue.claim("w1", 8, "c1")
    redis.hset(JOB(claimed.lease.job_id), "status", "failed")
    assert not queue.finish(claimed.lease, DONE)
    end = ended(redis, claimed.lease.job_id)
    assert end is not None
    assert end.state == "failed"
