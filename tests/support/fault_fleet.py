"""Workers that break on purpose, and fleets whose dead are replaced."""

import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis

from mixfleet import ChatResult, Client
from mixfleet_broker.channel import ended
from mixfleet_broker.settings import resolve
from support import fault_worker
from support.invariants import Expected, violations
from support.processes import stopped
from support.undisturbed import undisturbed_text
from support.worker_process import LEASE_S, WorkerProcess, until

MODEL = "simulated"
PERIOD_S = LEASE_S / 3
"""How often a worker renews its leases and reaps those of others."""
SLOW_STEP = ("--simulated", "--simulated-step-s", "0.05")
FAST_STEP = ("--simulated", "--simulated-step-s", "0.002")
NUM_TOKENS = 20
"""No answer of the simulated engine ends before this one."""


class FaultWorker(WorkerProcess):
    """A worker with faults, see fault_worker.py; it may die before it is ready."""

    def __init__(
        self,
        url: str,
        worker_id: str,
        directory: Path,
        *arguments: str | Path,
        faults: Sequence[str] = (),
    ) -> None:
        super().__init__(url, worker_id, directory, *arguments)
        self._command[1:3] = [fault_worker.__file__, *faults, "--"]

    def _is_up(self) -> bool:
        return self.is_dead or self.is_stopped or self.record() is not None

    @property
    def is_dead(self) -> bool:
        return self.process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        return stopped(self.process.pid)

    def await_death(self) -> None:
        """Wait until it has killed itself."""
        until(lambda: self.is_dead, f"worker {self.worker_id} has died")
        assert self.process.returncode == -signal.SIGKILL, self.log

    def await_stop(self) -> None:
        """Wait until it has stopped itself."""
        until(lambda: self.is_stopped, f"worker {self.worker_id} has stopped: {self.log}")

    @property
    def num_known_losses(self) -> int:
        """Runs of which it has understood that they are not its own any more."""
        return self.log.count("lease gone") + self.log.count("end refused")

    def wake_engine(self) -> None:
        """Let an engine that hangs go on."""
        self.process.send_signal(signal.SIGUSR1)


class Fleet:
    """Some workers, and new ones in the place of those that die.

    Args:
        start: Makes a worker of the name that it is given.
        size: How many there are at once.
    """

    def __init__(self, start: Callable[[str], FaultWorker], size: int = 1) -> None:
        self._start = start
        self._size = size
        self.workers: list[FaultWorker] = []
        self.num_started = 0

    @property
    def num_deaths(self) -> int:
        """How many have ended so far, as far as was noticed."""
        return self.num_started - len(self.workers)

    def tend(self) -> None:
        """Replace the dead."""
        self.workers = [worker for worker in self.workers if not worker.is_dead]
        while len(self.workers) < self._size:
            self.num_started += 1
            self.workers.append(self._start(f"w{self.num_started}").__enter__())

    def tend_until_ended(
        self, redis: Redis, job_ids: Collection[str], limit_s: float = 30.0
    ) -> None:
        """Wait until all jobs have ended and tend the fleet meanwhile."""
        left = set(job_ids)

        def all_ended() -> bool:
            self.tend()
            left.difference_update([job_id for job_id in left if ended(redis, job_id)])
            return not left

        until(all_ended, f"the jobs {left} have ended", limit_s)

    def __enter__(self) -> Self:
        self.tend()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.__exit__(kind, error, traceback)


def connect_client(url: str, *, lease_s: float = LEASE_S) -> Client:
    """Return a client that looks around after two of the workers' leases."""
    settings = resolve({"redis": url, "model": MODEL, "lease_s": lease_s})
    return Client(settings=settings)


class Asked:
    """Questions that were sent, and what their answers are to be.

    Args:
        client: Sends them.
        questions: All different.
        max_tokens: Of each answer; up to ``NUM_TOKENS`` it is as long as that.
        options: Of ``Client.chat``.
    """

    def __init__(
        self,
        client: Client,
        *questions: str,
        max_tokens: int = NUM_TOKENS,
        **options: Any,
    ) -> None:
        options = {"max_tokens": max_tokens, "temperature": 0.0, "seed": 1, **options}
        self.texts = [undisturbed_text(question, max_tokens) for question in questions]
        self.streams = [client.chat(question, **options) for question in questions]

    @property
    def jobs(self) -> dict[str, Expected]:
        """What the checker of invariants wants to know."""
        pairs = zip(self.streams, self.texts, strict=True)
        return {stream.job_id: Expected(text=text) for stream, text in pairs}

    def read_on(self, num_pieces: int = 1) -> None:
        """Read some more of every answer."""
        for stream in self.streams:
            for _ in range(num_pieces):
                next(iter(stream))

    def read_all(self) -> list[ChatResult]:
        """Read every answer to its end and check it."""
        results = [stream.result() for stream in self.streams]
        assert [result.text for result in results] == self.texts
        return results


def check_invariants(
    redis: Redis,
    jobs: Mapping[str, Expected],
    *,
    limit_s: float = 5.0,
    foreign: tuple[str, ...] = (),
) -> None:
    """Wait until nothing is wrong any more: a worker sweeps up at its next turn, not at once."""
    deadline = time.monotonic() + limit_s
    while found := violations(redis, MODEL, jobs, foreign=foreign):
        assert time.monotonic() < deadline, "\n".join(found)
        time.sleep(0.05)
