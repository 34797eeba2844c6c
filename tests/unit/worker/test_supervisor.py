import subprocess
from collections.abc import Callable

import pytest

from mixfleet_worker.supervisor import (
    FIRST_BACKOFF_S,
    LAST_BACKOFF_S,
    LEAVE_S,
    STEADY_S,
    Supervisor,
    described,
)


class FakeProcess:
    """Ends when told to; `stubborn` counts the requests it ignores first."""

    def __init__(self, pid: int, stubborn: int = 0) -> None:
        self.pid = pid
        self.status: int | None = None
        self.signals: list[str] = []
        self._stubborn = stubborn

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.signals.append("TERM")
        if len(self.signals) > self._stubborn:
            self.status = 0

    def kill(self) -> None:
        self.signals.append("KILL")
        self.status = -9

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            raise subprocess.TimeoutExpired("fake", timeout or 0.0)
        return self.status


class Fixture:
    def __init__(self, stubborn: int = 0) -> None:
        self.now = 0.0
        self.processes: list[FakeProcess] = []
        self.lines: list[str] = []
        self.on_pause: Callable[[], None] = lambda: None
        self._stubborn = stubborn
        self.supervisor = Supervisor(
            spawn=self._spawn, report=self.lines.append, clock=lambda: self.now, pause=self._pause
        )

    def _spawn(self, number: int) -> FakeProcess:
        process = FakeProcess(100 * number + len(self.processes), self._stubborn)
        self.processes.append(process)
        return process

    def _pause(self, seconds: float) -> None:
        self.now += seconds
        self.on_pause()


def test_a_process_that_died_is_started_again_after_a_while() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    fleet.processes[0].status = -9
    fleet.supervisor.check()
    assert len(fleet.processes) == 1
    fleet.now += FIRST_BACKOFF_S
    fleet.supervisor.check()
    assert len(fleet.processes) == 2
    assert "worker 1" in fleet.lines[0]
    assert "signal 9" in fleet.lines[0]
    assert str(fleet.processes[1].pid) in fleet.lines[1]


def test_a_process_that_runs_is_left_alone() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    fleet.supervisor.check()
    assert (len(fleet.processes), fleet.lines) == (1, [])


def test_a_death_is_told_once() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    fleet.processes[0].status = 1
    for _ in range(3):
        fleet.supervisor.check()
    assert len(fleet.lines) == 1


def deaths_in_a_row(fleet: Fixture, num_deaths: int) -> list[float]:
    """Let each new process die at once; return how long each restart took."""
    waits = []
    for _ in range(num_deaths):
        fleet.processes[-1].status = 1
        fleet.supervisor.check()
        died_at, count = fleet.now, len(fleet.processes)
        while len(fleet.processes) == count:
            fleet.now += 0.5
            fleet.supervisor.check()
        waits.append(fleet.now - died_at)
    return waits


def test_one_that_dies_again_and_again_waits_longer_and_longer() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    assert deaths_in_a_row(fleet, 7) == [1.0, 2.0, 4.0, 8.0, 16.0, LAST_BACKOFF_S, LAST_BACKOFF_S]


def test_one_that_lived_long_is_restarted_quickly() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    deaths_in_a_row(fleet, 4)
    fleet.now += STEADY_S
    assert deaths_in_a_row(fleet, 1) == [FIRST_BACKOFF_S]


def test_stop_lets_all_drain() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    fleet.supervisor.start(2)
    fleet.supervisor.stop(drain_s=30.0)
    assert [process.signals for process in fleet.processes] == [["TERM"], ["TERM"]]


def test_stop_does_not_wait_for_the_dead() -> None:
    fleet = Fixture()
    fleet.supervisor.start(1)
    fleet.processes[0].status = 1
    fleet.supervisor.stop(drain_s=30.0)
    assert (fleet.now, fleet.processes[0].signals) == (0.0, [])


def test_one_that_never_ends_is_killed_when_its_time_is_over() -> None:
    fleet = Fixture(stubborn=99)
    fleet.supervisor.start(1)
    fleet.supervisor.stop(drain_s=5.0)
    assert fleet.processes[0].signals == ["TERM", "KILL"]
    assert fleet.now == pytest.approx(5.0 + LEAVE_S, abs=0.1)


def test_a_second_interrupt_asks_again() -> None:
    fleet = Fixture(stubborn=1)
    fleet.supervisor.start(1)

    def interrupt() -> None:
        fleet.on_pause = lambda: None
        raise KeyboardInterrupt

    fleet.on_pause = interrupt
    fleet.supervisor.stop(drain_s=30.0)
    assert fleet.processes[0].signals == ["TERM", "TERM"]


@pytest.mark.parametrize(("status", "words"), [(-15, "signal 15"), (3, "exit status 3")])
def test_exit_statuses_are_told_in_words(status: int, words: str) -> None:
    assert described(status) == words
