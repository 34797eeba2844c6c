"""F9: the primary dies and a replica takes its place, with all of its data or with some."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet import Client, RunStarted
from mixfleet.errors import MixfleetError, NotDurableError, UnknownJobError
from mixfleet_broker.connection import connect
from mixfleet_broker.keys import CHANNEL, JOB
from mixfleet_broker.settings import resolve
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    SLOW_STEP,
    Asked,
    check_invariants,
    connect_client,
)
from support.sentinel import SentinelCluster
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTIONS = [f"question {number}" for number in range(6)]
LEASE_S = "5"
"""Longer than a failover takes."""


@pytest.fixture
def cluster() -> Iterator[SentinelCluster]:
    with SentinelCluster() as cluster:
        yield cluster


def await_replica(cluster: SentinelCluster, *names: str) -> None:
    """Wait until the replica has these keys."""
    with cluster.replica.client() as redis:
        until(lambda: redis.exists(*names) == len(names), "the replica has it all")


def test_a_failover_to_a_replica_that_has_everything_loses_no_job_and_no_run(
    cluster: SentinelCluster, tmp_path: Path
) -> None:
    with (
        connect_client(cluster.url) as client,
        WorkerProcess(
            cluster.url, "w1", tmp_path, *SLOW_STEP, "--lease-s", LEASE_S, "--max-batch-size", "3"
        ),
    ):
        asked = Asked(client, *QUESTIONS, max_tokens=60)
        next(iter(asked.streams[0]))
        await_replica(cluster, *map(JOB, asked.jobs), CHANNEL(asked.streams[0].job_id))
        cluster.await_failover(cluster.kill_primary())
        results = asked.read_all()
        with connect(cluster.url) as redis:
            check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("w1",)}


def test_the_tokens_that_the_replica_had_not_heard_of_are_said_again(
    cluster: SentinelCluster, tmp_path: Path
) -> None:
    """Its link is cut in mid-answer; whoever had read on does not notice."""
    with (
        connect_client(cluster.url) as client,
        WorkerProcess(
            cluster.url, "w1", tmp_path, *SLOW_STEP, "--lease-s", "20", "--max-batch-size", "3"
        ) as worker,
    ):
        asked = Asked(client, *QUESTIONS[:3], max_tokens=60)
        asked.read_on()
        await_replica(cluster, *(CHANNEL(stream.job_id) for stream in asked.streams))
        cluster.cut_replica_link()
        asked.read_on(5)
        cluster.await_failover(cluster.kill_primary())
        results = asked.read_all()
        late = [client.attach(result.job_id).result().text for result in results]
        assert late == asked.texts
        with connect(cluster.url) as redis:
            check_invariants(redis, asked.jobs)
        assert worker.log.count("redis has lost tokens") == len(results)
    assert {result.worker_ids for result in results} == {("w1",)}


def test_what_the_replica_had_not_heard_of_is_reported_and_fences_nobody_out(
    cluster: SentinelCluster, tmp_path: Path
) -> None:
    """Its link is cut before the primary dies: one job is forgotten, and the claim of another."""
    with connect_client(cluster.url) as client, connect(cluster.url) as redis:
        known = Asked(client, "a job that the replica knows")
        await_replica(cluster, JOB(known.streams[0].job_id))
        cluster.cut_replica_link()
        with WorkerProcess(cluster.url, "w1", tmp_path, *SLOW_STEP, "--lease-s", LEASE_S) as worker:
            forgotten = Asked(client, "a job that it has never heard of")
            for asked in (known, forgotten):
                asked.read_on()
            cluster.await_failover(cluster.kill_primary())
            with pytest.raises(UnknownJobError):
                forgotten.streams[0].result()
            # The job that is there as if nobody had claimed it runs anew, and can be read anew.
            again = client.attach(known.streams[0].job_id)
            runs = [event.run for event in again.events() if isinstance(event, RunStarted)]
            assert (again.text, len(runs)) == (known.texts[0], 1)
            assert not reads_something_wrong(known)
            assert worker.log.count("lease gone") == 2
            check_invariants(redis, known.jobs)


def reads_something_wrong(asked: Asked) -> bool:
    """Whether a reader from before gets another text: it may get an error, and not that."""
    try:
        return asked.streams[0].result().text != asked.texts[0]
    except MixfleetError:
        return not asked.texts[0].startswith(asked.streams[0].text)


def test_with_durability_by_replica_no_accepted_job_is_lost(
    cluster: SentinelCluster, tmp_path: Path
) -> None:
    settings = resolve({"redis": cluster.url, "model": MODEL, "durability": "replica"})
    with Client(settings=settings) as client, connect(cluster.url) as redis:
        accepted = Asked(client, *QUESTIONS)
        cluster.cut_replica_link()
        with pytest.raises(NotDurableError):
            Asked(client, "a question too late")
        cluster.await_failover(cluster.kill_primary())
        with WorkerProcess(cluster.url, "w1", tmp_path, *FAST_STEP):
            accepted.read_all()
            check_invariants(redis, accepted.jobs)
