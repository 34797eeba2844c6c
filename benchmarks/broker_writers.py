"""The workers of the chunk benchmark: one flush per step for all their jobs, on a schedule.

One process plays several workers. Each has its own connection, its own jobs and its own phase, and
they take turns; so a step may start late on a busy machine, which is told apart from the latency.
Every chunk's text is the time of its append.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.broker_jobs import WORKER, bench_queue, chunk
from benchmarks.broker_processes import Ready
from mixfleet_broker.connection import connect
from mixfleet_broker.event_codec import encode_chunk
from mixfleet_broker.flush import Flush
from mixfleet_broker.records import Lease
from mixfleet_broker.write_outcome import WriteOutcome

Medium = Literal["streams", "pubsub", "snapshots"]
"""Where text is put for its readers: our streams; Redis's publish and subscribe, which keeps
nothing; or one value with the whole text so far, to be polled."""

STAMP: Final = 13
"""Characters of a time."""


def topic(lease: Lease) -> str:
    """Return the channel or the key of the ways that are not ours."""
    return f"bench:{lease.job_id}"


def stamp() -> str:
    """Return the time now, in as many characters as three tokens have."""
    return f"{time.monotonic_ns() // 1000:0{STAMP}x}"


def age_ms(text: str, now_us: int) -> float:
    """Return how long before ``now_us`` a stamp was made."""
    return (now_us - int(text, 16)) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one process of writers did."""

    num_in_window: int
    """Chunks appended while it was measured."""
    late_ms: tuple[float, ...]
    """How late each step started."""
    step_ms: tuple[float, ...]
    """How long each step's round trip took, with packing and unpacking."""
    cpu_s: float
    """Processor time from the common start to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When it is measured, in seconds from the common start."""

    warmup_s: float
    measured_s: float

    @property
    def end_s(self) -> float:
        """When the writers stop."""
        return self.warmup_s + self.measured_s


class _Worker:
    """One worker's jobs and connection."""

    def __init__(self, url: str, leases: Sequence[Lease], medium: Medium) -> None:
        self._redis = connect(url)
        self._queue = bench_queue(self._redis)
        self._leases = leases
        self._medium = medium
        self._texts = [""] * len(leases)
        self._num_tokens = 0

    def step(self) -> int:
        """Write the next token of every job; return how many were written."""
        self._num_tokens += 1
        if self._medium == "streams":
            flush = Flush(self._queue, WORKER)
            for lease in self._leases:
                flush.append(lease, chunk(self._num_tokens, stamp()))
            done = flush.send().outcomes
            return sum(outcome is WriteOutcome.DONE for outcome in done)
        with self._redis.pipeline(transaction=False) as pipeline:
            for i, lease in enumerate(self._leases):
                if self._medium == "pubsub":
                    body = encode_chunk(chunk(self._num_tokens, stamp()))
                    pipeline.publish(topic(lease), body)
                else:
                    self._texts[i] += stamp()
                    pipeline.set(topic(lease), self._texts[i])
            return len(pipeline.execute())


def write(
    ready: Ready,
    url: str,
    workers: Sequence[Sequence[Lease]],
    medium: Medium,
    steps_per_s: float,
    window: Window,
) -> Written:
    """Play workers until the window is over; 0 steps per second is as fast as it goes."""
    found = [_Worker(url, leases, medium) for leases in workers]
    start, cpu_s = ready(), time.process_time()
    period, end = 1 / steps_per_s if steps_per_s else 0.0, start + window.end_s
    due = [(start + period * i / len(found), i) for i in range(len(found))]
    num_in_window = 0
    late_ms: list[float] = []
    step_ms: list[float] = []
    while due[0][0] < end:
        at, i = due[0]
        time.sleep(max(0.0, at - time.monotonic()))
        now = time.monotonic()
        num_written = found[i].step()
        if start + window.warmup_s <= now < end:
            num_in_window += num_written
            late_ms.append(1000 * (now - at))
            step_ms.append(1000 * (time.monotonic() - now))
        # Never two steps at once to catch up: a worker that is late stays late.
        heapq.heapreplace(due, (max(at + period, now), i))
    return Written(
        num_in_window=num_in_window,
        late_ms=tuple(late_ms),
        step_ms=tuple(step_ms),
        cpu_s=time.process_time() - cpu_s,
    )
