"""A batch outlives the gateways that drive it: nothing is lost, and nothing is said twice."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import OpenAI
from redis import Redis

from mixfleet_broker.keys import BATCHES_OPEN, JOB
from support.batches import answers, begin, chat_lines, counts, ended
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.invariants import Expected, violations
from support.openai_client import openai_client
from support.queue_jobs import MODEL
from support.worker_process import until

pytestmark = pytest.mark.slow

OPTIONS = ("--lease-s", "1", "--batch-in-flight", "4")
NUM_LINES = 40
ANSWERS = {f"r{i}": f"question {i}" for i in range(NUM_LINES)}


@pytest.fixture
def gateways(redis_url: str, tmp_path: Path) -> Iterator[list[GatewayProcess]]:
    """Two gateways; the second is the client's."""
    with ExitStack() as stack:
        yield [stack.enter_context(GatewayProcess(redis_url, tmp_path, *OPTIONS)) for _ in range(2)]


def check_jobs(redis: Redis) -> None:
    """Each line was one job, which ran once, and nothing of them is left at work."""
    jobs = {raw.decode().removeprefix(JOB("")) for raw in redis.scan_iter(JOB("*"))}
    assert len(jobs) == NUM_LINES
    assert {redis.hget(JOB(job_id), "mf_attempt") for job_id in jobs} == {b"1"}
    assert violations(redis, MODEL, {job_id: Expected() for job_id in jobs}) == []
    assert redis.zcard(BATCHES_OPEN()) == 0


def num_done(client: OpenAI, batch_id: str) -> int:
    return counts(client.batches.retrieve(batch_id))[1]


def driver_of(gateways: list[GatewayProcess]) -> GatewayProcess:
    """The gateway that took a batch last."""
    return max(gateways, key=lambda gateway: gateway.log.count("batch_taken"))


def test_another_gateway_goes_on_when_one_is_killed(
    gateways: list[GatewayProcess], redis: Redis, redis_url: str
) -> None:
    first, second = gateways
    with EchoWorker(redis_url) as worker, openai_client(second) as client:
        with openai_client(first) as other:
            batch = begin(other, chat_lines(NUM_LINES))
        until(lambda: num_done(client, batch.id) >= 3, "some lines are done")
        driver = driver_of(gateways)
        left = second if driver is first else first
        with openai_client(left) as rest:
            driver.process.send_signal(signal.SIGKILL)
            driver.process.wait()
            assert 0 < num_done(rest, batch.id) < NUM_LINES
            end = ended(rest, batch)
            assert end.status == "completed"
            assert counts(end) == (NUM_LINES, NUM_LINES, 0)
            assert answers(rest, end) == ANSWERS
        assert len(worker.jobs) == NUM_LINES
    check_jobs(redis)
    assert "batch_taken" in left.log


def test_a_batch_goes_on_though_each_gateway_is_killed_in_turn(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    batch, kills = None, 0
    with EchoWorker(redis_url) as worker:
        while True:
            with (
                GatewayProcess(redis_url, tmp_path, *OPTIONS) as gateway,
                openai_client(gateway) as client,
            ):
                if batch is None:
                    batch = begin(client, chat_lines(NUM_LINES))
                before, batch_id = num_done(client, batch.id), batch.id
                enough = min(before + 8, NUM_LINES)
                until(lambda: num_done(client, batch_id) >= enough, "it goes on")  # noqa: B023
                if enough == NUM_LINES:
                    end = ended(client, batch)
                    assert answers(client, end) == ANSWERS
                    break
                kills += 1  # at the end of the block
        assert kills >= 2
        assert len(worker.jobs) == NUM_LINES
    check_jobs(redis)


def test_a_gateway_that_was_only_stopped_can_write_nothing_any_more(
    gateways: list[GatewayProcess], redis: Redis, redis_url: str
) -> None:
    first, second = gateways
    with EchoWorker(redis_url, hold_after=5) as worker:
        with openai_client(first) as client:
            batch = begin(client, chat_lines(NUM_LINES))
        until(lambda: len(worker.jobs) == 1, "the first line runs")
        driver = driver_of(gateways)
        left = second if driver is first else first
        driver.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: "batch_taken" in left.log, "another gateway takes it")
            worker.go.set()
            with openai_client(left) as client:
                until(lambda: num_done(client, batch.id) >= 3, "it goes on")
                driver.process.send_signal(signal.SIGCONT)
                until(lambda: "batch_lost" in driver.log, "the first one notices")
                end = ended(client, batch)
                assert answers(client, end) == ANSWERS
        finally:
            driver.process.send_signal(signal.SIGCONT)
        assert len(worker.jobs) == NUM_LINES
    check_jobs(redis)


def test_a_cancelled_batch_is_cancelled_by_the_gateway_that_takes_it_over(
    gateways: list[GatewayProcess], redis: Redis, redis_url: str
) -> None:
    first, second = gateways
    with EchoWorker(redis_url, hold_after=5) as worker:
        with openai_client(first) as client:
            batch = begin(client, chat_lines(NUM_LINES))
        until(lambda: len(list(redis.scan_iter(JOB("*")))) == 4, "four lines are in flight")
        until(lambda: len(worker.jobs) == 1, "the first line runs")
        driver = driver_of(gateways)
        left = second if driver is first else first
        driver.process.kill()
        driver.process.wait()
        with openai_client(left) as client:
            client.batches.cancel(batch.id)
            end = ended(client, batch)
            assert (end.status, counts(end)) == ("cancelled", (NUM_LINES, 0, NUM_LINES))
    states = [redis.hget(job, "status") for job in redis.scan_iter(JOB("*"))]
    assert states == [b"canceled"] * 4


def test_a_gateway_that_is_told_to_stop_hands_its_batches_over_at_once(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    options = ("--lease-s", "600", "--batch-in-flight", "4")  # nobody waits for its end
    with EchoWorker(redis_url, hold_after=5) as worker:
        with GatewayProcess(redis_url, tmp_path, *options) as first:
            with openai_client(first) as client:
                batch = begin(client, chat_lines(NUM_LINES))
            until(lambda: len(worker.jobs) == 1, "the first line runs")
            first.process.terminate()
            assert first.process.wait(20) == 0 or "Traceback" not in first.log
        worker.go.set()
        with (
            GatewayProcess(redis_url, tmp_path, *options) as second,
            openai_client(second) as client,
        ):
            assert answers(client, ended(client, batch)) == ANSWERS
    check_jobs(redis)


def test_each_result_stands_in_the_file_as_one_whole_line(
    gateways: list[GatewayProcess], redis_url: str
) -> None:
    with EchoWorker(redis_url), openai_client(gateways[0]) as client:
        batch = ended(client, begin(client, chat_lines(NUM_LINES)))
        text = client.files.content(str(batch.output_file_id)).text
    assert text.endswith("\n")
    assert len({json.loads(line)["id"] for line in text.splitlines()}) == NUM_LINES
