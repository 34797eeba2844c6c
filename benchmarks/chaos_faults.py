"""Trouble: workers that are killed, paused, drained and replaced, and a Redis that is killed."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from support.proxy import Proxy
from support.redis_server import RedisServer
from support.worker_process import WorkerProcess

TURN_S = 0.05
LEASE_S = 15.0
"""The default, as a user's fleet has it."""
WORKER = ("--simulated", "--simulated-step-s", "0.02", "--drain-s", "1", "--max-batch-size", "8")
RESULT_TTL_S = "7200"
LOST_REPLIES = 0.002
DELAY_S = 0.002
EVERY_S = {"killed": 7.0, "paused": 45.0, "drained": 30.0, "Redis killed": 80.0, "cut": 25.0}
"""How often each thing happens, on average."""
REDIS_AWAY_S = 1.0


@dataclass(eq=False, slots=True)
class _Place:
    """One worker that should be there."""

    url: str
    worker: WorkerProcess | None = None
    resume_at: float | None = None
    """When a paused one goes on: after its lease has ended."""
    start_at: float = 0.0


class Trouble:
    """Workers on a server, and what happens to them; a context manager.

    Args:
        server: With its log on disk, so that it may be killed.
        folder: For logs.
        num_workers: How many there should be; every other one has a bad network.
        source: Of chance.
    """

    def __init__(
        self, server: RedisServer, folder: Path, *, num_workers: int, source: random.Random
    ) -> None:
        self._server = server
        self._folder = folder
        self._num_workers = num_workers
        self._source = source
        self._stack = ExitStack()
        self._places: list[_Place] = []
        self._num_started = 0
        self._next: dict[str, float] = {}
        self.done: Counter[str] = Counter()
        """What happened, and how often."""

    def __enter__(self) -> Self:
        proxy = self._stack.enter_context(Proxy(self._server.socket, seed=1))
        proxy.loss, proxy.delay_s = LOST_REPLIES, DELAY_S
        self._proxy = proxy
        for number in range(self._num_workers):
            self._places.append(_Place(proxy.url if number % 2 else self._server.url))
        self._fill()
        self._next = {name: time.monotonic() + self._pause(name) for name in EVERY_S}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for place in self._places:
            if place.worker is not None:
                place.worker.__exit__(kind, error, traceback)
        self._stack.close()
        self.done["replies lost"] = self._proxy.num_lost

    def turn(self) -> None:
        """Let happen what is due, and replace the dead."""
        time.sleep(TURN_S)
        now = time.monotonic()
        acts: dict[str, Callable[[], bool]] = {
            "killed": self._kill,
            "paused": self._pause_one,
            "drained": self._drain,
            "Redis killed": self._kill_redis,
            "cut": self._cut,
        }
        for name, at in list(self._next.items()):
            if now >= at:
                self.done[name] += acts[name]()
                self._next[name] = time.monotonic() + self._pause(name)
        self._resume()
        self._fill()

    def calm(self) -> None:
        """Let nothing happen any more."""
        self._proxy.loss = 0.0
        self._next = {}
        for place in self._places:
            place.resume_at = place.resume_at and 0.0
        self._resume()
        self._fill()

    def _pause(self, name: str) -> float:
        return self._source.expovariate(1 / EVERY_S[name])

    def _chosen(self) -> _Place | None:
        awake = [
            place
            for place in self._places
            if place.worker is not None and place.resume_at is None and _lives(place.worker)
        ]
        return self._source.choice(awake) if awake else None

    def _kill(self) -> bool:
        place = self._chosen()
        if place is not None and place.worker is not None:
            place.worker.kill()
        return place is not None

    def _pause_one(self) -> bool:
        place = self._chosen()
        if place is not None and place.worker is not None:
            place.worker.pause()
            place.resume_at = time.monotonic() + LEASE_S + self._source.uniform(1, 8)
        return place is not None

    def _drain(self) -> bool:
        place = self._chosen()
        if place is not None and place.worker is not None:
            place.worker.terminate()
        return place is not None

    def _kill_redis(self) -> bool:
        self._server.kill()
        time.sleep(self._source.uniform(0.0, 2 * REDIS_AWAY_S))
        self._server.start()
        return True

    def _cut(self) -> bool:
        self._proxy.reset()
        return True

    def _resume(self) -> None:
        for place in self._places:
            if place.resume_at is not None and time.monotonic() >= place.resume_at:
                place.resume_at = None
                if place.worker is not None:
                    place.worker.process.send_signal(signal.SIGCONT)

    def _fill(self) -> None:
        """Start a worker wherever none is; it need not be ready when the next thing happens."""
        for place in self._places:
            if place.worker is None or not _lives(place.worker):
                self._num_started += 1
                place.worker = WorkerProcess(
                    place.url,
                    f"w{self._num_started}",
                    self._folder,
                    *(*WORKER, "--lease-s", str(LEASE_S), "--result-ttl-s", RESULT_TTL_S),
                )
                place.worker.launch()


def _lives(worker: WorkerProcess) -> bool:
    return worker.process.poll() is None
