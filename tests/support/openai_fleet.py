"""A real tiny model behind a real gateway, once for a file of tests and OpenAI's own client."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from support.gateway import GatewayProcess
from support.openai_client import openai_client
from support.redis_server import RedisServer
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess

MODEL = "tiny"
CONTEXT_LENGTH = 256
END_ID = 2
"""Of the token that ends an answer."""


@contextmanager
def tiny_fleet(folder: Path) -> Iterator[GatewayProcess]:
    """Run a server, a worker of the tiny model and a gateway."""
    checkpoint = write_hf_checkpoint(folder / MODEL, tiny_config(vocab_size=512))
    write_byte_level_json(checkpoint)
    options = ("--context-length", str(CONTEXT_LENGTH), "--device", "cpu", "--kv-cache-gib", "0.01")
    with (
        RedisServer() as server,
        WorkerProcess(server.url, "w1", folder, "--model-path", checkpoint, *options),
        GatewayProcess(server.url, folder) as gateway,
    ):
        yield gateway


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """The gateway of a tiny fleet."""
    with tiny_fleet(tmp_path_factory.mktemp("fleet")) as gateway:
        yield gateway


@pytest.fixture
def client(fleet: GatewayProcess) -> Iterator[OpenAI]:
    """A client of it."""
    with openai_client(fleet) as client:
        yield client
