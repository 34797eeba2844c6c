"""What the calls of the queue cost while ever more jobs wait; the goal is: always the same."""

import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from redis import Redis

from benchmarks.broker_jobs import CLAIM, WORKER, bench_queue, chat_job, fill, finish_all
from benchmarks.broker_server import BenchServer, script_us, settle
from benchmarks.broker_sizes import Sizes
from benchmarks.broker_statistics import Result, percentile, timed
from mixfleet_broker.messages import (
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.terms import JobTerms

Arrangement = Literal["one tenant", "many tenants"]
ARRANGEMENTS: Final[tuple[Arrangement, ...]] = ("one tenant", "many tenants")
"""First come, first served; or half of the jobs are one tenant's and came first, the other half are
eight others' in turns: then most that is claimed comes from the middle of rq's list."""
_OTHERS: Final = tuple(f"tenant-{i}" for i in range(8))


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the milliseconds of each call, by arrangement and depth."""
    found: dict[str, Any] = {}
    with BenchServer(folder) as server, server.client() as redis:
        for arrangement in ARRANGEMENTS:
            rows = {str(n): _at_depth(redis, arrangement, n, sizes.samples) for n in sizes.depths}
            found[arrangement] = rows
    return found


def tenants_of(arrangement: Arrangement, depth: int) -> list[str]:
    """Return whose each job is, in the order in which they come."""
    if arrangement == "one tenant":
        return ["default"] * depth
    num_first = depth // 2
    others = itertools.islice(itertools.cycle(_OTHERS), depth - num_first)
    return ["first"] * num_first + list(others)


def _at_depth(
    redis: Redis, arrangement: Arrangement, depth: int, samples: int
) -> dict[str, dict[str, float]]:
    redis.flushall()
    queue, tenants = bench_queue(redis), tenants_of(arrangement, depth)
    waiting = set(fill(queue, tenants))
    settle(redis)
    calls, source = _Calls(redis), random.Random(depth)
    for _ in range(samples):
        claimed = calls.time("claim", lambda: queue.claim(WORKER, CLAIM, new_job_id()))
        if len(claimed) != CLAIM:
            raise RuntimeError(f"{len(claimed)} jobs of {CLAIM} claimed at a depth of {depth}")
        finish_all(queue, claimed)
        waiting -= {job.lease.job_id for job in claimed}
        terms = [JobTerms(tenant=tenant) for tenant in source.sample(tenants, CLAIM)]
        waiting |= {calls.time("submit", partial(_submit, queue, one)) for one in terms}
    some = source.sample(sorted(waiting), 2 * samples)
    for job_id in some[:samples]:
        calls.time("standing", partial(queue.info, job_id))
    for job_id in some[samples:]:
        calls.time("cancel", partial(queue.cancel, job_id))
    return calls.figures()


def _submit(queue: JobQueue, terms: JobTerms) -> str:
    job = chat_job()
    queue.submit(job, terms)
    return job.job_id


class _Calls:
    """Times of calls by their name, on our side and on the server's."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._ms: dict[str, list[float]] = {}
        self._server_ms: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Result]) -> Result:
        """Make a call and note how long it took."""
        before = script_us(self._redis)
        took_ms, result = timed(call)
        self._ms.setdefault(name, []).append(took_ms)
        spent_us = script_us(self._redis) - before
        self._server_ms.setdefault(name, []).append(spent_us / 1000)
        return result

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the medians."""
        return {
            name: {
                "p50_ms": percentile(self._ms[name], 0.5),
                "server_p50_ms": percentile(self._server_ms[name], 0.5),
                "server_max_ms": max(self._server_ms[name]),
            }
            for name in self._ms
        }
