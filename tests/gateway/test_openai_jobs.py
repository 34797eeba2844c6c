"""What OpenAI's clients make of the queue: settings, leaving, trying again, waiting."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from redis import Redis

from mixfleet_broker.jobs import find_job
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.openai_client import openai_client
from support.openai_fleet import MODEL
from support.worker_process import until

TEXT = "Hello, world"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": TEXT}


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path, "--queue-limit", "1") as gateway:
        yield gateway


@pytest.fixture
def echo(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url, MODEL) as echo:
        yield echo


@pytest.fixture
def held(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url, MODEL, hold_after=3) as held:
        yield held


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


def creator(client: Any, kind: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what makes an answer of either kind, and the least that it needs."""
    if kind == "chat":
        return client.chat.completions.create, CHAT
    return client.completions.create, COMPLETION


pytestmark = pytest.mark.slow
KINDS = pytest.mark.parametrize("kind", ["chat", "completions"])


@KINDS
def test_settings_reach_the_worker_as_they_were_given(
    client: OpenAI, echo: EchoWorker, kind: str
) -> None:
    create, request = creator(client, kind)
    given: dict[str, Any] = {
        "temperature": 0,
        "top_p": 0.5,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.25,
        "seed": 0,
        "max_tokens": 77,
    }
    create(**request, **given, stop="x", extra_body={"top_k": 4, "min_p": 0.125})
    sampling = echo.jobs[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.stop, sampling.top_k, sampling.min_p) == (("x",), 4, 0.125)


@KINDS
def test_what_is_not_given_is_left_to_the_model(
    client: OpenAI, echo: EchoWorker, kind: str
) -> None:
    create, request = creator(client, kind)
    create(**request)
    sampling = echo.jobs[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (None, None, None)
    assert sampling.max_tokens == (None if kind == "chat" else 16)
    create(**request, max_tokens=None)
    assert echo.jobs[1].sampling.max_tokens is None


@KINDS
def test_answers_carry_the_ids_of_their_request_and_job(
    client: OpenAI, echo: EchoWorker, kind: str
) -> None:
    create, request = creator(client.with_raw_response, kind)
    response = create(**request, extra_headers={"x-request-id": "mine-42"})
    assert response.headers["x-request-id"] == "mine-42"
    assert response.parse().id.rpartition("-")[2] == response.headers["x-job-id"]
    assert response.headers["x-job-id"] == echo.jobs[0].job_id


@KINDS
def test_closing_a_stream_cancels_its_job(
    client: OpenAI, held: EchoWorker, redis: Redis, kind: str
) -> None:
    create, request = creator(client, kind)
    stream = create(**request, stream=True)
    job_id = next(stream).id.rpartition("-")[2]
    assert find_job(redis, job_id).state in ("queued", "started")
    stream.close()
    until(lambda: find_job(redis, job_id).state == "canceled", "the job is cancelled")
    assert not held.go.is_set()


def test_a_client_that_gives_up_waiting_cancels_its_job(
    client: OpenAI, held: EchoWorker, redis: Redis
) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**CHAT, timeout=0.5)
    until(lambda: bool(held.jobs), "the job was begun")
    job_id = held.jobs[0].job_id
    until(lambda: find_job(redis, job_id).state == "canceled", "the job is cancelled")


@KINDS
def test_a_job_goes_on_without_its_reader_where_that_is_asked(
    client: OpenAI, held: EchoWorker, redis: Redis, gateway: GatewayProcess, kind: str
) -> None:
    create, request = creator(client, kind)
    stream = create(**request, stream=True, extra_headers={"x-mixfleet-on-disconnect": "continue"})
    job_id = next(stream).id.rpartition("-")[2]
    stream.close()
    until(lambda: f"job_left job_id={job_id}" in gateway.log, "the gateway saw it go")
    assert find_job(redis, job_id).state == "started"
    held.go.set()
    until(lambda: find_job(redis, job_id).state == "finished", "the job is answered")


@KINDS
def test_a_request_sent_again_with_its_key_is_one_job(
    client: OpenAI, echo: EchoWorker, kind: str
) -> None:
    create, request = creator(client, kind)
    first, again = (
        create(**request, extra_headers={"idempotency-key": "order-1"}) for _ in range(2)
    )
    assert first.id == again.id
    assert first.choices == again.choices
    other = create(**request, extra_headers={"idempotency-key": "order-2"})
    assert other.id != first.id
    assert [job.job_id for job in echo.jobs] == [
        answer.id.rpartition("-")[2] for answer in (first, other)
    ]


@KINDS
def test_a_full_queue_says_when_to_come_back_and_how_full_it_is(
    client: OpenAI, held: EchoWorker, kind: str
) -> None:
    create, request = creator(client, kind)
    with create(**request, stream=True) as running:
        next(running)
        until(lambda: bool(held.jobs), "one job runs")
        with create(**request, stream=True), pytest.raises(openai.InternalServerError) as caught:
            create(**request)
    refusal = caught.value
    assert refusal.status_code == 503
    assert int(refusal.response.headers["retry-after"]) >= 1
    assert refusal.response.json()["error"]["details"] == {"unit": "jobs", "depth": 1, "limit": 1}


def test_a_retry_of_the_client_itself_gets_through_once_there_is_room(
    gateway: GatewayProcess, held: EchoWorker
) -> None:
    with (
        openai_client(gateway) as client,
        client.chat.completions.create(**CHAT, stream=True) as running,
    ):
        next(running)
        until(lambda: bool(held.jobs), "one job runs")
        with client.chat.completions.create(**CHAT, stream=True):
            release = threading.Timer(0.1, held.go.set)
            release.start()
            answer = client.with_options(max_retries=5).chat.completions.create(**CHAT)
            release.join()
    assert answer.choices[0].message.content == TEXT
