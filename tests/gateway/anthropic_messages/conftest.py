"""A real gateway and a worker whose answers each test scripts."""

from collections.abc import Iterator

import httpx2
import pytest
from anthropic import Anthropic

from support.answer_worker import AnswerWorker
from support.anthropic_requests import MODEL
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.redis_server import RedisServer
from support.worker_process import until


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared_worker(server: RedisServer) -> Iterator[AnswerWorker]:
    with AnswerWorker(server.url, MODEL) as worker:
        yield worker


@pytest.fixture
def worker(shared_worker: AnswerWorker) -> AnswerWorker:
    shared_worker.script.clear()
    shared_worker.jobs.clear()
    return shared_worker


@pytest.fixture(scope="module")
def url(
    server: RedisServer, shared_worker: AnswerWorker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    del shared_worker  # its model is known before the gateway looks
    directory = tmp_path_factory.mktemp("gateway")
    with GatewayProcess(server.url, directory, "--keep-alive-s", "0.1") as gateway:
        yield gateway.url


@pytest.fixture
def client(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key="none is needed", max_retries=0) as client:
        yield client


@pytest.fixture
def held(server: RedisServer, url: str) -> Iterator[EchoWorker]:
    """Stops after two letters of the question, with a model of its own."""
    with EchoWorker(server.url, "held", worker_id="held", hold_after=2) as held:
        until(lambda: httpx2.get(f"{url}/v1/models/held").status_code == 200, "it is known")
        yield held
