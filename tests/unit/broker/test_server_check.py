"""What is said of servers, by what they say of themselves. No server here."""

import re
from dataclasses import replace

import pytest

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.server_check import Finding, findings, refuse_unfit, summary
from mixfleet_broker.server_facts import ServerFacts

GOOD = ServerFacts(
    version="7.2.4",
    mode="standalone",
    is_replica=False,
    num_replicas=0,
    min_replicas_to_write=0,
    maxmemory_bytes=0,
    maxmemory_policy="noeviction",
    used_bytes=1 << 20,
    appendonly=True,
    appendfsync="everysec",
    save="",
)


def found(topic: str, **facts: object) -> Finding:
    """The one finding on ``topic``, where the server differs from a good one by ``facts``."""
    (finding,) = [f for f in findings(replace(GOOD, **facts)) if f.topic == topic]  # type: ignore[arg-type]
    return finding


def test_a_good_server_gets_one_line_on_each_thing_looked_at() -> None:
    assert [(finding.topic, finding.level) for finding in findings(GOOD)] == [
        ("version", "ok"),
        ("memory", "ok"),
        ("persistence", "ok"),
    ]
    refuse_unfit(findings(GOOD), "redis://h")


@pytest.mark.parametrize(
    ("facts", "topic", "level", "text"),
    [
        ({"version": "6.0.16"}, "version", "refuse", "Redis 6.0.16 is too old: install Redis 6.2"),
        ({"version": "6.2.14"}, "version", "warning", "Redis 6.2.14 cannot drain"),
        ({"version": "7.0.0"}, "version", "ok", "Redis 7.0.0"),
        ({"version": "10.0"}, "version", "ok", "Redis 10.0"),
        ({"version": "7"}, "version", "ok", "Redis 7"),
        ({"version": "9.1.2", "product": "Valkey"}, "version", "ok", "Valkey 9.1.2"),
        ({"version": None}, "version", "warning", "version not known"),
        ({"mode": "cluster"}, "mode", "refuse", "cluster mode.*one Redis per pool"),
        ({"mode": "sentinel"}, "mode", "refuse", "redis\\+sentinel://HOST:PORT/NAME"),
        (
            {"is_replica": True, "primary": "10.0.0.1:6379"},
            "replication",
            "refuse",
            "a replica of 10.0.0.1:6379 and takes no writes",
        ),
        ({"is_replica": True}, "replication", "refuse", "a replica and takes no writes"),
        (
            {"num_replicas": 1},
            "replication",
            "warning",
            "1 replica, .* Set min-replicas-to-write 1",
        ),
        (
            {"num_replicas": 2, "min_replicas_to_write": 1},
            "replication",
            "ok",
            "2 replicas; a failover loses",
        ),
        (
            {"maxmemory_bytes": 100 << 20, "maxmemory_policy": "allkeys-lru"},
            "memory",
            "refuse",
            "maxmemory 100 MiB with maxmemory-policy allkeys-lru: .*Set maxmemory-policy noev",
        ),
        (
            {"maxmemory_bytes": 1 << 30, "maxmemory_policy": "volatile-ttl"},
            "memory",
            "refuse",
            "volatile-ttl",
        ),
        ({"maxmemory_policy": "allkeys-lfu"}, "memory", "warning", "no maxmemory, but"),
        ({"maxmemory_bytes": 4 << 30}, "memory", "ok", "maxmemory 4096 MiB, noeviction, 1.0 MiB"),
        ({"appendonly": False}, "persistence", "warning", "all jobs and answers are lost"),
        (
            {"appendonly": False, "save": "3600 1"},
            "persistence",
            "warning",
            "after its last snapshot.*Set appendonly yes",
        ),
        ({"appendfsync": "always"}, "persistence", "ok", "no acknowledged job is lost"),
        ({"appendfsync": "everysec"}, "persistence", "ok", "up to 2 seconds when the machine"),
        ({"appendfsync": "no"}, "persistence", "warning", "30 seconds.*Set appendfsync everysec"),
        ({"appendfsync": None}, "persistence", "ok", "^appendonly yes$"),
        ({"append_fails": True}, "persistence", "warning", "the disk may be full"),
        ({"appendfsync": None}, "unknown", "ok", "ask: appendfsync .should be everysec.. Allow"),
        (
            {"appendfsync": None, "appendonly": None, "maxmemory_policy": None},
            "unknown",
            "warning",
            "ask: maxmemory-policy .should be noeviction., appendonly .*Allow \\+info",
        ),
    ],
)
def test_what_a_server_says_is_judged_with_the_fix(
    facts: dict[str, object], topic: str, level: str, text: str
) -> None:
    finding = found(topic, **facts)
    assert finding.level == level
    assert re.search(text, finding.text)


def test_a_server_that_tells_nothing_is_not_called_good() -> None:
    levels = {finding.topic: finding.level for finding in findings(ServerFacts())}
    assert levels == {"version": "warning", "unknown": "warning"}


def test_refusals_are_one_error_without_the_password() -> None:
    bad = findings(replace(GOOD, mode="cluster", version="5.0.7"))
    with pytest.raises(ConfigError) as caught:
        refuse_unfit(bad, "redis://:hunter2@h:1/0")
    text = str(caught.value)
    assert text.startswith("redis=redis://:***@h:1/0: Redis 5.0.7 is too old")
    assert "; it runs in cluster mode" in text
    assert "hunter2" not in text


def test_the_summary_names_the_product_and_counts_the_warnings() -> None:
    assert summary(findings(GOOD)) == "Redis 7.2.4"
    one = findings(replace(GOOD, appendonly=False))
    assert summary(one) == "Redis 7.2.4, 1 warning: see `mixfleet doctor`"
    two = findings(replace(GOOD, appendonly=False, num_replicas=1))
    assert summary(two) == "Redis 7.2.4, 2 warnings: see `mixfleet doctor`"
