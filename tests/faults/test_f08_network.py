"""F8: a network that is slow, loses replies, is cut, or is dead on one side."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker.channel import ended
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import (
    FAST_STEP,
    MODEL,
    SLOW_STEP,
    Asked,
    FaultWorker,
    check_invariants,
    connect_client,
)
from support.proxy import Proxy
from support.redis_server import RedisServer
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTIONS = ("first question", "second question", "third question")
STEP_S = 0.02
SLOWER_STEP = ("--simulated", "--simulated-step-s", "0.4")
"""An answer takes eight leases."""


@pytest.fixture
def network(redis_server: RedisServer, redis_url: str) -> Iterator[Proxy]:
    """A way to the empty server at ``redis_url``."""
    assert redis_url == redis_server.url
    with Proxy(redis_server.socket, seed=1) as network:
        yield network


@pytest.mark.parametrize("delay_s", [0.02, 0.2])
def test_a_slow_network_does_not_slow_the_decode(
    delay_s: float, network: Proxy, redis: Redis, client: Client, tmp_path: Path
) -> None:
    flags = ("--simulated", "--simulated-step-s", str(STEP_S), "--lease-s", "10")
    with WorkerProcess(network.url, "far", tmp_path, *flags) as far:
        network.delay_s = delay_s
        asked = Asked(client, "a question", max_tokens=60)
        [result] = asked.read_all()
        num_tokens = result.usage.completion_tokens
        until(lambda: "total_s=" in far.log, "the job's times are logged")
        found = re.search(r"total_s=([\d.]+)", far.log)
        assert found is not None
        # Waiting for each step's write would take at least a round trip of 2 * delay_s a step.
        assert float(found[1]) < num_tokens * (STEP_S + min(0.02, delay_s))
        check_invariants(redis, asked.jobs)


def test_lost_replies_cost_time_and_nothing_else(
    network: Proxy, redis: Redis, tmp_path: Path
) -> None:
    with (
        connect_client(network.url) as client,
        WorkerProcess(network.url, "w1", tmp_path, *FAST_STEP),
        WorkerProcess(network.url, "w2", tmp_path, *FAST_STEP),
    ):
        network.loss = 0.1
        asked = Asked(client, *(f"question {number}" for number in range(40)))
        asked.read_all()
        network.loss = 0.0
        check_invariants(redis, asked.jobs)
    assert network.num_lost > 10


def test_a_worker_that_is_cut_off_is_replaced_and_what_it_had_sent_arrives_in_vain(
    network: Proxy, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP),
        FaultWorker(network.url, "cut-off", tmp_path, *SLOWER_STEP) as lost,
    ):
        give_order(redis, "heir", "pause")
        asked = Asked(client, *QUESTIONS)
        next(iter(asked.streams[0]))
        network.blackhole()
        until(lambda: JobQueue(redis, MODEL).depth() == len(QUESTIONS), "its leases are over")
        withdraw_order(redis, "heir")
        results = asked.read_all()
        until(lambda: lost.num_known_losses == len(QUESTIONS), "it has given them up itself")
        network.heal()
        until(lambda: "broker is back" in lost.log, "it is heard again")
        check_invariants(redis, asked.jobs)
    assert all(result.worker_ids[-1] == "heir" for result in results)


def test_cut_connections_are_made_anew_and_no_run_is_lost(
    network: Proxy, redis: Redis, tmp_path: Path
) -> None:
    with (
        connect_client(network.url) as client,
        WorkerProcess(network.url, "w1", tmp_path, *SLOW_STEP),
    ):
        asked = Asked(client, *QUESTIONS)
        pieces = iter(asked.streams[0])
        for _ in range(3):
            next(pieces)
            network.reset()
        results = asked.read_all()
        check_invariants(redis, asked.jobs)
    assert {result.worker_ids for result in results} == {("w1",)}


def test_connections_that_fall_silent_without_an_end_are_found_out(
    network: Proxy, redis: Redis, tmp_path: Path
) -> None:
    with (
        connect_client(f"{network.url}?socket_timeout=5.1") as client,
        WorkerProcess(network.url, "w1", tmp_path, *SLOW_STEP),
    ):
        asked = Asked(client, *QUESTIONS)
        next(iter(asked.streams[0]))
        network.half_open()
        asked.read_all()
        check_invariants(redis, asked.jobs)


def test_a_client_that_is_cut_off_for_a_while_reads_on(
    network: Proxy, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    with (
        connect_client(network.url) as client,
        WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP),
    ):
        asked = Asked(client, *QUESTIONS)
        next(iter(asked.streams[0]))
        network.blackhole()
        until(lambda: all(ended(redis, job_id) for job_id in asked.jobs), "the jobs have ended")
        network.heal()
        asked.read_all()
        check_invariants(redis, asked.jobs)
