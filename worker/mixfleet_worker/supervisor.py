"""Keeps the processes of one machine running."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A process that lived so long has earned a quick restart."""
LEAVE_S = 10.0
"""How long a process may take to end once its drain is over."""
POLL_S = 0.05


class Process(Protocol):
    """What is needed of ``subprocess.Popen``."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to drain; asked twice it leaves at once."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises ``subprocess.TimeoutExpired``."""
        ...


@dataclass(slots=True)
class _Place:
    """One process that should be there."""

    process: Process
    started_at: float
    backoff_s: float = FIRST_BACKOFF_S
    restart_at: float | None = None
    """None while the process runs, infinite when it is not to run again."""


class Supervisor:
    """Starts processes, restarts those that die, and ends them.

    A process that ends without an error was told to, and stays away.

    Args:
        spawn: Starts process number n.
        report: Told what happens, one line each.
        name: Says what process number n is.
        clock: Monotonic seconds.
        pause: Waits so many seconds.
    """

    def __init__(
        self,
        *,
        spawn: Callable[[int], Process],
        report: Callable[[str], None],
        name: Callable[[int], str] = "worker {}".format,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spawn = spawn
        self._report = report
        self._name = name
        self._clock = clock
        self._pause = pause
        self._places: dict[int, _Place] = {}

    def start(self, number: int) -> Process:
        """Start process ``number`` and look after it from now on."""
        process = self._spawn(number)
        self._places[number] = _Place(process, self._clock())
        return process

    def check(self) -> None:
        """Notice the processes that ended and restart those whose time has come."""
        for number, place in self._places.items():
            if place.restart_at is None:
                self._notice(number, place)
            elif self._clock() >= place.restart_at:
                place.process, place.started_at = self._spawn(number), self._clock()
                place.restart_at = None
                self._report(f"{self._name(number)}: started again, process {place.process.pid}")

    def _notice(self, number: int, place: _Place) -> None:
        status = place.process.poll()
        if status is None:
            return
        if status == 0:  # it was told to, by an operator or a signal
            place.restart_at = math.inf
            self._report(
                f"{self._name(number)}: process {place.process.pid} has left, as it was told"
            )
            return
        now = self._clock()
        if now - place.started_at >= STEADY_S:
            place.backoff_s = FIRST_BACKOFF_S
        place.restart_at = now + place.backoff_s
        self._report(
            f"{self._name(number)}: process {place.process.pid} ended ({described(status)}), "
            f"starting it again in {place.backoff_s:g} s"
        )
        place.backoff_s = min(2 * place.backoff_s, LAST_BACKOFF_S)

    def stop(self, drain_s: float) -> None:
        """Let all processes drain and end; Ctrl-C meanwhile makes them leave at once."""
        self._terminate()
        try:
            left = self._await_ends(drain_s + LEAVE_S)
        except KeyboardInterrupt:
            self._report("leaving at once; unfinished answers go back to the queue")
            self._terminate()
            left = self._await_ends(LEAVE_S)
        for process in left:
            self._report(f"process {process.pid} does not end, killing it")
            process.kill()
            process.wait()

    def _running(self) -> list[Process]:
        processes = [place.process for place in self._places.values()]
        return [process for process in processes if process.poll() is None]

    def _terminate(self) -> None:
        for process in self._running():
            process.terminate()

    def _await_ends(self, limit_s: float) -> list[Process]:
        """Return the processes that still run after ``limit_s``."""
        deadline = self._clock() + limit_s
        while (left := self._running()) and self._clock() < deadline:
            self._pause(POLL_S)
        return left


def described(status: int) -> str:
    """Return an exit status in words: "exit status 1", "signal 9"."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"
