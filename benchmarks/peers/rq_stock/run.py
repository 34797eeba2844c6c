"""Stock rq, from this project's own environment: its own enqueue, its own SimpleWorker.

The job does nothing but note the time. SimpleWorker runs it in its own process, which is rq's
fastest way.
"""

import time
from typing import Final

from redis import Redis
from rq import Queue, SimpleWorker

from benchmarks.broker_processes import Ready

QUEUE: Final = "bench"

_runs: Final[list[float]] = []


def note_time() -> None:
    """Note when the job ran: a worker's start and end take up to a second and do not count."""
    _runs.append(time.monotonic())


def submit(ready: Ready, url: str, num_jobs: int) -> tuple[float, float]:
    """Enqueue jobs one by one; return when that began and ended."""
    with Redis.from_url(url) as redis:
        queue = Queue(QUEUE, connection=redis)
        redis.ping()
        start = ready()
        for _ in range(num_jobs):
            queue.enqueue(note_time)
        return start, time.monotonic()


def work(ready: Ready, url: str, total: int) -> tuple[float, float]:
    """Run jobs until all processes together have run ``total``.

    Returns:
        When this one ran its first job and its last, in monotonic seconds.
    """
    with Redis.from_url(url) as redis:
        queue = Queue(QUEUE, connection=redis)
        worker = SimpleWorker([queue], connection=redis)
        _runs.append(ready())
        while queue.finished_job_registry.get_job_count(cleanup=False) < total:
            # It ends when the queue is empty for a moment; then it looks again.
            worker.work(burst=True, logging_level="ERROR")
        first = min(1, len(_runs) - 1)
        return _runs[first], _runs[-1]
