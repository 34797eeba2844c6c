"""Jobs per second through the queue: submitted, worked off, and both at the same time.

Ours carries a prompt of 1.2 KB, is claimed in batches of 16 and ended as a worker ends it. The
peers' jobs do nothing and have no content. The floor is what Redis does without any queue.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from redis import Redis

from benchmarks.broker_jobs import (
    CLAIM,
    MODEL,
    PROMPT_BYTES,
    WORKER,
    bench_queue,
    chat_job,
    finish_all,
)
from benchmarks.broker_processes import Call, Ready, run_together
from benchmarks.broker_server import BenchServer
from benchmarks.broker_sizes import Sizes, num_cores
from benchmarks.broker_statistics import rate
from benchmarks.peers.celery_redis.run import Celery, Pool
from benchmarks.peers.rq_stock import run as rq_stock
from mixfleet_broker.connection import connect
from mixfleet_broker.keys import FINISHED
from mixfleet_broker.messages import (
    new_job_id,
)

Span = tuple[float, float]
"""When something began and ended, in monotonic seconds."""

_LIMIT_S: Final = 120.0
_BELL_S: Final = 0.05
_RQ_SHARE: Final = 3
"""rq runs so much slower that it gets this part of the jobs."""


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return our jobs per second; servers are made in ``folder``."""
    return _measure_python(folder, submit, work, sizes.jobs)


def measure_rq(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return stock rq's jobs per second."""
    return _measure_python(folder, rq_stock.submit, rq_stock.work, sizes.jobs // _RQ_SHARE)


def measure_floor(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Return what one client gets from Redis without a queue."""
    with BenchServer(folder) as server, server.client() as redis:
        return floor(redis, sizes.jobs)


def submit(ready: Ready, url: str, num_jobs: int) -> Span:
    """Submit jobs one by one."""
    with connect(url) as redis:
        queue = bench_queue(redis)
        start = ready()
        for _ in range(num_jobs):
            queue.submit(chat_job())
        return start, time.monotonic()


def work(ready: Ready, url: str, total: int) -> Span:
    """Claim and end jobs until all processes together have ended ``total``."""
    with connect(url) as redis:
        queue = bench_queue(redis)
        start = end = ready()
        while True:
            claimed = queue.claim(WORKER, CLAIM, new_job_id())
            if claimed:
                finish_all(queue, claimed)
                end = time.monotonic()
            elif int(redis.zcard(FINISHED(MODEL))) >= total:
                return start, end
            else:
                queue.wait_for_jobs(_BELL_S)


def _measure_python(
    folder: Path, submit: Callable[..., Span], work: Callable[..., Span], num_jobs: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"submits_per_s": {}, "works_per_s": {}, "both_per_s": {}}
    cores = num_cores()
    for processes in dict.fromkeys((1, cores)):
        each = num_jobs // processes
        with BenchServer(folder) as server:
            spans = run_together([Call(submit, (server.url, each))] * processes, timeout_s=_LIMIT_S)
            found["submits_per_s"][str(processes)] = rate(each * processes, spans)
            calls = [Call(work, (server.url, each * processes))] * processes
            spans = run_together(calls, timeout_s=_LIMIT_S)
            found["works_per_s"][str(processes)] = rate(each * processes, spans)
    for name, (clients, workers) in arrangements(cores).items():
        each = num_jobs // clients
        with BenchServer(folder) as server:
            calls = [Call(submit, (server.url, each))] * clients
            calls += [Call(work, (server.url, each * clients))] * workers
            found["both_per_s"][name] = rate(
                each * clients, run_together(calls, timeout_s=_LIMIT_S)
            )
    return found


def arrangements(cores: int) -> dict[str, tuple[int, int]]:
    """Return by its name how many clients submit while how many workers work.

    Some systems have their limit on one side, some on the other.
    """
    half = max(1, cores // 2)
    found = dict.fromkeys([(cores, half), (half, cores)])
    return {f"{clients} + {workers}": (clients, workers) for clients, workers in found}


def measure_celery(folder: Path, sizes: Sizes, python: Path) -> dict[str, Any]:
    """Return Celery's jobs per second.

    Raises:
        PeerError: It failed.
    """
    found: dict[str, Any] = {"submits_per_s": {}, "works_per_s": {}, "both_per_s": {}}
    cores = num_cores()
    with BenchServer(folder) as server, server.client() as redis:
        celery = Celery(python, server.url, redis, folder / "celery.log")
        for processes in dict.fromkeys((1, cores)):
            found["submits_per_s"][str(processes)] = celery.submits_per_s(processes, sizes.jobs)
            found["works_per_s"][str(processes)] = celery.works_per_s(_pool(processes), processes)
        for name, (clients, workers) in arrangements(cores).items():
            both = celery.both_per_s(_pool(workers), clients, workers, sizes.jobs)
            found["both_per_s"][name] = both
    return found


def _pool(processes: int) -> Pool:
    """Return Celery's faster pool: in one process it need not hand tasks over."""
    return "solo" if processes == 1 else "prefork"


def floor(redis: Redis, num_jobs: int) -> dict[str, float]:
    """Return calls and jobs per second of bare lists: nothing is atomic, nothing kept."""
    body, key = b"x" * PROMPT_BYTES, "bench:floor"

    def push_batch() -> None:
        with redis.pipeline(transaction=False) as pipeline:
            for _ in range(CLAIM):
                pipeline.rpush(key, body)
            pipeline.execute()

    num_batches = num_jobs // CLAIM
    return {
        "pings_per_s": _calls_per_s(redis.ping, num_jobs),
        "pushes_per_s": _calls_per_s(lambda: redis.rpush(key, body), num_jobs),
        "pops_by_16_per_s": CLAIM * _calls_per_s(lambda: redis.lpop(key, CLAIM), num_batches),
        "pushes_by_16_per_s": CLAIM * _calls_per_s(push_batch, num_batches),
    }


def _calls_per_s(call: Callable[[], object], num_calls: int) -> float:
    started = time.perf_counter()
    for _ in range(num_calls):
        call()
    return num_calls / (time.perf_counter() - started)
