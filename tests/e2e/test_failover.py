"""A whole fleet through the death of its primary: nobody restarts anything."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet import Client
from mixfleet_broker.connection import connect
from support.sentinel import SentinelCluster
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTION = "a story"
LEASE_S = "5"
"""Longer than a failover takes, so that the worker keeps its job."""
WORKER = ("--simulated", "--simulated-step-s", "0.1", "--lease-s", LEASE_S)


@pytest.fixture
def cluster() -> Iterator[SentinelCluster]:
    with SentinelCluster() as cluster:
        yield cluster


def test_an_answer_goes_on_at_the_new_primary_without_a_gap_or_a_repeat(
    cluster: SentinelCluster, tmp_path: Path
) -> None:
    with (
        WorkerProcess(cluster.url, "w", tmp_path, *WORKER) as worker,
        Client(cluster.url, model="simulated") as client,
    ):
        stream = client.chat(QUESTION, temperature=0.0, seed=1)
        pieces = iter(stream)
        shown = "".join(next(pieces) for _ in range(5))
        new = cluster.await_failover(cluster.kill_primary())
        result = stream.result()
        assert worker.process.poll() is None
        assert result.text.startswith(shown)
        with connect(f"redis://127.0.0.1:{new.port}") as redis:
            until(lambda: redis.exists("mixfleet:workers") == 1, "the worker is registered there")
        second = client.chat(QUESTION, temperature=0.0, seed=1).result()
    assert (result.text, result.usage) == (second.text, second.usage)
    assert result.worker_ids == ("w",)
