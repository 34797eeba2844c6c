"""What one job and one step cost: round trips, commands, Redis's processor time, and memory."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import redis as redis_py
from redis import Redis

from benchmarks.broker_jobs import (
    ANSWER_TOKENS,
    CLAIM,
    DONE,
    WORKER,
    bench_queue,
    chat_job,
    chunk,
    fill,
    finish_all,
    leases_of,
)
from benchmarks.broker_memory import bytes_by_kind, used_bytes
from benchmarks.broker_server import BenchServer, cpu_s, info, settle
from benchmarks.broker_sizes import Sizes
from mixfleet_broker.flush import Flush
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import Lease

_STEP: Final = 64
"""Jobs of the steps with which answers are written."""


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the costs of each call, of a whole job, and of its memory."""
    with BenchServer(folder) as server:
        calls = _costs_of_calls(server.url, sizes.cost_calls)
    with BenchServer(folder) as server, server.client() as redis:
        job = _costs_of_jobs(redis, sizes.cost_jobs)
    return {"calls": calls, "job": job}


def _counting_client(url: str) -> tuple[Redis, Callable[[], int]]:
    """Return a client of one connection, and what tells how often it has sent something."""
    num_sent = itertools.count()
    last = 0

    class Counting(redis_py.Connection):
        def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            nonlocal last
            last = next(num_sent)
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]

    client = Redis.from_url(url, connection_class=Counting, protocol=2)
    client.ping()
    return client, lambda: last


def _costs_of_calls(url: str, num_calls: int) -> dict[str, dict[str, float]]:
    client, num_sent = _counting_client(url)
    with client, Redis.from_url(url) as observer:
        queue = bench_queue(client)
        calls = _calls(queue, num_calls)
        found = {}
        for name, call in calls.items():
            call()  # the server has the script now
            commands, sent, spent = _num_commands(observer), num_sent(), cpu_s(observer)
            for _ in range(num_calls):
                call()
            found[name] = {
                "round_trips": (num_sent() - sent) / num_calls,
                # Less the two by which the observer looked.
                "commands": (_num_commands(observer) - commands - 2) / num_calls,
                "redis_us": 1e6 * (cpu_s(observer) - spent) / num_calls,
            }
    return found


def _calls(queue: JobQueue, num_calls: int) -> dict[str, Callable[[], object]]:
    """Return the calls by name, in the order in which they can be made."""
    claimed: list[Any] = []
    numbers = itertools.count(1)
    steps = leases_of(queue, _STEP)
    ends = iter(leases_of(queue, (num_calls + 1) * (1 + CLAIM)))

    def finish(num_jobs: int) -> None:
        flush = Flush(queue, WORKER)
        for lease in itertools.islice(ends, num_jobs):
            flush.finish(lease, DONE)
        flush.send()

    def step(num_jobs: int) -> None:
        _step(queue, steps[:num_jobs], next(numbers))

    found: dict[str, Callable[[], object]] = {
        "submit": lambda: queue.submit(chat_job()),
        "claim of 16": lambda: claimed.extend(queue.claim(WORKER, CLAIM, new_job_id())),
        "step of 1 job": lambda: step(1),
        "step of 16 jobs": lambda: step(16),
        "step of 64 jobs": lambda: step(_STEP),
        "renew 16": lambda: queue.renew(WORKER, steps[:16]),
        "renew 64": lambda: queue.renew(WORKER, steps),
        "finish 1": lambda: finish(1),
        "finish 16": lambda: finish(CLAIM),
        "reap": queue.reap,
    }
    fill(queue, itertools.repeat("default", (num_calls + 1) * CLAIM))
    standing = fill(queue, ["default"])[0]
    found["standing"] = lambda: queue.info(standing)
    found["depth"] = queue.depth
    return found


def _step(queue: JobQueue, leases: Sequence[Lease], num_tokens: int) -> None:
    flush = Flush(queue, WORKER)
    for lease in leases:
        flush.append(lease, chunk(num_tokens))
    flush.send()


def _num_commands(redis: Redis) -> int:
    return int(info(redis, "stats")["total_commands_processed"])


def _costs_of_jobs(redis: Redis, num_jobs: int) -> dict[str, Any]:
    """Return processor time and memory of a job with a prompt of 1.2 KB and 200 tokens."""
    queue = bench_queue(redis)
    finish_all(queue, _claim(queue, fill(queue, ["default"] * CLAIM)))  # keys that stay
    settle(redis)
    meter = _Meter(redis, num_jobs)
    job_ids = fill(queue, itertools.repeat("default", num_jobs))
    meter.note("submit", "queued")
    claimed = _claim(queue, job_ids)
    meter.note("claim", "started")
    leases = [job.lease for job in claimed]
    for start in range(0, num_jobs, _STEP):
        for num_tokens in range(1, ANSWER_TOKENS + 1):
            _step(queue, leases[start : start + _STEP], num_tokens)
    meter.note("answer", "answered")
    for start in range(0, num_jobs, CLAIM):
        finish_all(queue, claimed[start : start + CLAIM])
    meter.note("finish", "finished")
    return {"redis_us": meter.redis_us, "bytes": meter.num_bytes, "bytes_by_kind": meter.by_kind}


def _claim(queue: JobQueue, job_ids: Sequence[str]) -> list[Any]:
    claimed: list[Any] = []
    while len(claimed) < len(job_ids):
        claimed += queue.claim(WORKER, CLAIM, new_job_id())
    return claimed


class _Meter:
    """Processor time and memory a job, from one moment of its life to the next."""

    def __init__(self, redis: Redis, num_jobs: int) -> None:
        self._redis = redis
        self._num_jobs = num_jobs
        self._empty_bytes = used_bytes(redis)
        self._cpu_s = cpu_s(redis)
        self._base = bytes_by_kind(redis)
        self.redis_us: dict[str, float] = {}
        self.num_bytes: dict[str, float] = {}
        self.by_kind: dict[str, dict[str, float]] = {}

    def note(self, what: str, state: str) -> None:
        """Note what it took to get all jobs into a state, and what they take there."""
        self.redis_us[what] = 1e6 * (cpu_s(self._redis) - self._cpu_s) / self._num_jobs
        self.num_bytes[state] = (used_bytes(self._redis) - self._empty_bytes) / self._num_jobs
        self.by_kind[state] = {
            kind: (num_bytes - self._base[kind]) / self._num_jobs
            for kind, num_bytes in sorted(bytes_by_kind(self._redis).items())
            if num_bytes > self._base[kind]
        }
        self._cpu_s = cpu_s(self._redis)
