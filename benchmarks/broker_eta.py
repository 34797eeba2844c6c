"""How true the estimates are that jobs get while they wait: simulated workers, true waits.

200 jobs come at once, and more one by one. Each is asked for its estimate right after its submit
and all the time until it starts; what counts is the first, and the one at half of its true wait.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis import Redis

from benchmarks.broker_jobs import MODEL, bench_queue
from benchmarks.broker_server import BenchServer
from benchmarks.broker_sizes import Sizes
from benchmarks.broker_statistics import percentile
from mixfleet_broker.channel import read_events
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    RunStarted,
    SamplingSettings,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import workers

ANSWER_TOKENS: Final = (8, 60)
"""Least and most that is asked for where it is; the simulated engine gives 20 to 60 by itself."""
_NUM_WORKERS: Final = 2
_SLOTS: Final = 8
_STEP_S: Final = 0.01
_WARM_UP: Final = 32
"""Jobs that run before: the fleet's speed is not known before any has ended."""
_LEAST_WAIT_S: Final = 0.5
"""Shares of shorter waits say nothing."""
_LIMIT_S: Final = 60.0


@dataclass(slots=True)
class Track:
    """One job's estimates."""

    submitted_at: float
    """Unix time, as all times here; Redis runs on this machine."""
    started_at: float = 0.0
    asked: list[tuple[float, float | None]] = field(default_factory=list)
    """When, and the estimate in seconds."""

    @property
    def wait_s(self) -> float:
        """The true wait."""
        return self.started_at - self.submitted_at

    def at_half(self) -> tuple[float, float | None] | None:
        """Return what was said when half of the wait was over; None if nobody asked around then."""
        middle = self.submitted_at + self.wait_s / 2
        found = min(self.asked, key=lambda one: abs(one[0] - middle))
        return found if abs(found[0] - middle) <= self.wait_s / 4 else None


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the errors of the estimates, with and without a known longest answer."""
    return {
        "max_tokens known": _measure(folder, sizes, known=True),
        "max_tokens not known": _measure(folder, sizes, known=False),
    }


def _measure(folder: Path, sizes: Sizes, *, known: bool) -> dict[str, Any]:
    source = random.Random(5)
    with BenchServer(folder) as server, server.client() as redis:
        queue = bench_queue(redis)
        with _fleet(server.url, redis, folder / "workers.log"):
            for _ in range(_WARM_UP):
                queue.submit(_job(source, known=known))
            _await_idle(queue)
            tracks = _run(queue, sizes, source, known=known)
    return figures(list(tracks.values()))


def figures(tracks: Sequence[Track]) -> dict[str, Any]:
    """Return how far the estimates were from the truth."""
    at_half = [(track, track.at_half()) for track in tracks if track.wait_s >= _LEAST_WAIT_S]
    return {
        "jobs": len(tracks),
        "median_wait_s": percentile([track.wait_s for track in tracks], 0.5),
        "longest_wait_s": max(track.wait_s for track in tracks),
        "at_submit": _errors([(track, track.asked[0]) for track in tracks]),
        "at_half": _errors([(track, asked) for track, asked in at_half if asked is not None]),
    }


def _errors(asked: Sequence[tuple[Track, tuple[float, float | None]]]) -> dict[str, Any]:
    """Return absolute errors, and as shares of what was then left of the wait."""
    left = [(eta_s, track.started_at - at) for track, (at, eta_s) in asked]
    known = [(eta_s, left_s) for eta_s, left_s in left if eta_s is not None]
    if not known:
        return {"asked": len(asked), "without_estimate": len(asked)}
    errors = [abs(eta_s - left_s) for eta_s, left_s in known]
    shares = [abs(eta - left_s) / left_s for eta, left_s in known if left_s >= _LEAST_WAIT_S]
    found = {
        "asked": len(asked),
        "without_estimate": len(asked) - len(known),
        "median_error_s": percentile(errors, 0.5),
        "p90_error_s": percentile(errors, 0.9),
        "median_bias_s": percentile([eta_s - left_s for eta_s, left_s in known], 0.5),
    }
    if shares:
        found["median_share"] = percentile(shares, 0.5)
        found["p90_share"] = percentile(shares, 0.9)
    return found


def _job(source: random.Random, *, known: bool) -> ChatJob:
    max_tokens = source.randint(*ANSWER_TOKENS) if known else None
    question = f"Question {source.random()}"
    return ChatJob(
        job_id=new_job_id(),
        model=MODEL,
        messages=(ChatMessage(role="user", content=question),),
        sampling=SamplingSettings(max_tokens=max_tokens),
    )


def _run(queue: JobQueue, sizes: Sizes, source: random.Random, *, known: bool) -> dict[str, Track]:
    """Let the jobs come and ask for their estimates until all have started."""
    tracks: dict[str, Track] = {}
    arrivals = list(_arrivals(source, sizes.eta_arrivals_per_s, sizes.eta_arrivals_s))
    for _ in range(sizes.eta_burst):
        _submit(queue, tracks, _job(source, known=known))
    start = time.time()
    waiting = set(tracks)
    while waiting or arrivals:
        if time.time() > start + _LIMIT_S:
            raise RuntimeError(f"{len(waiting)} jobs have not started after {_LIMIT_S:g} s")
        while arrivals and start + arrivals[0] <= time.time():
            arrivals.pop(0)
            waiting.add(_submit(queue, tracks, _job(source, known=known)))
        waiting -= {job_id for job_id in waiting if not _ask(queue, job_id, tracks[job_id])}
        time.sleep(0.05)
    for job_id, track in tracks.items():
        track.started_at = _started_at(queue.redis, job_id)
    return tracks


def _arrivals(source: random.Random, per_s: float, seconds: float) -> Iterator[float]:
    """Iterate over the seconds at which jobs come, as a Poisson process."""
    at = source.expovariate(per_s)
    while at < seconds:
        yield at
        at += source.expovariate(per_s)


def _submit(queue: JobQueue, tracks: dict[str, Track], job: ChatJob) -> str:
    track = Track(submitted_at=time.time())
    queue.submit(job)
    info = queue.info(job.job_id)
    # A job that is taken at once waits for no time at all.
    track.asked.append((time.time(), info.eta_s if info.state == "queued" else 0.0))
    tracks[job.job_id] = track
    return job.job_id


def _ask(queue: JobQueue, job_id: str, track: Track) -> bool:
    """Note a job's estimate; whether it still waits."""
    info = queue.info(job_id)
    if info.state != "queued":
        return False
    track.asked.append((time.time(), info.eta_s))
    return True


def _started_at(redis: Redis, job_id: str) -> float:
    event_id, event = read_events(redis, job_id)[0]
    if not isinstance(event, RunStarted):
        raise RuntimeError(f"job {job_id}: the event {event_id} comes before its start")
    return event.run / 1000  # a first run's number is the time of its claim


def _await_idle(queue: JobQueue) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while queue.depth() or queue.num_started():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the workers are not done after {_LIMIT_S:g} s")
        time.sleep(0.02)


@contextmanager
def _fleet(url: str, redis: Redis, log_file: Path) -> Iterator[None]:
    """Run simulated workers until the block ends."""
    command = [sys.executable, "-m", "mixfleet_worker", "--simulated", "--model", MODEL]
    command += ["--simulated-step-s", str(_STEP_S), "--max-batch-size", str(_SLOTS)]
    # Not in the arguments, which everybody on the machine can read.
    environment = {**os.environ, "MIXFLEET_REDIS": url}
    with log_file.open("w") as log:
        processes = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            for _ in range(_NUM_WORKERS)
        ]
    try:
        deadline = time.monotonic() + _LIMIT_S
        while len(workers(redis)) < _NUM_WORKERS:
            if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
                raise RuntimeError(f"the simulated workers do not start: see {log_file}")
            time.sleep(0.05)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
