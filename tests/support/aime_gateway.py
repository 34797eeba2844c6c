"""A real gateway before AIME's clients, and workers behind it, as fixtures for tests to import."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis

from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from support.aime_client import AimeClient, AimeError
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path) as process:
        yield process


@pytest.fixture
def worker(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url) as echo:
        yield echo


@pytest.fixture
def held(redis_url: str) -> Iterator[EchoWorker]:
    """A worker that says three tokens and waits to be let go."""
    with EchoWorker(redis_url, hold_after=3) as echo:
        yield echo


@pytest.fixture
def registered(redis: Redis) -> Iterator[JobQueue]:
    """A queue whose worker is known and claims nothing: the test does that."""
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=1, context_length=8192, started_at=0.0
    )
    registration = Registration(redis, record, lease_s=15.0)
    registration.beat(state="idle", in_flight=0)
    yield JobQueue(redis, MODEL)
    registration.deregister()


def client(gateway: GatewayProcess, key: str | None = None) -> AimeClient:
    return AimeClient(gateway.url, MODEL, key)


def send(
    method: str, gateway: GatewayProcess, path: str, timeout: float = 20.0, **body: Any
) -> requests.Response:
    """Ask for something that AIME's clients never ask for."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, gateway.url + path, timeout=timeout, **body)


def refused(status: int, call: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The body of an error, which must have AIME's form."""
    with pytest.raises(AimeError) as caught:
        call(*args, **kwargs)
    body = caught.value.body
    assert caught.value.status == status, body
    assert body["success"] is False
    assert isinstance(body["error"], str)
    return body
