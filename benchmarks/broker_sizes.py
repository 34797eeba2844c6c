"""How much the broker's benchmark does: the full sizes, and small ones that take seconds."""

import os
from dataclasses import dataclass
from typing import Literal, Self

Way = Literal["one connection", "100 a connection", "own connections", "pub/sub", "polling"]
"""How readers get their chunks. The first three read our streams: all over one connection, as a
gateway does; over one for every hundred; each over its own, as a client does. Pub/sub is Redis's
own, which keeps nothing: the floor. Polling is AIME's way: the whole text every 0.3 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCase:
    """So many streams that are written and read at the same time."""

    streams: int
    chunks_per_s: float
    """Of each stream; 0: as fast as it goes."""
    way: Way
    streams_per_worker: int

    @property
    def name(self) -> str:
        """The case in words."""
        rate = f"at {self.chunks_per_s:g}/s" if self.chunks_per_s else "at full speed"
        return f"{self.streams} streams {rate}, {self.way}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured, and how much of it."""

    jobs: int
    """Of one measurement of a rate; rq, which takes longest, gets a third."""
    depths: tuple[int, ...]
    """Jobs that wait while the calls are timed."""
    samples: int
    """Calls of each kind that are timed at each depth."""
    chunk_cases: tuple[ChunkCase, ...]
    chunk_warmup_s: float
    chunk_s: float
    """How long each case is measured."""
    cost_jobs: int
    """Jobs over which processor time and memory are averaged."""
    cost_calls: int
    """Calls over which round trips and commands are averaged."""
    eta_burst: int
    """Jobs that come at once."""
    eta_arrivals_per_s: float
    eta_arrivals_s: float
    """How long more jobs come, one by one."""
    kept_jobs: int
    """Jobs that end, and are to be gone later."""
    kept_s: int
    """How long they are kept."""

    @classmethod
    def full(cls) -> Self:
        """Return what the command measures."""
        return cls(
            jobs=3000,
            depths=(100, 1000, 10_000, 100_000),
            samples=40,
            chunk_cases=_full_cases(),
            chunk_warmup_s=0.7,
            chunk_s=3.0,
            cost_jobs=1000,
            cost_calls=50,
            eta_burst=200,
            eta_arrivals_per_s=20.0,
            eta_arrivals_s=5.0,
            kept_jobs=100_000,
            kept_s=5,
        )

    @classmethod
    def small(cls) -> Self:
        """Return enough to see that everything runs; the figures mean nothing."""
        cases = [ChunkCase(streams=8, chunks_per_s=20, way=w, streams_per_worker=4) for w in _WAYS]
        return cls(
            jobs=48,
            depths=(40, 200),
            samples=2,
            chunk_cases=tuple(cases),
            chunk_warmup_s=0.1,
            chunk_s=0.3,
            cost_jobs=20,
            cost_calls=2,
            eta_burst=20,
            eta_arrivals_per_s=20.0,
            eta_arrivals_s=0.3,
            kept_jobs=200,
            kept_s=1,
        )


_WAYS: tuple[Way, ...] = (
    "one connection",
    "100 a connection",
    "own connections",
    "pub/sub",
    "polling",
)


def _full_cases() -> tuple[ChunkCase, ...]:
    """Return the cases of the full run.

    20 chunks a second are a fast answer. At 1,000 streams half of that is 10,000 chunks a second,
    and so are 2 a second at 5,000: two cores that also hold the writers and the readers carry no
    more of it (see the full-speed rows).
    """
    cases = []
    for streams, chunks_per_s, per_worker in ((64, 20, 64), (256, 20, 128), (1000, 10, 125)):
        for way in _WAYS:
            if way != "own connections" or streams <= 256:
                cases.append((streams, float(chunks_per_s), way, per_worker))
    cases += [(1000, 20.0, "100 a connection", 125)]
    cases += [(5000, 2.0, way, 125) for way in _WAYS if way != "own connections"]
    cases += [(64, 0.0, "one connection", 64), (1000, 0.0, "100 a connection", 125)]
    return tuple(
        ChunkCase(streams=streams, chunks_per_s=rate, way=way, streams_per_worker=per_worker)
        for streams, rate, way, per_worker in cases
    )


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
