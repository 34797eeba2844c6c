"""A real worker in which something breaks at a chosen moment. A program: the product has no hooks.

Usage: ``python fault_worker.py [FAULT...] -- [FLAG OF THE WORKER...]``, with the faults

- ``--die-at POINT:N``, ``--stop-at POINT:N``: SIGKILL or SIGSTOP itself as it comes to a point for
  the n-th time; ``--hang-at POINT:N``: wait there for SIGUSR1, which is meant for the points of the
  engine, as the I/O thread goes on meanwhile;
- ``--kill-for TEXT:N``, ``--raise-for TEXT:N``: SIGKILL itself, or let the engine raise, whenever
  it computes token N of the answer to a question that holds a text;
- ``--crash-every N --seed S``: SIGKILL itself at about every n-th point that it comes to;
- ``--clock-skew SECONDS``: this host's clock is wrong;
- ``--script-version TEXT``: its scripts are those of another version.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from mixfleet_broker import lua
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_engine.engine import Engine, Runner
from mixfleet_engine.launch import Launch
from mixfleet_engine.step import StepPlan
from mixfleet_worker.cli import worker
from mixfleet_worker.handoff import EndWrite, TakenJob, Write
from mixfleet_worker.intake import Intake
from mixfleet_worker.session import QueueSession

POINTS: Final = (
    "before-claim",
    "after-claim",
    "after-hand-over",
    "in-prefill",
    "in-decode",
    "before-flush",
    "after-flush",
    "before-finish",
    "after-finish",
    "before-renew",
    "after-renew",
    "before-release",
    "after-release",
    "before-sign-off",
)
"""The steps of a job's life, and of its worker's end. A finish is a flush that holds an end; a
claim counts when jobs wait, and its reply when it holds some."""


class Stepper:
    """Counts how often each point is reached, and lets the chosen thing happen there."""

    def __init__(self) -> None:
        self._passes: Counter[str] = Counter()
        self._faults: list[tuple[str, Callable[[], object]]] = []
        self._crash_every = 0
        self._random = random.Random(0)

    def on(self, moment: str, act: Callable[[], object]) -> None:
        """Do something at a moment, written ``POINT:N``."""
        point, _, number = moment.partition(":")
        if point not in POINTS or not number.isdigit():
            raise SystemExit(f"{moment}: must be one of {', '.join(POINTS)}, a colon and a number")
        self._faults.append((moment, act))

    def crash_every(self, num_points: int, seed: int) -> None:
        """Die at about every ``num_points``-th point."""
        self._crash_every, self._random = num_points, random.Random(seed)

    def reach(self, point: str) -> None:
        self._passes[point] += 1
        moment = f"{point}:{self._passes[point]}"
        for chosen, act in self._faults:
            if chosen == moment:
                act()
        if self._crash_every and self._random.randrange(self._crash_every) == 0:
            die()


class MarkedJobs:
    """Requests whose question holds a text, and what the engine does to them."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, int, Callable[[], object]]] = []
        self._questions: dict[str, str] = {}

    def on(self, mark: str, act: Callable[[], object]) -> None:
        """Do something whenever token N of a marked answer is computed, written ``TEXT:N``."""
        text, _, number = mark.rpartition(":")
        self._marks.append((text, int(number), act))

    def read(self, taken: TakenJob) -> None:
        job = decode_job(taken.claimed.payload)
        text = job.prompt or "".join(message.content for message in job.messages)
        self._questions[job.job_id] = text

    def meet(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            question = self._questions.get(chunk.request_id, "")
            for text, position, act in self._marks:
                if text in question and chunk.samples and chunk.position == position:
                    act()


class FaultyRunner:
    """The runner of the engine behind its faults."""

    def __init__(self, runner: Runner, stepper: Stepper, marked: MarkedJobs) -> None:
        self._runner = runner
        self._stepper = stepper
        self._marked = marked

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def block_size(self) -> int:
        return self._runner.block_size

    def launch(self, plan: StepPlan) -> Launch:
        begins = any(chunk.position == 0 or not chunk.samples for chunk in plan.chunks)
        self._stepper.reach("in-prefill" if begins else "in-decode")
        self._marked.meet(plan)
        return self._runner.launch(plan)


def die() -> None:
    """End as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop here, the whole process, until SIGCONT."""
    # To this very thread: only then has it not gone on by the time that the signal works.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def hang() -> None:
    """Let this thread wait for SIGUSR1."""
    signal.sigwait({signal.SIGUSR1})


def fail() -> None:
    """What an engine may do."""
    raise RuntimeError("the engine does not like this job")


def wrap(
    owner: type,
    name: str,
    *,
    before: Callable[..., object] | None = None,
    after: Callable[[Any], object] | None = None,
) -> None:
    """Put calls around a method: one with its arguments, one with what it returned."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        value = original(*args, **kwargs)
        if after is not None:
            after(value)
        return value

    replace(owner, name, wrapped)


def replace(owner: object, name: str, what: object) -> None:
    """Put something in the place of what was there."""
    setattr(owner, name, what)


def watch(stepper: Stepper) -> None:
    """Let every point be noticed."""

    def reach(point: str, *, counts: Callable[..., object] = lambda *_: True) -> Any:
        return lambda *args: stepper.reach(point) if counts(*args) else None

    def jobs_wait(queue: JobQueue, *_: object) -> bool:
        return queue.depth() > 0

    def has_leases(_queue: JobQueue, _worker_id: str, leases: Sequence[object]) -> bool:
        return bool(leases)

    wrap(
        JobQueue,
        "claim",
        before=reach("before-claim", counts=jobs_wait),
        after=reach("after-claim", counts=bool),
    )
    wrap(
        JobQueue,
        "renew",
        before=reach("before-renew", counts=has_leases),
        after=reach("after-renew"),
    )
    wrap(JobQueue, "release", before=reach("before-release"), after=reach("after-release"))
    wrap(Intake, "admit", before=reach("after-hand-over"))
    wrap(QueueSession, "sign_off", before=reach("before-sign-off"))
    watch_flush(stepper)


def watch_flush(stepper: Stepper) -> None:
    original = QueueSession.flush

    def flush(session: QueueSession, writes: Sequence[Write]) -> Any:
        has_end = any(isinstance(write, EndWrite) for write in writes)
        kind = "finish" if has_end else "flush"
        if writes:
            stepper.reach(f"before-{kind}")
        flushed = original(session, writes)
        if writes:
            stepper.reach(f"after-{kind}")
        return flushed

    replace(QueueSession, "flush", flush)


def break_engine(stepper: Stepper, marked: MarkedJobs) -> None:
    """Put the faults between the engine and its runner."""
    original: Any = Engine.__init__

    def init(engine: Engine, runner: Runner, *args: Any, **kwargs: Any) -> None:
        original(engine, FaultyRunner(runner, stepper, marked), *args, **kwargs)

    replace(Engine, "__init__", init)
    wrap(Intake, "admit", before=lambda _, taken: marked.read(taken))


def skew_clock(seconds: float) -> None:
    """Let this host's clock be wrong; the monotonic one has no date and cannot be."""
    right, right_ns = time.time, time.time_ns
    replace(time, "time", lambda: right() + seconds)
    replace(time, "time_ns", lambda: right_ns() + round(seconds * 1e9))


def change_scripts(version: str) -> None:
    """Give every script another text, and so another name on the server."""
    read = lua._read
    replace(lua, "_read", lambda name: f"{read(name)}-- {version}\n")


def main(arguments: list[str]) -> None:
    end = arguments.index("--")
    parser = argparse.ArgumentParser()
    for name in ("die-at", "stop-at", "hang-at", "kill-for", "raise-for"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--crash-every", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock-skew", type=float, default=0.0)
    parser.add_argument("--script-version")
    given = parser.parse_args(arguments[:end])
    stepper, marked = Stepper(), MarkedJobs()
    for moments, act in ((given.die_at, die), (given.stop_at, stop), (given.hang_at, hang)):
        for moment in moments:
            stepper.on(moment, act)
    for marks, act in ((given.kill_for, die), (given.raise_for, fail)):
        for mark in marks:
            marked.on(mark, act)
    stepper.crash_every(given.crash_every, given.seed)
    skew_clock(given.clock_skew)
    if given.script_version:
        change_scripts(given.script_version)
    # Before any other thread is there: a signal that one thread waits for must end no other.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    watch(stepper)
    break_engine(stepper, marked)
    worker.main(arguments[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
