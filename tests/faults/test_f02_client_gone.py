"""F2: clients that die, stand still, come late or come back. The job does not mind."""

from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import JobCancelledError
from mixfleet_broker.keys import READER
from mixfleet_broker.queue import JobQueue
from support.client_process import ClientProcess
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    NUM_TOKENS,
    PERIOD_S,
    SLOW_STEP,
    Asked,
    check_invariants,
)
from support.invariants import Expected
from support.undisturbed import undisturbed_text
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTION = "a question"
ANSWER = undisturbed_text(QUESTION, NUM_TOKENS)
READER_S = 0.5
SLACK_S = 1.0


def test_a_job_goes_on_without_its_client_and_anybody_reads_the_answer(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP),
        ClientProcess(redis_url, QUESTION, tmp_path) as gone,
    ):
        gone.await_pieces(3)
        gone.kill()
        assert client.attach(gone.job_id).result().text == ANSWER
        check_invariants(redis, {gone.job_id: Expected(text=ANSWER)})
    assert ANSWER.startswith(gone.text)


def test_a_job_that_is_to_end_with_its_client_is_cancelled_within_two_renewals(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    flags = ("--on-disconnect", "cancel", "--reader-s", str(READER_S), "--max-tokens", "1000")
    answer = undisturbed_text(QUESTION, 1000)
    with (
        WorkerProcess(redis_url, "w1", tmp_path, "--simulated", "--simulated-step-s", "0.5") as w1,
        ClientProcess(redis_url, QUESTION, tmp_path, *flags) as gone,
    ):
        # Longer than the silence that would end it: the client says that it is there.
        gone.await_pieces(4)
        gone.kill()
        limit_s = READER_S + 2 * PERIOD_S + SLACK_S
        queue = JobQueue(redis, MODEL)
        until(lambda: queue.info(gone.job_id).state == "canceled", "it is cancelled", limit_s)
        with pytest.raises(JobCancelledError, match="reader"):
            client.attach(gone.job_id).result()
        until(lambda: (r := w1.record()) is not None and r.in_flight == 0, "its slot is free")
        expected = Expected(text=answer, states=frozenset({"canceled"}))
        check_invariants(redis, {gone.job_id: expected})
    assert not redis.exists(READER(gone.job_id))


def test_a_queued_job_whose_client_is_gone_is_never_run(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    flags = ("--on-disconnect", "cancel", "--reader-s", str(READER_S))
    with ClientProcess(redis_url, QUESTION, tmp_path, *flags) as gone:
        gone.kill()
        until(lambda: not redis.exists(READER(gone.job_id)), "its reader is taken for gone")
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP):
        info = JobQueue(redis, MODEL).info
        until(lambda: info(gone.job_id).state == "canceled", "it is cancelled")
        expected = Expected(text=ANSWER, states=frozenset({"canceled"}))
        check_invariants(redis, {gone.job_id: expected})


def test_a_reader_that_stands_still_slows_nobody_and_misses_nothing(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP),
        ClientProcess(redis_url, QUESTION, tmp_path) as slow,
    ):
        slow.await_pieces(1)
        slow.pause()
        quick = client.attach(slow.job_id).result()
        assert quick.text == ANSWER
        assert slow.end is None
        slow.resume()
        assert slow.await_end() == "finished"
        assert slow.text == ANSWER
        check_invariants(redis, {slow.job_id: Expected(text=ANSWER)})


def test_a_late_reader_and_one_that_comes_back_get_the_same_stream(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP):
        asked = Asked(client, QUESTION)
        asked.read_all()
    job_id = asked.streams[0].job_id
    full = list(client.attach(job_id).events())
    assert list(client.attach(job_id).events()) == full
    stream = client.attach(job_id)
    for num_read in range(1, len(full)):
        assert stream.next_event() == full[num_read - 1]
        # Any other reader, in any other process, goes on from the id that this one has.
        assert list(client.attach(job_id, stream.last_event_id).events()) == full[num_read:]
