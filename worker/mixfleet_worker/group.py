"""The ranks of one worker: processes that share a model, start together and end together.

One rank without the others is of no use, and a sum that waits for a rank that is gone never comes.
So whoever starts them watches over them: the end of one is the end of all.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from mixfleet_engine.config import Shard
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_worker.supervisor import Process, described

LOST_STATUS: Final = 75
"""Exit status of a rank that ends because another one has: it is not the one to blame."""
LOOPBACK: Final = "127.0.0.1"
POLL_S: Final = 0.05
BLAME_S: Final = 1.0
"""How long a rank's death may show in the others before it shows itself."""
LEAVE_S: Final = 5.0
"""How long ranks have to end once one has; rank 0 gives its jobs back meanwhile."""


class GroupLostError(Exception):
    """Another rank of this worker is gone; this one ends too and its jobs go elsewhere."""


class RankGroup:
    """Runs N ranks until all have ended.

    Args:
        spawn: Starts the process of one rank.
        world: How many ranks.
        report: Told why the group ends before its time, in one line.
        abandoned: Whether the process that this worker belongs to is gone.
        clock: Monotonic seconds.
        pause: Waits so many seconds.
    """

    def __init__(
        self,
        *,
        spawn: Callable[[int], Process],
        world: int,
        report: Callable[[str], None],
        abandoned: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spawn = spawn
        self._world = world
        self._report = report
        self._abandoned = abandoned
        self._clock = clock
        self._pause = pause
        self._processes: list[Process] = []
        self._num_stops = 0
        self._num_told = 0

    def stop(self) -> None:
        """Let rank 0 drain; asked twice, let it leave at once. Safe in a signal handler."""
        self._num_stops += 1

    def run(self) -> int:
        """Start the ranks, watch them and return the exit status of the group.

        0: rank 0 has ended as it should, and the others with it.
        """
        try:
            for rank in range(self._world):
                self._processes.append(self._spawn(rank))
            while self._all_well():
                self._pass_on_stops()
                self._pause(POLL_S)
            return self._end()
        finally:
            self._kill()

    def _all_well(self) -> bool:
        """Whether rank 0 runs and no rank has failed."""
        statuses = self._statuses()
        return statuses[0] is None and not any(statuses)

    def _statuses(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def _pass_on_stops(self) -> None:
        if self._num_stops == 0 and self._abandoned():
            self.stop()
        # Only to rank 0: the others end when it tells them that there are no more steps.
        while self._num_told < self._num_stops:
            self._num_told += 1
            self._processes[0].terminate()

    def _end(self) -> int:
        """End the group because one rank has ended."""
        if self._has_left():
            self._await(lambda: None not in self._statuses(), LEAVE_S)
            return 0
        self._await(self._shows_culprit, BLAME_S)
        self._report(self._reason())
        if self._processes[0].poll() is None:
            self._processes[0].terminate()
        self._await(lambda: self._processes[0].poll() is not None, LEAVE_S)
        return 1

    def _has_left(self) -> bool:
        """Whether rank 0 has ended as it should; before it serves, a stop ends it at once."""
        status = self._processes[0].poll()
        return status == 0 or (self._num_told > 0 and status == -signal.SIGTERM)

    def _shows_culprit(self) -> bool:
        return any(status not in (None, 0, LOST_STATUS) for status in self._statuses())

    def _reason(self) -> str:
        statuses = self._statuses()
        blame = [status not in (None, 0, LOST_STATUS) for status in statuses]
        if not any(blame):  # a rank waits in vain for one that is still there
            blame = [status == LOST_STATUS for status in statuses]
        rank = blame.index(True)
        how = described(statuses[rank] or 0)
        process = self._processes[rank].pid
        return f"rank {rank} of {self._world} (process {process}) ended: {how}; ending the others"

    def _await(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline = self._clock() + limit_s
        while not condition() and self._clock() < deadline:
            self._pause(POLL_S)

    def _kill(self) -> None:
        """Leave nobody behind. Ranks other than the first own nothing that would be lost."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_ranks(
    command: Sequence[str],
    world: int,
    *,
    report: Callable[[str], None],
    abandoned: Callable[[], bool] = lambda: False,
) -> int:
    """Run ``command`` as ``world`` ranks on this machine and return the group's exit status.

    Each process learns its rank from its environment, in the words of torchrun. SIGTERM and SIGINT
    go to rank 0 only.

    Args:
        command: What every rank runs.
        world: How many ranks.
        report: Told why the group ends before its time, in one line.
        abandoned: Whether the process that this worker belongs to is gone.
    """
    port = _free_port()

    def spawn(rank: int) -> Process:
        place = Rendezvous(
            shard=Shard(rank=rank, world=world), local_rank=rank, host=LOOPBACK, port=port
        )
        return subprocess.Popen(
            command,
            env=_environment(place),
            stdin=subprocess.DEVNULL,
            # Out of the terminal's reach: Ctrl-C comes to us, and we end them in order.
            start_new_session=True,
        )

    group = RankGroup(spawn=spawn, world=world, report=report, abandoned=abandoned)
    with _stopped_by_signals(group.stop):
        return group.run()


def rank_command(flags: Mapping[str, str]) -> list[str]:
    """Return the command of one rank of a worker with these flags."""
    command = [sys.executable, "-m", "mixfleet_worker", "--parent-pid", str(os.getpid())]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", value]
    return command


def _environment(place: Rendezvous) -> dict[str, str]:
    # Of a rank that dies, the others' torch would tell in pages of C++ frames.
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    # Else gloo looks for the address of the host's name, which a container may not know.
    gloo = {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}
    return quiet | gloo | dict(os.environ) | place.as_environment()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's own form
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
