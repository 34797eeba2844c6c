"""A real Redis for each test, a gateway on it, and workers that are told what to say."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.hand_worker import HandWorker
from support.openai_client import openai_client
from support.redis_server import redis as redis
from support.redis_server import redis_server as redis_server
from support.redis_server import redis_url as redis_url


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


@pytest.fixture
def hand(redis_url: str) -> Iterator[HandWorker]:
    with HandWorker(redis_url) as hand:
        yield hand


@pytest.fixture
def echo(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url) as worker:
        yield worker
