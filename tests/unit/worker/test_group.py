"""The group's rules with processes that only pretend."""

import signal
import socket
import sys
from collections.abc import Callable, Sequence

import pytest

from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_worker.group import (
    BLAME_S,
    LEAVE_S,
    LOST_STATUS,
    RankGroup,
    rank_command,
    run_ranks,
)


class FakeRank:
    """Ends as told: at SIGTERM with ``on_term``, at SIGKILL always, else never."""

    def __init__(self, pid: int, on_term: int | None = 0) -> None:
        self.pid = pid
        self.status: int | None = None
        self.signals: list[str] = []
        self._on_term = on_term

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.signals.append("TERM")
        if self.status is None:
            self.status = self._on_term

    def kill(self) -> None:
        self.signals.append("KILL")
        self.status = -9

    def wait(self, timeout: float | None = None) -> int:
        del timeout
        assert self.status is not None, "would wait for ever"
        return self.status


class Stage:
    """Ranks, a clock that only pauses move, and what happens at which second."""

    def __init__(self, *ranks: FakeRank) -> None:
        self.ranks = ranks
        self.now = 0.0
        self.lines: list[str] = []
        self.events: list[tuple[float, Callable[[], object]]] = []
        self.parent_gone = False
        self.group = RankGroup(
            spawn=lambda rank: self.ranks[rank],
            world=len(ranks),
            report=self.lines.append,
            abandoned=lambda: self.parent_gone,
            clock=lambda: self.now,
            pause=self._pause,
        )

    def _pause(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000, "the group never ends"
        due = [event for at, event in self.events if at <= self.now]
        self.events = [(at, event) for at, event in self.events if at > self.now]
        for event in due:
            event()

    def end(self, rank: int, status: int, at: float) -> None:
        """Let a rank end at a time."""
        self.events.append((at, lambda: setattr(self.ranks[rank], "status", status)))

    def signals(self) -> list[list[str]]:
        return [rank.signals for rank in self.ranks]


def test_the_group_ends_well_when_rank_0_does_and_the_others_follow() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.end(0, 0, at=5.0)
    stage.end(1, 0, at=5.3)
    assert stage.group.run() == 0
    assert stage.lines == []
    assert stage.signals() == [[], []]
    assert 5.3 <= stage.now < 5.5


def test_a_rank_may_end_a_little_before_rank_0() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.end(1, 0, at=5.0)
    stage.end(0, 0, at=6.0)
    assert stage.group.run() == 0
    assert stage.lines == []


def test_who_does_not_follow_rank_0_to_the_end_is_killed() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.end(0, 0, at=1.0)
    assert stage.group.run() == 0
    assert stage.signals() == [[], ["KILL"]]
    assert stage.now < 1.0 + LEAVE_S + 1


@pytest.mark.parametrize("status", [-9, 1])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_ends_all_and_is_named(victim: int, status: int) -> None:
    stage = Stage(*(FakeRank(pid, on_term=LOST_STATUS) for pid in (10, 11, 12)))
    stage.end(victim, status, at=5.0)
    assert stage.group.run() == 1
    how = "signal 9" if status == -9 else "exit status 1"
    assert stage.lines == [
        f"rank {victim} of 3 (process {10 + victim}) ended: {how}; ending the others"
    ]
    assert all(rank.status is not None for rank in stage.ranks)
    assert stage.now < 5.0 + LEAVE_S


def test_rank_0_gets_time_to_give_its_jobs_back_before_it_is_killed() -> None:
    stage = Stage(FakeRank(10, on_term=None), FakeRank(11))
    stage.end(1, -9, at=1.0)
    assert stage.group.run() == 1
    assert stage.signals() == [["TERM", "KILL"], []]
    assert 1.0 + LEAVE_S <= stage.now < 1.0 + LEAVE_S + BLAME_S + 1


def test_the_rank_that_died_is_blamed_and_not_those_that_noticed() -> None:
    stage = Stage(FakeRank(10), FakeRank(11), FakeRank(12))
    stage.end(0, LOST_STATUS, at=1.0)
    stage.end(1, LOST_STATUS, at=1.0)
    stage.end(2, -11, at=1.0 + BLAME_S / 2)
    assert stage.group.run() == 1
    assert stage.lines == ["rank 2 of 3 (process 12) ended: signal 11; ending the others"]


def test_a_rank_that_gave_up_on_one_that_is_still_there_is_named() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.end(0, LOST_STATUS, at=1.0)
    assert stage.group.run() == 1
    assert stage.lines == [
        f"rank 0 of 2 (process 10) ended: exit status {LOST_STATUS}; ending the others"
    ]
    assert stage.signals() == [[], ["KILL"]]


def test_stops_go_to_rank_0_only_each_once() -> None:
    stage = Stage(FakeRank(10, on_term=None), FakeRank(11))
    stage.events.append((1.0, stage.group.stop))
    stage.events.append((2.0, stage.group.stop))
    stage.end(0, 0, at=3.0)
    stage.end(1, 0, at=3.0)
    assert stage.group.run() == 0
    assert stage.signals() == [["TERM", "TERM"], []]


def test_a_stop_while_the_ranks_load_is_no_failure() -> None:
    stage = Stage(FakeRank(10, on_term=-15), FakeRank(11))
    stage.events.append((1.0, stage.group.stop))
    assert stage.group.run() == 0
    assert stage.lines == []
    assert all(rank.status is not None for rank in stage.ranks)


def test_a_term_signal_that_nobody_asked_us_for_is_a_failure() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.end(0, -15, at=1.0)
    assert stage.group.run() == 1
    assert stage.lines == ["rank 0 of 2 (process 10) ended: signal 15; ending the others"]


def test_a_rank_that_dies_in_the_drain_is_named() -> None:
    stage = Stage(FakeRank(10, on_term=None), FakeRank(11))
    stage.events.append((1.0, stage.group.stop))
    stage.end(1, -9, at=2.0)
    stage.end(0, LOST_STATUS, at=2.1)
    assert stage.group.run() == 1
    assert stage.lines == ["rank 1 of 2 (process 11) ended: signal 9; ending the others"]


def test_without_its_parent_the_group_drains() -> None:
    stage = Stage(FakeRank(10), FakeRank(11))
    stage.events.append((1.0, lambda: setattr(stage, "parent_gone", True)))
    stage.end(1, 0, at=2.0)
    assert stage.group.run() == 0
    assert stage.signals() == [["TERM"], []]


def test_a_rank_that_cannot_be_started_leaves_no_other_behind() -> None:
    first = FakeRank(10)

    def spawn(rank: int) -> FakeRank:
        if rank == 1:
            raise OSError("no more processes")
        return first

    group = RankGroup(spawn=spawn, world=2, report=lambda _: None)
    with pytest.raises(OSError, match="no more"):
        group.run()
    assert first.signals == ["KILL"]


def test_each_rank_is_told_its_place_in_torchruns_words(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Rendezvous | None] = []
    loopback = {name for _, name in socket.if_nameindex() if name.startswith("lo")}

    class Popen(FakeRank):
        def __init__(self, command: Sequence[str], env: dict[str, str], **_: object) -> None:
            super().__init__(1)
            assert command == ["x"]
            assert env["GLOO_SOCKET_IFNAME"] in loopback
            places.append(Rendezvous.from_environment(env))
            self.status = 0

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("mixfleet_worker.group.subprocess.Popen", Popen)
    before = signal.getsignal(signal.SIGTERM)
    assert run_ranks(["x"], 3, report=lambda _: None) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    found = [place for place in places if place is not None]
    assert [place.shard.rank for place in found] == [0, 1, 2]
    assert {(place.shard.world, place.host, place.is_hosted) for place in found} == {
        (3, "127.0.0.1", False)
    }
    assert len({place.port for place in found}) == 1


def test_a_rank_runs_the_same_command_with_the_same_flags() -> None:
    command = rank_command({"model_path": "/models/a b", "max_batch_size": "4"})
    assert command[:3] == [sys.executable, "-m", "mixfleet_worker"]
    assert command[-4:] == ["--model-path", "/models/a b", "--max-batch-size", "4"]
    assert "--tp" not in command
