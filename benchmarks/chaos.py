"""A fleet under random kills: what becomes of its jobs.

Simulated workers behind a real Redis are killed, paused, drained and replaced at random, Redis
itself is killed and started again on its log, and half of the workers reach it through a network
that loses replies. Clients submit, read, let go and come back, and cancel. In the end every job is
looked at: whether it ended once, whether its answer is the undisturbed one, token for token, and
what is left in Redis.

    python -m benchmarks chaos [--minutes 10] [--workers 4] [--clients 24] [--seed 1]
"""

import argparse
import logging
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from redis import Redis

from benchmarks import report
from benchmarks.chaos_clients import Crowd, Outcome
from benchmarks.chaos_faults import Trouble
from mixfleet_broker.keys import CANCELED, CHANNEL, JOB
from mixfleet_broker.queue import JobQueue
from support.invariants import Expected, violations
from support.redis_server import UNSYNCED, RedisServer

MODEL = "simulated"
SETTLE_S = 240.0
"""Longest wait for the last answers, once nothing is broken any more."""
PROGRESS_EVERY_S = 15.0
KEEP_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of all jobs."""

    minutes: float
    jobs_submitted: int
    finished_once: int
    cancelled: int
    lost: int
    """Not ended, or gone."""
    duplicated: int
    """A token or an end said twice, or a gap."""
    wrong_text: int
    called_poison: int
    """Failed because three of their workers were killed, which is the rule and here bad luck."""
    other_failures: int
    broken_promises: int
    """Lines of the checker over all keys, the above included."""
    jobs_per_s: float
    runs_lost: int
    recovery_p50_s: float | None
    """From the last token of a run whose worker was killed to the next one of the answer."""
    recovery_p99_s: float | None
    recovery_max_s: float | None


def run(arguments: argparse.Namespace) -> tuple[Result, Counter[str], list[str]]:
    """Let trouble come for so many minutes; return what became of the jobs, and of what."""
    source = random.Random(arguments.seed)
    with (
        tempfile.TemporaryDirectory(prefix="mixfleet-chaos-") as folder,
        RedisServer(*UNSYNCED) as server,
        Trouble(server, Path(folder), num_workers=arguments.workers, source=source) as trouble,
    ):
        crowd = Crowd(server.url, MODEL, num_clients=arguments.clients, seed=arguments.seed)
        started = time.monotonic()
        with crowd:
            _watch(trouble, crowd, started + 60 * arguments.minutes)
            trouble.calm()
            crowd.finish(SETTLE_S)
        elapsed_s = time.monotonic() - started
        with server.client() as redis:
            queue = JobQueue(redis, MODEL)
            queue.reap()
            broken = _settled_violations(redis, crowd.outcomes)
        return summary(crowd.outcomes, broken, elapsed_s), trouble.done, broken


def _watch(trouble: Trouble, crowd: Crowd, until: float) -> None:
    shown = time.monotonic()
    while time.monotonic() < until:
        trouble.turn()
        if time.monotonic() - shown >= PROGRESS_EVERY_S:
            shown = time.monotonic()
            left_s = until - shown
            print(
                f"{left_s:5.0f} s left: {len(crowd.outcomes)} jobs ended, "
                + ", ".join(f"{count} {name}" for name, count in sorted(trouble.done.items())),
                flush=True,
            )


def _expected(outcome: Outcome) -> Expected:
    if outcome.code is not None:
        return Expected(text=outcome.expected, states=frozenset({"failed"}), code=outcome.code)
    states = {"finished", "canceled"} if outcome.was_cancelled else {"finished"}
    return Expected(text=outcome.expected, states=frozenset(states))


def _settled_violations(redis: Redis, outcomes: Sequence[Outcome]) -> list[str]:
    """Look until nothing is wrong, for a while: workers sweep up at their next turn."""
    jobs = {o.job_id: _expected(o) for o in outcomes if not o.is_canceled or _keep(redis, o.job_id)}
    deadline = time.monotonic() + 60
    while True:
        found = violations(redis, MODEL, jobs)
        if not found or time.monotonic() > deadline:
            return found
        threading.Event().wait(1.0)


def _keep(redis: Redis, job_id: str) -> bool:
    """Let a cancelled job outlive the look at it, which takes longer than some have left.

    They are kept for five minutes: of those that were gone before, their clients saw all.
    """
    if not redis.expire(JOB(job_id), KEEP_S):
        return False
    redis.expire(CHANNEL(job_id), KEEP_S)
    redis.zadd(CANCELED(MODEL), {job_id: time.time() + KEEP_S})
    return True


def summary(outcomes: Sequence[Outcome], broken: list[str], elapsed_s: float) -> Result:
    """Return the table: what the clients saw, and what the checker found broken."""
    gaps = sorted(gap for outcome in outcomes for gap in outcome.recovery_s)
    lost = [outcome for outcome in outcomes if not outcome.ended]
    duplicated = [line for line in broken if " ends, last" in line or " tokens after " in line]
    return Result(
        minutes=round(elapsed_s / 60, 2),
        jobs_submitted=len(outcomes),
        finished_once=sum(o.ended and o.code is None and not o.is_canceled for o in outcomes),
        cancelled=sum(outcome.is_canceled for outcome in outcomes),
        lost=len(lost) + sum(": is gone" in line for line in broken),
        duplicated=len(duplicated) + sum(outcome.is_torn for outcome in outcomes),
        wrong_text=sum(outcome.is_wrong for outcome in outcomes),
        called_poison=sum(outcome.code == "worker_lost" for outcome in outcomes),
        other_failures=sum(o.code not in (None, "worker_lost") for o in outcomes),
        broken_promises=len(broken),
        jobs_per_s=round(len(outcomes) / elapsed_s, 1),
        runs_lost=len(gaps),
        recovery_p50_s=round(statistics.median(gaps), 2) if gaps else None,
        recovery_p99_s=round(gaps[int(0.99 * (len(gaps) - 1))], 2) if gaps else None,
        recovery_max_s=round(gaps[-1], 2) if gaps else None,
    )


def main() -> None:
    """Run it, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # Two dozen clients would each say that Redis is away.
    logging.disable(logging.WARNING)
    result, done, broken = run(arguments)
    for name, value in asdict(result).items():
        print(f"{name:18} {value}")
    for name, count in sorted(done.items()):
        print(f"  {name:16} {count}")
    for line in broken[:20]:
        print("broken:", line)
    figures = {"result": asdict(result), "faults": dict(done), "broken": broken[:100]}
    print(report.write("chaos", figures))
