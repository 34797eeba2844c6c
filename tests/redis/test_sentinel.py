"""Real failovers: a primary, a replica and Sentinels, and clients that nobody restarts."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from mixfleet_broker.connection import connect, plain_redis_url
from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.server_binary import find_server
from support.meanwhile import meanwhile
from support.redis_server import RedisServer
from support.sentinel import SERVICE, Node, SentinelCluster, free_port
from support.worker_process import until

FAILOVER_LIMIT_S = 15.0
"""How patient a client is here: two seconds are usual, a busy machine takes longer."""


@pytest.fixture
def cluster() -> Iterator[SentinelCluster]:
    """For a test that changes it."""
    with SentinelCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quiet_cluster() -> Iterator[SentinelCluster]:
    """For tests that only look, with two Sentinels and passwords."""
    with SentinelCluster(num_sentinels=2, password="hunter2", sentinel_password="opensesame") as c:
        yield c


def hold_connections(redis: Redis, count: int) -> None:
    """Let the client have ``count`` idle connections to the primary of now."""
    for client in [redis.client() for _ in range(count)]:  # each takes a connection of its own
        client.close()


def write_before(cluster: SentinelCluster, redis: Redis) -> None:
    """Write a key that no failover can lose any more."""
    redis.set("before", 1)
    until(lambda: keys_of(cluster.replica) == {"before"}, "the replica has it")


def keys_of(node: Node) -> set[str]:
    with node.client() as client:
        return set(client.keys())


@pytest.mark.slow
def test_a_client_goes_on_when_the_primary_is_killed(cluster: SentinelCluster) -> None:
    with connect(cluster.url, patience_s=FAILOVER_LIMIT_S) as redis:
        write_before(cluster, redis)
        hold_connections(redis, 3)
        old = cluster.kill_primary()
        redis.set("command", 1)
        redis.eval("return redis.call('set', KEYS[1], 1)", 1, "script")
        redis.pipeline(transaction=True).set("transaction", 1).execute()
    new = cluster.await_failover(old)
    assert keys_of(new) == {"before", "command", "script", "transaction"}


@pytest.mark.slow
def test_a_worker_that_waits_for_the_bell_hears_it_from_the_new_primary(
    cluster: SentinelCluster,
) -> None:
    with (
        connect(cluster.url, patience_s=None, max_block_s=30) as worker,
        meanwhile(lambda: worker.blpop(["bell"], timeout=30)) as results,
    ):
        until(lambda: num_blocked(cluster.primary) == 1, "it waits at the old primary")
        new = cluster.await_failover(cluster.kill_primary())
        until(lambda: num_blocked(new) == 1, "it waits at the new primary")
        assert results == []
        new.ask("RPUSH", "bell", "ring")
    assert results == [(b"bell", b"ring")]


def num_blocked(node: Node) -> int:
    with node.client() as client:
        return int(client.info("clients")["blocked_clients"])


@pytest.mark.slow
def test_an_old_primary_that_wakes_up_is_not_written_to(cluster: SentinelCluster) -> None:
    url = f"{cluster.url}?socket_timeout=0.5"
    with connect(url, patience_s=FAILOVER_LIMIT_S, max_block_s=0.1) as redis:
        write_before(cluster, redis)
        hold_connections(redis, 2)
        busy = [redis.client() for _ in range(2)]  # each keeps a connection of its own
        old = cluster.pause_primary()
        redis.set("meanwhile", 1)
        new = cluster.await_failover(old)
        # For a moment the old one takes itself for the primary, and our connections to it are open.
        old.signal(signal.SIGCONT)
        for number, client in enumerate([redis, *busy]):
            client.set(f"after-{number}", 1)
        until(lambda: old.role() == "slave", "the old primary is a replica")
        redis.set("at last", 1)
    written = {"before", "meanwhile", "after-0", "after-1", "after-2", "at last"}
    assert keys_of(new) == written


@pytest.mark.slow
def test_a_sentinel_that_takes_a_replica_for_the_primary_is_not_believed(tmp_path: Path) -> None:
    port = free_port()
    stale = Node(find_server(), tmp_path, "sentinel")
    try:
        with RedisServer("--port", str(port), "--replicaof", "127.0.0.1 1"):
            stale.start([f"sentinel monitor {SERVICE} 127.0.0.1 {port} 1"], "--sentinel")
            with pytest.raises(BrokerUnavailableError, match="is a replica, not yet the primary"):
                connect(f"redis+sentinel://127.0.0.1:{stale.port}/{SERVICE}", patience_s=0.2)
    finally:
        stale.kill()


@pytest.mark.slow
def test_a_worker_may_start_while_the_primary_is_down(cluster: SentinelCluster) -> None:
    old = cluster.kill_primary()
    with connect(cluster.url, patience_s=None) as redis:
        assert redis.set("a", 1)
    assert keys_of(cluster.await_failover(old)) == {"a"}


@pytest.mark.slow
def test_what_a_cut_off_primary_acknowledges_is_lost_at_the_failover(
    cluster: SentinelCluster,
) -> None:
    with connect(cluster.url) as redis:
        write_before(cluster, redis)
        cluster.cut_replica_link()
        redis.set("after", 1)
    new = cluster.await_failover(cluster.kill_primary())
    assert keys_of(new) == {"before"}


@pytest.mark.slow
def test_a_primary_that_must_have_a_replica_acknowledges_nothing_that_would_be_lost() -> None:
    options = ("min-replicas-to-write 1", "min-replicas-max-lag 1")
    with SentinelCluster(*options) as cluster, connect(cluster.url, patience_s=0.3) as redis:
        redis.set("before", 1)
        cluster.cut_replica_link()
        with pytest.raises(BrokerUnavailableError, match="Not enough good replicas to write"):
            redis.set("after", 1)


@pytest.mark.slow
def test_sentinels_that_are_away_are_passed_over(quiet_cluster: SentinelCluster) -> None:
    dead = f"127.0.0.1:{free_port()}"
    first, second = (f"127.0.0.1:{node.port}" for node in quiet_cluster.sentinels)
    url = quiet_cluster.url.replace(f"{first},{second}", f"{dead},{second}")
    assert url != quiet_cluster.url
    with connect(url) as redis:
        assert redis.ping()


@pytest.mark.slow
def test_a_sentinels_user_needs_two_commands(quiet_cluster: SentinelCluster) -> None:
    rules = ("on", ">pw", "-@all", "+ping", "+sentinel|master")
    for node in quiet_cluster.sentinels:
        node.ask("ACL", "SETUSER", "fleet", *rules)
    url = quiet_cluster.url.replace("opensesame", "pw&sentinel_username=fleet")
    with connect(url) as redis:
        assert redis.ping()


@pytest.mark.slow
def test_a_program_that_knows_no_sentinels_is_sent_to_the_primary(
    quiet_cluster: SentinelCluster,
) -> None:
    url = plain_redis_url(quiet_cluster.url)
    assert url == f"redis://:hunter2@127.0.0.1:{quiet_cluster.primary.port}/0"
    with Redis.from_url(url) as redis:
        assert redis.ping()


@pytest.mark.slow
def test_a_name_that_no_sentinel_knows_is_an_error_with_what_each_of_them_said(
    quiet_cluster: SentinelCluster,
) -> None:
    begun = time.monotonic()
    with pytest.raises(BrokerUnavailableError) as caught:
        connect(quiet_cluster.url.replace(SERVICE, "other"), patience_s=0.3)
    assert time.monotonic() - begun < 2
    text = str(caught.value)
    for node in quiet_cluster.sentinels:
        assert f"127.0.0.1:{node.port}: No such master with that name" in text
    assert "hunter2" not in text
    assert "opensesame" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "who"),
    [
        ("opensesame", "open", "Sentinel 127.0.0.1"),
        ("?sentinel_password=opensesame", "", "Sentinel 127.0.0.1"),
        ("hunter2", "hunter3", ""),
    ],
)
def test_a_wrong_password_is_an_error_at_once_and_says_whose(
    quiet_cluster: SentinelCluster, right: str, wrong: str, who: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match="refuses the user name or password") as caught:
        connect(quiet_cluster.url.replace(right, wrong), patience_s=None)
    assert time.monotonic() - begun < 2
    assert who in str(caught.value)
    assert "opensesame" not in str(caught.value)
