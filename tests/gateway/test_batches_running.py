"""Batches while they run: how much at a time, what can be read, and how they end early."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types import Batch
from redis import Redis

from mixfleet_broker.keys import JOB
from mixfleet_broker.queue import JobQueue
from support.batches import answers, begin, chat_line, chat_lines, counts, ended, errors, results
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.invariants import EMPTY_AT_REST, kind_of
from support.openai_client import openai_client
from support.queue_jobs import MODEL
from support.worker_process import until

IN_FLIGHT = 3
SHORT = [chat_line(f"s{i}", "abc") for i in range(IN_FLIGHT)]
"""They are answered before the worker stops to be let go, and the first is one of them."""
CANCELLED = "batch_cancelled"
EXPIRED = "batch_expired"


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    options = ("--batch-in-flight", str(IN_FLIGHT), "--queue-limit", str(IN_FLIGHT))
    with GatewayProcess(redis_url, tmp_path, *options) as process:
        yield process
        assert "Traceback" not in process.log


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


def check_at_rest(redis: Redis) -> None:
    """Nothing of a batch that has ended waits, runs, or stays for ever."""
    for key in EMPTY_AT_REST:
        assert not redis.exists(key(MODEL)), key.name
    for raw in redis.scan_iter("mixfleet:*"):
        kind = kind_of(raw.decode())
        assert kind is not None
        if kind.name.startswith(("file", "batch", "own_")):
            assert 0 < int(redis.ttl(raw)) <= 604_800 + 86_400, raw
            assert kind.name != "batch_done"


def num_done_before_the_stop(client: OpenAI, batch: Batch, worker: EchoWorker) -> int:
    """Wait until the worker is held by a long line; return how many were answered before."""

    def is_held() -> bool:
        num_jobs = len(worker.jobs)
        return (
            num_jobs > 1
            and worker.jobs[-1].messages[0].content != "abc"
            and counts(client.batches.retrieve(batch.id))[1] == num_jobs - 1
        )

    until(is_held, "a long line runs")
    return len(worker.jobs) - 1


def test_no_more_lines_wait_or_run_than_the_setting_allows(
    client: OpenAI, redis: Redis, redis_url: str
) -> None:
    queue = JobQueue(redis, MODEL)
    with EchoWorker(redis_url, hold_after=1) as worker:
        batch = begin(client, chat_lines(8))
        until(lambda: queue.num_started() + queue.depth() == IN_FLIGHT, "the first lines are in")
        jobs = list(redis.scan_iter(JOB("*")))
        assert len(jobs) == IN_FLIGHT
        assert {redis.hget(job, "mf_class") for job in jobs} == {b"2"}  # batch
        worker.go.set()
        batch = ended(client, batch)
    assert answers(client, batch) == {f"r{i}": f"question {i}" for i in range(8)}
    check_at_rest(redis)


@pytest.mark.slow
def test_a_full_queue_is_waited_for(
    client: OpenAI, redis: Redis, redis_url: str, gateway: GatewayProcess
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker, gateway.client() as http:
        others = [begin(client, chat_lines(IN_FLIGHT)) for _ in range(2)]
        full = f'mixfleet_jobs_refused_total{{code="queue_full",model="{MODEL}"}}'
        until(lambda: full in http.get("/metrics").text, "a line was refused")
        worker.go.set()
        for batch in others:
            assert counts(ended(client, batch)) == (IN_FLIGHT, IN_FLIGHT, 0)
    check_at_rest(redis)


def test_finished_lines_can_be_read_while_the_batch_runs(
    client: OpenAI, gateway: GatewayProcess, redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=5) as worker:
        batch = begin(client, [*SHORT, chat_line("slow", "for long")])
        assert batch.output_file_id is not None
        seen = [0]

        def size() -> int:
            seen.append(client.files.retrieve(str(batch.output_file_id)).bytes)
            return seen[-1]

        until(lambda: size() > 0, "the first line is there")
        now = client.batches.retrieve(batch.id)
        assert (now.status, counts(now)[0]) == ("in_progress", 4)
        assert set(answers(client, batch).values()) == {"abc"}
        url = f"/v1/files/{batch.output_file_id}/content"
        with gateway.client() as http, http.stream("GET", url, params={"follow": True}) as stream:
            lines_come = stream.iter_lines()
            first = next(lines_come)
            worker.go.set()
            rest = list(lines_come)
        end = ended(client, batch)
        whole = client.files.content(str(end.output_file_id)).text
        assert [first, *rest] == whole.splitlines()
        assert len(rest) == 3
        with gateway.client() as http:
            assert http.get(url, params={"offset": len(first)}).text == whole[len(first) :]
    assert all(before <= after for before, after in pairwise(seen))


def test_a_cancelled_batch_ends_what_waits_and_what_runs(
    client: OpenAI, redis: Redis, redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=5) as worker:
        batch = begin(client, [*SHORT, *chat_lines(6)])
        num_done = num_done_before_the_stop(client, batch, worker)
        assert client.batches.cancel(batch.id).status == "cancelling"
        end = ended(client, batch)
        until(lambda: len(worker.lost) == 1, "the worker has stopped")
    assert end.status == "cancelled"
    assert end.cancelling_at is not None
    assert end.cancelled_at is not None
    assert counts(end) == (9, num_done, 9 - num_done)
    assert set(answers(client, end).values()) == {"abc"}
    found = errors(client, end)
    assert found.keys() | answers(client, end).keys() == {
        *(f"s{i}" for i in range(3)),
        *(f"r{i}" for i in range(6)),
    }
    assert {error["code"] for error in found.values()} == {CANCELLED}
    assert client.batches.cancel(batch.id).status == "cancelled"
    check_at_rest(redis)


@pytest.mark.slow
def test_a_batch_ends_with_its_window(client: OpenAI, redis: Redis, redis_url: str) -> None:
    with EchoWorker(redis_url, hold_after=5) as worker:
        batch = begin(client, [*SHORT, *chat_lines(6)], completion_window="2s")
        num_done = num_done_before_the_stop(client, batch, worker)
        end = ended(client, batch)
    assert (end.status, counts(end)) == ("expired", (9, num_done, 9 - num_done))
    assert end.expired_at is not None
    assert end.expires_at is not None
    assert end.expired_at >= end.expires_at
    assert {error["code"] for error in errors(client, end).values()} == {EXPIRED}
    check_at_rest(redis)


def test_a_batch_whose_file_is_deleted_fails_and_says_so(client: OpenAI, redis_url: str) -> None:
    with EchoWorker(redis_url, hold_after=5) as worker:
        # Longer than what is read ahead of the lines that run.
        lines = [chat_line(f"r{i}", "long question", user="u" * 4000) for i in range(40)]
        batch = begin(client, lines)
        until(lambda: len(worker.jobs) == 1, "the first line runs")
        client.files.delete(batch.input_file_id)
        worker.go.set()
        end = ended(client, batch)
    assert end.status == "failed"
    assert end.errors is not None
    [error] = end.errors.data or []
    assert error.code == "input_file_not_found"
    total, completed, failed = counts(end)
    assert total == 40
    assert 0 < completed < 40
    assert failed == 0


def test_a_batch_goes_on_without_a_result_file_that_was_deleted(
    client: OpenAI, redis: Redis, redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        batch = begin(client, chat_lines(2))
        until(lambda: len(worker.jobs) == 1, "the first line runs")
        client.files.delete(str(batch.output_file_id))
        worker.go.set()
        end = ended(client, batch)
    assert counts(end) == (2, 2, 0)
    assert results(client, end.error_file_id) == []
    check_at_rest(redis)


def test_a_gateway_without_batches_drives_none(gateway: GatewayProcess) -> None:
    assert "batch_taken" not in gateway.log
