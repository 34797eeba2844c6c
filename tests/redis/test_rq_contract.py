"""What rq's own tools see of our queue and do to it, with each rq that is installed here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.channel import ended, read_events
from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.keys import JOB, LEASES, QUEUE, READY, SUSPENDED
from mixfleet_broker.messages import (
    ChatMessage,
    JobEnd,
)
from mixfleet_broker.queue import JobQueue, Reaped
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    end_all_leases,
    submit_and_claim,
)

pytestmark = pytest.mark.slow

COMMANDS = Path(__file__).parents[1] / "support" / "rq_commands.py"
RQ2 = Path(__file__).parents[2] / ".venv-rq2" / "bin" / "python"
BY_RQ = JobEnd(state="canceled", message="cancelled with rq's tools")
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


class Rq:
    """Stock rq in another process."""

    def __init__(self, python: Path, url: str) -> None:
        self._python = python
        self._url = url

    def __call__(self, command: str, *arguments: str) -> Any:
        return json.loads(self._run(COMMANDS, self._url, command, *arguments))

    def info(self) -> list[str]:
        return self._run("-m", "rq.cli", "info", "--raw", "--url", self._url).splitlines()

    def _run(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [self._python, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(params=[Path(sys.executable), RQ2], ids=["installed", "rq2"])
def rq(request: pytest.FixtureRequest, redis_url: str) -> Rq:
    python: Path = request.param
    if not python.exists():
        pytest.skip(f"no {python}: sh scripts/setup dev")
    return Rq(python, redis_url)


def test_rq_info_counts_our_jobs(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(6):
        queue.submit(chat_job())
    first, second, third, _ = queue.claim("w1", 4, "c1")
    queue.finish(first.lease, DONE)
    queue.finish(second.lease, DONE)
    queue.finish(third.lease, JobEnd(state="failed", code="engine_failed", message="boom"))
    assert "queue tiny 2, 1 executing, 2 finished, 1 failed" in rq.info()
    assert "boom" in rq("failure", third.lease.job_id)
    # Looking has changed nothing.
    assert (queue.depth(), queue.num_started()) == (2, 1)


def test_rq_sees_a_job_and_neither_its_prompt_nor_anything_to_run(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job("the secret question")
    queue.submit(job)
    seen = rq("describe", job.job_id)
    assert seen["call"] == ["mixfleet_broker.rq_compat.refuse", [], {}]
    assert (seen["description"], seen["origin"]) == ("chat", MODEL)
    assert "secret" not in json.dumps(seen)
    lease = claim_one(queue).lease
    assert rq("status", job.job_id) == "started"
    assert rq("describe", job.job_id)["worker"] == "w1"
    queue.finish(lease, DONE, chunk(1, 5, text="a secret answer"))
    assert rq("status", job.job_id) == "finished"
    assert rq("return_value", job.job_id) is None


def test_a_job_of_a_stock_producer_runs_and_returns_its_answer(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    job_id = rq("enqueue", MODEL, json.dumps(CHAT))
    assert queue.depth() == 2
    own, foreign = queue.claim("w1", 4, "c1")
    assert foreign.lease.job_id == job_id
    job = decode_job(foreign.payload)
    assert (job.job_id, job.model) == (job_id, MODEL)
    assert job.messages == (ChatMessage(role="user", content="Hi"),)
    assert job.sampling.max_tokens == 8
    append_chunk(queue, foreign.lease, chunk(1, 5, text='"né\u4e2d'))
    assert queue.finish(foreign.lease, DONE, chunk(2, 6, text="/\U0001f680\n"))
    assert rq("status", job_id) == "finished"
    assert rq("return_value", job_id) == {
        "text": '"né\u4e2d/\U0001f680\n',
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert ended(redis, job_id) == DONE
    assert queue.finish(own.lease, DONE)


def test_a_stock_job_goes_on_after_a_lost_worker(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = rq("enqueue", MODEL, json.dumps(CHAT))
    append_chunk(queue, claim_one(queue).lease, chunk(1, 5, text="one "))
    end_all_leases(redis)
    assert queue.reap().requeued == (job_id,)
    again = claim_one(queue, "w2")
    assert (again.num_delivered, again.num_losses) == (1, 1)
    queue.finish(again.lease, DONE, chunk(2, 6, text="two"))
    assert rq("return_value", job_id)["text"] == "one two"


def test_a_pickled_job_is_handed_over_unread_and_hurts_only_itself(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    job_id = rq("enqueue_pickled", MODEL)
    good = chat_job()
    queue.submit(good)
    claimed = {c.lease.job_id: c for c in queue.claim("w1", 4, "c1")}
    assert decode_job(claimed[good.job_id].payload) == good
    with pytest.raises(MessageError, match="nothing is unpickled"):
        decode_job(claimed[job_id].payload)
    rejection = JobEnd(state="failed", code="invalid_request", message="not JSON")
    assert queue.finish(claimed[job_id].lease, rejection)
    assert rq("status", job_id) == "failed"
    assert "not JSON" in rq("failure", job_id)


def test_a_queued_job_that_rq_cancels_is_never_claimed(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job()
    queue.submit(job)
    rq("cancel", job.job_id)
    assert queue.depth() == 0
    assert queue.claim("w1", 1, "c1") == []
    # rq has no channels: the next claim tells the reader.
    assert ended(redis, job.job_id) == BY_RQ
    assert 0 < redis.ttl(JOB(job.job_id)) <= 300
    assert not redis.exists(READY(MODEL))


def test_a_running_job_that_rq_cancels_is_lost_to_its_worker(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    lease, other = submit_and_claim(queue).lease, submit_and_claim(queue).lease
    rq("cancel", lease.job_id)
    assert not queue.finish(lease, DONE)
    assert queue.renew("w1", [lease, other]) == {lease.job_id}
    assert [e for _, e in read_events(redis, lease.job_id)][1:] == [BY_RQ]
    assert queue.num_started() == 1
    assert 0 < redis.ttl(JOB(lease.job_id)) <= 300


def test_a_running_job_that_rq_cancels_is_ended_by_the_reaper_of_a_lost_worker(
    redis: Redis, rq: Rq
) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    rq("cancel", lease.job_id)
    end_all_leases(redis)
    assert queue.reap() == Reaped(requeued=(), failed=())
    assert ended(redis, lease.job_id) == BY_RQ
    assert queue.num_started() == 0


def test_a_job_that_rq_deletes_is_gone_everywhere(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    running, waiting = submit_and_claim(queue).lease, chat_job()
    queue.submit(waiting)
    rq("delete", running.job_id)
    rq("delete", waiting.job_id)
    assert queue.renew("w1", [running]) == {running.job_id}
    assert queue.claim("w1", 4, "c9") == []
    assert not redis.exists(LEASES(MODEL), READY(MODEL), QUEUE(MODEL))


def test_an_operators_requeue_begins_the_job_anew(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(max_losses=1))
    first = submit_and_claim(queue).lease
    append_chunk(queue, first, chunk(1, 5))
    end_all_leases(redis)
    assert queue.reap().failed == (first.job_id,)
    rq("requeue", MODEL, first.job_id)
    again = claim_one(queue, "w2")
    assert (again.num_delivered, again.attempt, again.num_losses) == (0, 2, 0)
    assert again.lease.run > first.run
    assert queue.finish(again.lease, DONE, chunk(1, 7))
    assert [e for _, e in read_events(redis, first.job_id)][1:] == [chunk(1, 7), DONE]
    assert not redis.zcard("rq:failed:tiny")


def test_rqs_clean_up_leaves_live_runs_alone(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    end_all_leases(redis)  # even one that we would reap
    assert rq("clean", MODEL) == 1
    assert queue.renew("w1", [lease]) == set()
    assert rq("status", lease.job_id) == "started"


def test_an_emptied_queue_is_empty_for_us_too(redis: Redis, rq: Rq) -> None:
    queue = JobQueue(redis, MODEL)
    for _ in range(3):
        queue.submit(chat_job())
    assert rq("empty", MODEL) == 3
    assert queue.depth() == 0
    assert queue.claim("w1", 4, "c1") == []
    assert queue.submit(chat_job()) == 0


def test_suspended_is_suspended(redis: Redis, rq: Rq, redis_url: str) -> None:
    queue = JobQueue(redis, MODEL)
    queue.submit(chat_job())
    rq._run("-m", "rq.cli", "suspend", "--url", redis_url)
    assert redis.exists(SUSPENDED())
    assert queue.claim("w1", 1, "c1") == []
    rq._run("-m", "rq.cli", "resume", "--url", redis_url)
    assert len(queue.claim("w1", 1, "c2")) == 1


def test_the_rqs_are_the_two_that_we_promise(rq: Rq) -> None:
    assert rq("version").split(".")[0] in ("2", "3")
