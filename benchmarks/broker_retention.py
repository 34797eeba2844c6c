"""What is left of jobs after their time: keys by kind, and memory.

The jobs end while others come, as in a fleet; once the last one's time is over and a worker's
house-keeping has run, no key of any job may be there.
"""

import itertools
import time
from pathlib import Path
from typing import Any, Final

from redis import Redis

from benchmarks.broker_jobs import WORKER, bench_queue, fill, finish_all
from benchmarks.broker_memory import OF_ONE_JOB, keys_by_kind, used_bytes
from benchmarks.broker_server import BenchServer
from benchmarks.broker_sizes import Sizes
from benchmarks.broker_statistics import timed
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import MAX_CLAIM, JobQueue

_AT_ONCE: Final = 1000
_LEASE_S: Final = 1.0
"""What a claim gave is remembered for two of them."""
_EXPIRY_S: Final = 60.0
"""Redis deletes what has expired in the background, bit by bit; it gets so long at most."""


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return what is left of ``sizes.kept_jobs`` jobs that are kept for ``sizes.kept_s``."""
    with BenchServer(folder) as server, server.client() as redis:
        queue = bench_queue(redis, result_ttl_s=sizes.kept_s, lease_s=_LEASE_S)
        before = used_bytes(redis)
        started = time.monotonic()
        for start in range(0, sizes.kept_jobs, _AT_ONCE):
            _run(queue, min(_AT_ONCE, sizes.kept_jobs - start))
        ended = time.monotonic()
        at_end = {"keys": _num_keys(redis), "bytes": used_bytes(redis) - before}
        time.sleep(sizes.kept_s + 2 * _LEASE_S)
        reap_ms, _ = timed(queue.reap)
        _await_expiry(redis)
        left = keys_by_kind(redis)
        return {
            "jobs": sizes.kept_jobs,
            "kept_s": sizes.kept_s,
            "run_s": ended - started,
            "at_the_end": at_end,
            "reap_ms": reap_ms,
            "gone_after_s": time.monotonic() - ended,
            "left_by_kind": dict(sorted(left.items())),
            "left_of_jobs": sum(left[kind] for kind in [*OF_ONE_JOB, "unknown"]),
            "left_bytes": used_bytes(redis) - before,
        }


def _run(queue: JobQueue, num_jobs: int) -> None:
    fill(queue, itertools.repeat("default", num_jobs))
    while claimed := queue.claim(WORKER, MAX_CLAIM, new_job_id()):
        finish_all(queue, claimed)


def _num_keys(redis: Redis) -> int:
    found: Any = redis.dbsize()
    return int(found)


def _await_expiry(redis: Redis) -> None:
    """Wait until the number of keys has not changed for a second."""
    deadline = time.monotonic() + _EXPIRY_S
    last, since = _num_keys(redis), time.monotonic()
    while time.monotonic() < min(deadline, since + 1.0):
        time.sleep(0.05)
        if (now := _num_keys(redis)) != last:
            last, since = now, time.monotonic()
