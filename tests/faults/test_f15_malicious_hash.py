"""F15: hashes that somebody prepared: pickles, names of functions, rubbish. Only they suffer."""

import pickle
from pathlib import Path
from typing import Any

import msgpack
import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from mixfleet import Client
from mixfleet_broker.channel import ended
from mixfleet_broker.keys import JOB, QUEUE
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import FAST_STEP, MODEL, SLOW_STEP, Asked, FaultWorker, check_invariants
from support.invariants import Expected
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

REJECTED = Expected(states=frozenset({"failed"}), code="invalid_request")


class Marker:
    """Unpickled anywhere, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._file), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "was-unpickled"


def test_pickles_and_names_of_functions_in_a_job_are_neither_loaded_nor_called(
    marker: Path, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    bomb = pickle.dumps(Marker(marker))
    assert b"was-unpickled" in bomb
    asked = Asked(client, "first question", "second question")
    for job_id in asked.jobs:
        redis.hset(
            JOB(job_id),
            mapping={
                **dict.fromkeys(("meta", "result", "data", "exc_info", "return_value"), bomb),
                "success_callback_name": "os.abort",
                "failure_callback_name": "os.abort",
                "stopped_callback_name": "os.abort",
                "worker_class": "os.abort",
            },
        )
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP):
        asked.read_all()
        check_invariants(redis, asked.jobs)
    assert not marker.exists()


def test_jobs_of_rqs_producers_that_are_pickled_or_name_a_function_are_rejected(
    marker: Path, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    pickled = Queue(MODEL, connection=redis).enqueue("os.abort", Marker(marker))
    redis.hset(JOB(pickled.id), "data", pickle.dumps(Marker(marker)))
    named = Queue(MODEL, connection=redis, serializer=JSONSerializer).enqueue("os.abort")
    good = Asked(client, "a good question")
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP):
        good.read_all()
        bad = {pickled.id: REJECTED, named.id: REJECTED}
        check_invariants(redis, good.jobs | bad)
    assert not marker.exists()


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


REQUESTS: dict[str, bytes] = {
    "nothing": b"",
    "no msgpack": b"\xc1\xc1\xc1",
    "cut off": msgpack.packb({"v": 1, "kind": "chat", "id": "x" * 40})[:-9],
    "huge": msgpack.packb({"v": 1, "kind": "chat", "prompt": "x" * (2 << 20)}),
    "says that it is huge": b"\xdd\xff\xff\xff\xff\xc0",
    "deep": deep(100_000),
    "deep inside": msgpack.packb({"v": 1, "kind": "chat"})[:-5] + deep(2000),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "a number": msgpack.packb(7),
    "keys that are no text": msgpack.packb({1: 2}),
    "another version": msgpack.packb({"v": 99, "kind": "chat"}),
    "another kind": msgpack.packb({"v": 1, "kind": "exec", "id": "x", "model": MODEL}),
    "wrong types": msgpack.packb(
        {"v": 1, "kind": "chat", "id": 5, "model": [MODEL], "messages": "Hi", "sampling": []}
    ),
    "another job": msgpack.packb(
        {"v": 1, "kind": "chat", "id": "other", "model": MODEL, "prompt": "Hi", "sampling": {}}
    ),
    "impossible settings": msgpack.packb(
        {
            "v": 1,
            "kind": "chat",
            "id": "ID",
            "model": MODEL,
            "prompt": "Hi",
            "sampling": {"max_tokens": -1, "temperature": 1e300, "seed": -5},
        }
    ),
}


def test_requests_that_are_rubbish_are_rejected_one_by_one(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    good = Asked(client, "a good question")
    bad = {}
    for data in REQUESTS.values():
        job_id = new_job_id()
        redis.hset(
            JOB(job_id),
            mapping={"status": "queued", "origin": MODEL, "mf_request": data, "data": b"x"},
        )
        redis.rpush(QUEUE(MODEL), job_id)
        bad[job_id] = REJECTED
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP) as w1:
        good.read_all()
        until(lambda: all(ended(redis, job_id) for job_id in bad), "all are rejected")
        check_invariants(redis, good.jobs | bad)
        assert w1.process.poll() is None


NUMBERS = (
    *("mf_cost", "mf_answer", "mf_class", "mf_score", "mf_place", "mf_at", "mf_bytes"),
    *("mf_attempt", "mf_losses", "mf_end_by", "mf_start_by", "mf_attended", "mf_solo"),
)
"""Fields of ours that hold a number or nothing."""


@pytest.mark.parametrize("value", ["rubbish", "-1", "nan", "1e300"])
def test_numbers_of_a_job_that_are_none_hurt_no_neighbour(
    value: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    """Spoilt while it waits, while it runs, and as its worker is gone."""
    spoilt = Asked(client, "a spoilt question", "another spoilt question")
    good = Asked(client, "a good question")
    for number, job_id in enumerate(spoilt.jobs):
        if number == 0:
            spoil(redis, job_id, value)
    faults = ("--die-at", "after-flush:3")
    with FaultWorker(redis_url, "victim", tmp_path, *SLOW_STEP, faults=faults) as victim:
        victim.await_death()
    for job_id in spoilt.jobs:
        spoil(redis, job_id, value)
    with WorkerProcess(redis_url, "heir", tmp_path, *FAST_STEP) as heir:
        good.read_all()
        Asked(client, "a later question").read_all()
        queue = JobQueue(redis, MODEL)
        until(lambda: all(ended(redis, job_id) for job_id in spoilt.jobs), "all have ended")
        until(lambda: (queue.depth(), queue.num_started()) == (0, 0), "nothing is left")
        assert heir.process.poll() is None
        assert "refuse" not in heir.log


def spoil(redis: Redis, job_id: str, value: str) -> None:
    redis.hset(JOB(job_id), mapping={**dict.fromkeys(NUMBERS, value), "mf_history": value})
