"""The workers of the gateway's benchmark: they write the time instead of words.

One process plays several, each with one flush per step for all its jobs, as a real worker has, and
a phase of its own. A job's first word comes with its claim.
"""

import time
from dataclasses import dataclass

from redis import Redis

from benchmarks.broker_jobs import MODEL, bench_queue
from benchmarks.broker_processes import Ready
from benchmarks.broker_writers import stamp
from mixfleet_broker.connection import connect
from mixfleet_broker.flush import Flush
from mixfleet_broker.messages import JobEnd, TokenChunk, Usage, new_job_id
from mixfleet_broker.records import Lease
from mixfleet_broker.registry import Registration, WorkerRecord

WORKER = "bench-worker"
_LEASE_S = 600.0
_BEAT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How the workers work."""

    workers: int
    slots: int
    """Jobs that each of them runs at once."""
    steps_per_s: float
    tokens: int
    """Of each answer."""
    run_s: float
    """From the common start."""


class _Worker:
    """One worker: its jobs, each with the tokens that it has, and when its next step is due."""

    def __init__(self, redis: Redis, number: int, slots: int, due: float) -> None:
        self.due = due
        self._redis = redis
        self._id = f"{WORKER}-{number}"
        self._slots = slots
        self._queue = bench_queue(redis)
        self._running: dict[Lease, int] = {}
        record = WorkerRecord.of_this_process(
            worker_id=self._id,
            model=MODEL,
            max_batch_size=slots,
            context_length=32_768,
            started_at=time.time(),
        )
        self._registration = Registration(redis, record, lease_s=_LEASE_S)
        self.beat()

    def beat(self) -> None:
        """Say that it lives."""
        self._registration.beat(state="busy", in_flight=len(self._running))

    def step(self, tokens: int) -> int:
        """Take what there is, and write the next token of every job."""
        free = self._slots - len(self._running)
        for claimed in self._queue.claim(self._id, free, new_job_id()):
            self._running[claimed.lease] = 0
        flush = Flush(self._queue, None)
        for lease, num_tokens in list(self._running.items()):
            chunk = TokenChunk(num_tokens=num_tokens + 1, text=stamp(), token_ids=(num_tokens,))
            if num_tokens + 1 < tokens:
                self._running[lease] = num_tokens + 1
                flush.append(lease, chunk)
            else:
                del self._running[lease]
                usage = Usage(prompt_tokens=1, completion_tokens=num_tokens + 1)
                end = JobEnd(state="finished", finish_reason="length", usage=usage)
                flush.finish(lease, end, chunk)
        if len(flush):
            flush.send()
        return len(flush)


def serve(ready: Ready, url: str, pace: Pace) -> int:
    """Play workers until the time is over, each in its own phase; return the chunks written."""
    period = 1 / pace.steps_per_s
    redis = connect(url)
    workers = [
        _Worker(redis, i, pace.slots, period * i / pace.workers) for i in range(pace.workers)
    ]
    start = ready()
    for worker in workers:
        worker.due += start
    num_written, beat_at = 0, start + _BEAT_S
    while (now := time.monotonic()) < start + pace.run_s:
        if now >= beat_at:
            beat_at = now + _BEAT_S
            for worker in workers:
                worker.beat()
        worker = min(workers, key=lambda one: one.due)
        time.sleep(max(0.0, worker.due - now))
        num_written += worker.step(pace.tokens)
        # Never two steps at once to catch up: a worker that is late stays late.
        worker.due = max(worker.due + period, time.monotonic())
    return num_written
