"""A real server that answers but cannot serve now is waited for, like one that is away."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from mixfleet_broker.connection import connect
from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.errors import BrokerError, BrokerUnavailableError
from mixfleet_broker.server_binary import find_server
from support.meanwhile import meanwhile
from support.redis_server import RedisServer
from support.worker_process import until

NOWHERE = ("127.0.0.1", 1)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def operator(server: RedisServer) -> Iterator[Redis]:
    """Does with the server what an operator or a Sentinel does; all is well again at the end."""
    with server.client() as client:
        yield client
        client.execute_command("REPLICAOF", "NO", "ONE")
        client.config_set("min-replicas-to-write", 0)
        client.config_set("replica-serve-stale-data", "yes")
        client.flushall()


def num_errors(operator: Redis, code: str) -> int:
    """How often the server has replied so."""
    counted = re.search(r"\d+", str(operator.info("errorstats").get(f"errorstat_{code}", 0)))
    return int(counted[0]) if counted else 0


def make_replica(operator: Redis) -> None:
    operator.execute_command("REPLICAOF", *NOWHERE)


def make_primary(operator: Redis) -> None:
    operator.execute_command("REPLICAOF", "NO", "ONE")


def ask_for_a_replica(operator: Redis) -> None:
    operator.config_set("min-replicas-to-write", 1)


def ask_for_none(operator: Redis) -> None:
    operator.config_set("min-replicas-to-write", 0)


def make_stale_replica(operator: Redis) -> None:
    operator.config_set("replica-serve-stale-data", "no")
    make_replica(operator)


@pytest.mark.parametrize(
    ("break_it", "mend_it", "code"),
    [
        (make_replica, make_primary, "READONLY"),
        (make_stale_replica, make_primary, "MASTERDOWN"),
        (ask_for_a_replica, ask_for_none, "NOREPLICAS"),
    ],
)
@pytest.mark.parametrize("how", ["command", "script", "pipeline", "transaction"])
def test_a_write_waits_until_the_server_takes_it(
    server: RedisServer,
    operator: Redis,
    break_it: Callable[[Redis], None],
    mend_it: Callable[[Redis], None],
    code: str,
    how: str,
) -> None:
    with connect(server.url, patience_s=None) as redis:
        writes: dict[str, Callable[[], object]] = {
            "command": lambda: redis.set("a", 1),
            "script": lambda: redis.eval("return redis.call('set', KEYS[1], 1)", 1, "a"),
            "pipeline": lambda: redis.pipeline(transaction=False).set("a", 1).execute(),
            "transaction": lambda: redis.pipeline(transaction=True).set("a", 1).execute(),
        }
        before = num_errors(operator, code)
        break_it(operator)
        with meanwhile(writes[how]) as results:
            until(lambda: num_errors(operator, code) > before, f"the server replies {code}")
            mend_it(operator)
        assert not isinstance(results[0], Exception), results
        assert redis.get("a") == b"1"


def test_a_read_that_blocks_goes_on_after_its_server_was_a_replica_for_a_while(
    server: RedisServer, operator: Redis
) -> None:
    with connect(server.url, patience_s=None, max_block_s=20) as redis:
        with meanwhile(lambda: redis.blpop(["bell"], timeout=20)) as results:
            until(lambda: bool(operator.info("clients")["blocked_clients"]), "it blocks")
            make_replica(operator)
            until(lambda: not operator.info("clients")["blocked_clients"], "it is thrown out")
            make_primary(operator)
            operator.rpush("bell", "ring")
        assert results == [(b"bell", b"ring")]


def test_a_client_in_a_hurry_hears_why_a_replica_does_not_serve_it(
    server: RedisServer, operator: Redis
) -> None:
    make_replica(operator)
    with connect(server.url, patience_s=0.1) as redis:
        assert redis.get("a") is None
        with pytest.raises(BrokerUnavailableError, match=r"cannot serve now: .*read only replica"):
            redis.set("a", 1)


class NoticedPauses(threading.Event):
    """A stop event that notes when somebody waits for it, as a client does between its tries."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for.set()
        return super().wait(timeout)


def test_a_server_that_is_busy_with_a_script_is_waited_for(
    server: RedisServer, operator: Redis
) -> None:
    operator.config_set("lua-time-limit", 10)
    pauses = NoticedPauses()
    with (
        server.client() as second,
        connect(server.url, patience_s=None, stop=pauses) as redis,
        meanwhile(lambda: operator.eval("while true do end", 0)),
    ):
        until(lambda: is_busy(second), "the script runs")
        with meanwhile(redis.ping) as results:
            until(pauses.is_waited_for.is_set, "the client waits")
            assert results == []
            second.script_kill()
        assert results == [True]


def is_busy(client: Redis) -> bool:
    try:
        client.ping()
    except Exception as error:
        return "BUSY" in str(error)
    return False


@pytest.mark.slow
def test_a_server_that_loads_its_data_for_a_second_is_waited_for(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data_dir = tmp_path_factory.mktemp("d")
    with EmbeddedRedis(data_dir) as server, connect(server.url) as redis:
        url = server.url
        pipeline = redis.pipeline(transaction=False)
        for i in range(6000):
            pipeline.set("key", i)
        pipeline.execute()
    slow = tmp_path / "slow-server"
    slow.write_text(f'#!/bin/sh\nexec {find_server()} "$@" --key-load-delay 200\n')
    slow.chmod(0o700)

    def last_key() -> object:
        with connect(url, patience_s=None) as patient:
            return patient.get("key")

    begun = time.monotonic()
    with meanwhile(last_key) as results, EmbeddedRedis(data_dir, program=slow):
        until(lambda: bool(results), "the client has its answer")
    assert results == [b"5999"]
    assert time.monotonic() - begun > 0.8, "it did not take long"


def test_a_user_who_may_not_ping_is_told_so(server: RedisServer, operator: Redis) -> None:
    operator.execute_command("ACL", "SETUSER", "mute", "on", ">p", "-@all")
    with pytest.raises(BrokerError, match=r"Redis refuses: .*permissions.*ping"):
        connect(server.url.replace("unix://", "unix://mute:p@"), patience_s=None)


def test_a_database_that_is_not_there_is_named(server: RedisServer) -> None:
    with pytest.raises(BrokerError, match="Redis refuses: DB index is out of range"):
        connect(f"{server.url}?db=99", patience_s=None)
