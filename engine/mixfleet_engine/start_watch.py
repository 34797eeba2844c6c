"""How far each rank has come in its start, so that a hang can be named.

Every rank reports its stage in the store where the ranks meet. Who waits for the others reads the
reports: a rank may load for hours as long as the bytes in its report grow.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol, Self

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import StartHangError
from mixfleet_engine.ranks import RanksLostError

START_PATIENCE_S: Final = 120.0
"""A rank that reports nothing new for so long hangs."""
POLL_S: Final = 0.05
"""How often reports are written and read."""


class Stage(IntEnum):
    """What a rank is doing."""

    STARTED = 0
    RENDEZVOUS = 1
    OPENING = 2
    LOADING = 3
    LOADED = 4
    READY = 5

    @property
    def words(self) -> str:
        """The stage in plain words."""
        return _WORDS[self]


_WORDS: Final = {
    Stage.STARTED: "started",
    Stage.RENDEZVOUS: "rendezvous",
    Stage.OPENING: "opening checkpoint",
    Stage.LOADING: "loading weights",
    Stage.LOADED: "making the KV cache",
    Stage.READY: "ready",
}


class Store(Protocol):
    """What is needed of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None:
        """Write."""
        ...

    def get(self, key: str) -> bytes:
        """Read a key that is there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys are there."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank said last."""

    rank: int
    process: int | None = None
    """Process id; None before the first report."""
    stage: Stage = Stage.STARTED
    amount: int = 0
    """Bytes loaded."""

    @classmethod
    def parse(cls, rank: int, text: bytes) -> Self:
        """Return the report that :meth:`text` wrote."""
        process, stage, amount = map(int, text.split())
        return cls(rank, process, Stage(stage), amount)

    def text(self) -> str:
        """Return the form in which it stands in the store."""
        return f"{self.process} {int(self.stage)} {self.amount}"

    def __str__(self) -> str:
        process = "" if self.process is None else f" (process {self.process})"
        amount = f" after {self.amount >> 20} MiB" if self.stage == Stage.LOADING else ""
        return f"rank {self.rank}{process} hangs in stage {self.stage.words!r}{amount}"


class StartWatch:
    """One rank's view of the start of all. A thread of its own writes and reads the reports.

    Not the rank's own thread, because a call to a store whose process is stopped never returns.

    Args:
        store: Where the ranks meet.
        shard: Which rank this is.
        patience_s: How long a report may stay the same.
        is_hosted: Whether somebody else than rank 0 runs the store.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        shard: Shard,
        *,
        patience_s: float = START_PATIENCE_S,
        is_hosted: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._shard = shard
        self._patience_s = patience_s
        self._is_hosted = is_hosted
        self._clock = clock
        self._own = Report(shard.rank, os.getpid())
        self._lock = threading.Lock()
        """Of all that follows."""
        self._seen = {rank: Report(rank) for rank in range(shard.world)}
        self._since = dict.fromkeys(self._seen, clock())
        self._read_at = clock()
        self._failure: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="start-watch", daemon=True)
        self._thread.start()

    def reached(self, stage: Stage, amount: int = 0) -> None:
        """Let the others know that this rank is at ``stage`` and has loaded so many bytes."""
        self._own = Report(self._shard.rank, os.getpid(), stage, amount)

    def wait_for(self, stage: Stage) -> None:
        """Wait until all ranks, this one as well, are at ``stage`` or beyond.

        Raises:
            StartHangError: One of them makes no progress.
            RanksLostError: The store is gone, and rank 0 or torchrun with it.
        """
        begun = self._clock()
        while not self._have_reached(stage, begun):
            time.sleep(POLL_S)

    def close(self) -> None:
        """Report and read nothing any more."""
        self._over.set()
        # Python aborts the process if it ends while this thread is inside torch. One that waits for
        # a stopped process stays there for good, and does no harm.
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        written: Report | None = None
        try:
            while not self._over.is_set():
                if (own := self._own) != written:
                    self._store.set(_key(self._shard.rank), own.text())
                    written = own
                found = [self._read(rank) for rank in range(self._shard.world)]
                self._keep(found)
                self._over.wait(POLL_S)
        except RuntimeError as error:  # torch's only kind
            self._failure = error

    def _read(self, rank: int) -> Report:
        if not self._store.check([_key(rank)]):
            return Report(rank)
        return Report.parse(rank, self._store.get(_key(rank)))

    def _keep(self, found: list[Report]) -> None:
        with self._lock:
            self._read_at = self._clock()
            for report in found:
                if report != self._seen[report.rank]:
                    self._seen[report.rank] = report
                    self._since[report.rank] = self._read_at

    def _have_reached(self, stage: Stage, begun: float) -> bool:
        """Whether all ranks are at ``stage``, as far as was seen since ``begun``."""
        with self._lock:
            now = self._clock()
            lagging = [report for report in self._seen.values() if report.stage < stage]
            if not lagging:
                return True
            if self._failure is not None:
                raise RanksLostError(f"the others are gone: {self._failure}") from self._failure
            if now - max(self._read_at, begun) >= self._patience_s:
                raise StartHangError(self._silence())
            for report in lagging:
                if now - max(self._since[report.rank], begun) >= self._patience_s:
                    raise StartHangError(f"{report}: nothing new for {self._patience_s:g} s")
        return False

    def _silence(self) -> str:
        last = "torchrun's store hangs" if self._is_hosted else str(self._seen[0])
        return f"{last}: no answer for {self._patience_s:g} s"


def _key(rank: int) -> str:
    return f"start/{rank}"
