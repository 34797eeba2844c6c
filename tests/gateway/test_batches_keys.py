"""Whose files and batches they are, and who pays for their lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from redis import Redis

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.keys import API_CHARGE
from mixfleet_broker.limits import KeyLimits
from mixfleet_broker.queue import JobQueue
from support.batches import CHAT, answers, begin, chat_line, chat_lines, counts, ended, errors
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.key_command import make_key, mixfleet
from support.openai_client import openai_client
from support.queue_jobs import MODEL
from support.worker_process import until

OPTIONS = ("--require-key", "on", "--batch-in-flight", "3", "--batch-stored-bytes", "1024")


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    make_key(redis_url)  # without one it would not start
    with GatewayProcess(redis_url, tmp_path, *OPTIONS) as process:
        yield process
        assert "Traceback" not in process.log


def remaining(url: str, key_id: str) -> dict[str, int]:
    shown = json.loads(mixfleet(url, "key", "show", key_id, "--json").stdout)
    return {state["name"]: state["remaining"] for state in shown["used"]}


def refusal(call: Any, *args: Any) -> tuple[int, str]:
    """Status and text of the error that a call raises."""
    with pytest.raises(openai.APIStatusError) as refused:
        call(*args)
    return refused.value.status_code, refused.value.message


def test_another_key_is_told_what_it_would_be_told_of_nothing(
    gateway: GatewayProcess, redis_url: str
) -> None:
    mine, other = (make_key(redis_url)["secret"] for _ in range(2))
    admin = make_key(redis_url, "--scope", "admin")["secret"]
    with EchoWorker(redis_url), openai_client(gateway, mine) as client:
        batch = ended(client, begin(client, chat_lines(1)))
    files = (batch.input_file_id, str(batch.output_file_id))
    with openai_client(gateway, other) as client:
        for found in files:
            for call in (client.files.retrieve, client.files.content, client.files.delete):
                no_such = f"file-{'0' * 32}"
                status, text = refusal(call, found)
                assert (status, text.replace(found, no_such)) == refusal(call, no_such)
                assert status == 404
        for ask in (client.batches.retrieve, client.batches.cancel):
            no_such = f"batch_{'0' * 32}"
            status, text = refusal(ask, batch.id)
            assert (status, text.replace(batch.id, no_such)) == refusal(ask, no_such)
        with pytest.raises(openai.NotFoundError, match="no file"):
            client.batches.create(input_file_id=files[0], endpoint=CHAT, completion_window="24h")
        assert client.batches.list().data == []
        assert client.files.list().data == []
    with openai_client(gateway, admin) as client:
        assert client.batches.retrieve(batch.id).status == "completed"


def test_no_key_no_batch(gateway: GatewayProcess) -> None:
    with gateway.client() as http:
        for path in ("/v1/files", "/v1/batches", f"{CHAT}/batch"):
            assert http.post(path, json={"input_file_id": "x", "endpoint": CHAT}).status_code == 401


def test_each_line_is_charged_and_settled(
    gateway: GatewayProcess, redis: Redis, redis_url: str
) -> None:
    limits = ("--rpm", "100", "--tpd", "100000", "--parallel", "2")
    key = make_key(redis_url, *limits)
    with EchoWorker(redis_url), openai_client(gateway, key["secret"]) as client:
        batch = ended(client, begin(client, chat_lines(7)))
        assert answers(client, batch) == {f"r{i}": f"question {i}" for i in range(7)}
    assert batch.usage is not None
    until(lambda: not list(redis.scan_iter(API_CHARGE("*"))), "all lines are settled")
    left = remaining(redis_url, key["key_id"])
    assert left["tokens_day"] == 100_000 - batch.usage.total_tokens
    assert left["jobs"] == 2


def test_a_limit_of_a_minute_is_waited_out(gateway: GatewayProcess, redis_url: str) -> None:
    key = make_key(redis_url, "--rpm", "60")
    with EchoWorker(redis_url), openai_client(gateway, key["secret"]) as client:
        for _ in range(58):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}]
            )
        batch = ended(client, begin(client, chat_lines(5)))
        assert counts(batch) == (5, 5, 0)


def test_a_line_that_no_limit_ever_allows_is_an_error(
    gateway: GatewayProcess, redis_url: str
) -> None:
    secret = make_key(redis_url, "--tpm", "100")["secret"]
    lines = [chat_line("big", "q", max_tokens=1000), chat_line("small", "q", max_tokens=9)]
    with EchoWorker(redis_url), openai_client(gateway, secret) as client:
        batch = ended(client, begin(client, lines))
        assert answers(client, batch) == {"small": "q"}
        [(custom_id, (status, error))] = errors(client, batch).items()
    assert (custom_id, status, error["details"]["limit"]) == ("big", 429, 100)


def test_the_lines_of_a_revoked_key_are_not_run(gateway: GatewayProcess, redis_url: str) -> None:
    key = make_key(redis_url)
    admin = make_key(redis_url, "--scope", "admin")["secret"]
    with EchoWorker(redis_url, hold_after=5) as worker:
        with openai_client(gateway, key["secret"]) as client:
            batch = begin(client, chat_lines(10))
        until(lambda: len(worker.jobs) == 1, "the first line runs")
        assert mixfleet(redis_url, "key", "revoke", key["key_id"]).returncode == 0
        worker.go.set()
        with openai_client(gateway, admin) as client:
            end = ended(client, batch)
            found = errors(client, end)
    assert counts(end) == (10, 3, 7)  # those that were in flight
    assert {(status, error["code"]) for status, error in found.values()} == {
        (401, "invalid_api_key")
    }


def test_a_tenant_stores_no_more_than_it_may(gateway: GatewayProcess, redis_url: str) -> None:
    mine, other = (make_key(redis_url)["secret"] for _ in range(2))
    with openai_client(gateway, mine) as client:
        first = client.files.create(file=("x", b"x" * 1024), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="hold 1024 bytes, the limit is 1024"):
            client.files.create(file=("x", b"x"), purpose="batch")
        with openai_client(gateway, other) as others:
            others.files.create(file=("x", b"x"), purpose="batch")
        client.files.delete(first.id)
        client.files.create(file=("x", b"x"), purpose="batch")


@pytest.mark.slow
def test_a_line_is_charged_once_though_gateways_are_killed(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    key, batch = make_key(redis_url, "--tpd", "100000"), None
    options = ("--require-key", "on", "--lease-s", "1", "--batch-in-flight", "4")
    with EchoWorker(redis_url) as worker:
        for enough in (10, 20, 30):
            with (
                GatewayProcess(redis_url, tmp_path, *options) as gateway,
                openai_client(gateway, key["secret"]) as client,
            ):
                batch = batch or begin(client, chat_lines(30))
                until(lambda: len(worker.jobs) >= enough, "it goes on")  # noqa: B023
                if enough == 30:
                    batch = ended(client, batch)
                    until(lambda: not list(redis.scan_iter(API_CHARGE("*"))), "all is settled")
    assert batch is not None
    assert batch.usage is not None
    assert counts(batch) == (30, 30, 0)
    assert len(worker.jobs) == 30
    left = remaining(redis_url, key["key_id"])
    assert left["tokens_day"] == 100_000 - batch.usage.total_tokens


@pytest.mark.slow
def test_a_line_that_was_settled_and_not_marked_is_not_charged_again(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    key = make_key(redis_url, "--tpd", "100000")
    options = ("--require-key", "on", "--lease-s", "1", "--batch-in-flight", "4")
    queue = JobQueue(redis, MODEL)
    with EchoWorker(redis_url, hold_after=5) as worker:
        with (
            GatewayProcess(redis_url, tmp_path, *options) as gateway,
            openai_client(gateway, key["secret"]) as client,
        ):
            batch = begin(client, chat_lines(6))
            until(lambda: queue.num_started() + queue.depth() == 4, "four lines are in flight")
        worker.go.set()
        until(lambda: queue.num_started() + queue.depth() == 0, "their jobs have ended")
        # As if the gateway had been killed a moment later.
        used = {job.job_id: 1 + len(job.messages[0].content) for job in worker.jobs}
        record = ApiKeys(redis).get(key["key_id"])
        assert KeyLimits(redis).settle(record, used) == 4
        with (
            GatewayProcess(redis_url, tmp_path, *options) as gateway,
            openai_client(gateway, key["secret"]) as client,
        ):
            end = ended(client, batch)
            until(lambda: not list(redis.scan_iter(API_CHARGE("*"))), "all is settled")
    assert end.usage is not None
    assert len(worker.jobs) == 6
    left = remaining(redis_url, key["key_id"])
    assert left["tokens_day"] == 100_000 - end.usage.total_tokens
