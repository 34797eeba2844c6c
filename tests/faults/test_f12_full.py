"""F12: no room: a full Redis, a full queue, a tenant at its limit. Refused whole, and why."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import BrokerFullError, QueueFullError
from mixfleet_broker.errors import TenantQueueFullError
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.settings import resolve
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    NUM_TOKENS,
    SLOW_STEP,
    Asked,
    check_invariants,
    connect_client,
)
from support.redis_server import RedisServer
from support.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

QUESTIONS = [f"question {number}" for number in range(6)]
NUM_JOBS = 3
JOB_TOKENS = NUM_TOKENS + 3
"""A question of ten letters is about three tokens."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server whose memory may be filled."""
    with RedisServer() as server:
        yield server


def fill(redis: Redis) -> None:
    """Let the server have as much memory as it uses now, and not a byte more."""
    redis.config_set("maxmemory", redis.info("memory")["used_memory"])


def everything(redis: Redis) -> dict[bytes, bytes | None]:
    """Every key with its content."""
    return {name: redis.dump(name) for name in redis.scan_iter(count=1000)}


def test_a_full_redis_refuses_jobs_whole_and_still_drains(
    server: RedisServer, tmp_path: Path
) -> None:
    with server.client() as redis, connect_client(server.url) as client:
        asked = Asked(client, *QUESTIONS)
        fill(redis)
        before = everything(redis)
        with pytest.raises(BrokerFullError):
            client.chat("one too many")
        assert everything(redis) == before
        # It starts, takes what waits and ends it, though all of that takes memory too.
        with WorkerProcess(server.url, "w1", tmp_path, *FAST_STEP, "--max-batch-size", "2"):
            asked.read_all()
            with pytest.raises(BrokerFullError):
                client.chat("one too many")
            check_invariants(redis, asked.jobs)
            redis.config_set("maxmemory", 0)
            later = Asked(client, "a later question")
            later.read_all()
            check_invariants(redis, asked.jobs | later.jobs)


def test_jobs_that_run_while_redis_becomes_full_are_finished(
    server: RedisServer, tmp_path: Path
) -> None:
    with (
        server.client() as redis,
        connect_client(server.url) as client,
        WorkerProcess(server.url, "w1", tmp_path, *SLOW_STEP),
    ):
        asked = Asked(client, *QUESTIONS)
        next(iter(asked.streams[0]))
        fill(redis)
        results = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("w1",)}


def limited(url: str, limit: str, number: int) -> Client:
    return Client(settings=resolve({"redis": url, "model": MODEL, "tenant": "a", limit: number}))


@pytest.mark.parametrize(
    ("limit", "number", "kind", "unit"),
    [
        ("queue_limit", NUM_JOBS, QueueFullError, "jobs"),
        ("queue_token_limit", NUM_JOBS * JOB_TOKENS, QueueFullError, "tokens"),
        ("tenant_queue_limit", NUM_JOBS, TenantQueueFullError, "jobs"),
        ("tenant_token_limit", NUM_JOBS * JOB_TOKENS, TenantQueueFullError, "tokens"),
    ],
)
def test_a_full_queue_says_of_what_it_is_full_and_writes_nothing(
    limit: str, number: int, kind: type[QueueFullError], unit: str, redis_url: str, redis: Redis
) -> None:
    with limited(redis_url, limit, number) as client:
        Asked(client, *QUESTIONS[:NUM_JOBS])
        before = everything(redis)
        with pytest.raises(kind) as refusal:
            Asked(client, "one too many")
        assert everything(redis) == before
    error = refusal.value
    assert (type(error), error.unit, error.depth, error.limit) == (kind, unit, number, number)
    assert error.retryable
    assert JobQueue(redis, MODEL).depth() == NUM_JOBS
