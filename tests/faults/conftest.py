"""Real processes, real servers, real faults: none of these tests is quick."""

from collections.abc import Iterator

import pytest

from mixfleet import Client
from support.fault_fleet import connect_client
from support.redis_server import redis as redis
from support.redis_server import redis_server as redis_server
from support.redis_server import redis_url as redis_url


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    """A client of an empty server."""
    with connect_client(redis_url) as client:
        yield client
