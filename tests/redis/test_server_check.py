"""Real servers with settings that are good or bad for a fleet, and users who may not ask."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixfleet_broker.connection import connect
from mixfleet_broker.errors import BrokerUnavailableError, ConfigError
from mixfleet_broker.server_binary import find_server, server_version
from mixfleet_broker.server_check import Finding, check_server
from mixfleet_worker.broker_check import check_broker
from support.redis_server import RedisServer
from support.sentinel import SentinelCluster


def findings_of(url: str) -> dict[str, Finding]:
    with connect(url) as redis:
        return {finding.topic: finding for finding in check_server(redis)}


@contextmanager
def server_with_user(rules: str, *options: str) -> Iterator[str]:
    """The URL of a server for a user with these rights, who may do nothing else."""
    with RedisServer(*options) as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", *rules.split())
        yield server.url.replace("unix://", "unix://limited:pw@")


@pytest.mark.parametrize(
    ("options", "topic", "level", "text"),
    [
        (("--appendonly", "no"), "persistence", "warning", "appendonly no: all jobs and answers"),
        (("--save", "3600 1"), "persistence", "warning", "appendonly no: when Redis dies all is"),
        (("--appendonly", "yes"), "persistence", "ok", "appendfsync everysec"),
        (
            ("--appendonly", "yes", "--appendfsync", "always"),
            "persistence",
            "ok",
            "appendfsync always",
        ),
        (("--appendonly", "yes", "--appendfsync", "no"), "persistence", "warning", "30 seconds"),
        (("--maxmemory", "50mb"), "memory", "ok", "maxmemory 50 MiB, noeviction"),
        (("--maxmemory-policy", "allkeys-lru"), "memory", "warning", "no maxmemory, but"),
        (
            ("--maxmemory", "50mb", "--maxmemory-policy", "volatile-lru"),
            "memory",
            "refuse",
            "maxmemory 50 MiB with maxmemory-policy volatile-lru",
        ),
        (("--cluster-enabled", "yes"), "mode", "refuse", "cluster mode"),
        (("--replicaof", "127.0.0.1 1"), "replication", "refuse", "a replica of 127.0.0.1:1"),
    ],
)
def test_the_settings_of_a_server_are_found_and_judged(
    options: tuple[str, ...], topic: str, level: str, text: str
) -> None:
    with RedisServer(*options) as server:
        finding = findings_of(server.url)[topic]
    assert finding.level == level
    assert text in finding.text


def test_the_server_is_named_as_what_it_is() -> None:
    version = server_version(find_server())
    assert version is not None
    product = "Valkey" if "valkey" in find_server().name else "Redis"
    with RedisServer() as server:
        finding = findings_of(server.url)["version"]
    assert finding.level == "ok"
    assert finding.text.startswith(f"{product} {version[0]}.{version[1]}.")


@pytest.mark.slow
def test_a_primary_with_a_replica_is_told_what_a_failover_can_lose() -> None:
    with SentinelCluster() as cluster:
        finding = findings_of(cluster.url)["replication"]
        assert (finding.level, finding.text[:10]) == ("warning", "1 replica,")
        cluster.primary.ask("CONFIG", "SET", "min-replicas-to-write", 1)
        assert findings_of(cluster.url)["replication"].level == "ok"


@pytest.mark.slow
def test_a_sentinel_in_the_place_of_a_redis_is_told_apart() -> None:
    with SentinelCluster() as cluster:
        found = findings_of(f"redis://127.0.0.1:{cluster.sentinels[0].port}")
    assert found["mode"].level == "refuse"
    assert "redis+sentinel://" in found["mode"].text


def test_a_user_without_info_and_config_still_learns_version_mode_and_role() -> None:
    bad = ("--replicaof", "127.0.0.1 1")
    with server_with_user("+ping", *bad) as url:
        found = findings_of(url)
    assert found["version"].level == "ok"
    assert found["replication"].level == "refuse"
    assert found["unknown"].level == "warning"
    for name in ("maxmemory-policy (should be noeviction)", "appendonly", "appendfsync"):
        assert name in found["unknown"].text
    with server_with_user("+ping", "--cluster-enabled", "yes") as url:
        assert findings_of(url)["mode"].level == "refuse"


def test_a_user_with_info_alone_learns_all_that_is_grave() -> None:
    with server_with_user("+ping +info", "--appendonly", "yes") as url:
        found = findings_of(url)
    assert found["memory"].level == "ok"
    assert found["persistence"].text == "appendonly yes"
    assert found["unknown"].level == "ok"
    assert "appendfsync (should be everysec). Allow" in found["unknown"].text


def test_a_user_with_config_alone_learns_all_that_is_grave() -> None:
    limit = ("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    with server_with_user("+ping +config|get", *limit) as url:
        found = findings_of(url)
    assert found["memory"].level == "refuse"
    assert found["persistence"].level == "warning"
    assert "unknown" not in found


def test_commands_that_were_renamed_are_as_good_as_forbidden() -> None:
    renamed = ("--rename-command", "INFO", "HIDDEN1", "--rename-command", "CONFIG", "HIDDEN2")
    with RedisServer(*renamed) as server:
        found = findings_of(server.url)
    assert found["version"].level == "ok"
    assert found["unknown"].level == "warning"


def test_a_worker_logs_each_finding_once_at_its_start(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer("--appendonly", "no") as server, caplog.at_level(logging.INFO):
        check_broker(server.url, patience_s=5)
    lines = {(record.levelname, record.message.split(":")[0]) for record in caplog.records}
    assert lines == {
        ("INFO", "broker version"),
        ("INFO", "broker memory"),
        ("WARNING", "broker persistence"),
    }


def test_a_worker_does_not_start_on_a_server_that_would_drop_jobs() -> None:
    bad = ("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    with RedisServer(*bad) as server, pytest.raises(ConfigError) as caught:
        check_broker(server.url, patience_s=5)
    assert str(caught.value).startswith(f"redis={server.url}: maxmemory 50 MiB with")


def test_a_worker_waits_for_its_redis_only_so_long() -> None:
    with pytest.raises(BrokerUnavailableError):
        check_broker("redis://127.0.0.1:1", patience_s=0.1)
