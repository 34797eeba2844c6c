"""The broker beside its peers and its floor: rates, depth, latency, costs, estimates, retention.

    python -m benchmarks broker [--rounds 3] [--parts rates depth chunks costs eta retention]
                                [--peers rq celery] [--small]

It starts a Redis of its own for each measurement, on loopback, set as in production, and ends by
itself. Writers, readers and Redis share the cores of this machine: run it on a quiet one.
"""

import argparse
import importlib.util
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from platformdirs import user_cache_path

from benchmarks import (
    broker_chunks,
    broker_costs,
    broker_depth,
    broker_eta,
    broker_rates,
    broker_report,
    broker_retention,
    report,
)
from benchmarks.broker_goals import goals
from benchmarks.broker_server import server_version
from benchmarks.broker_sizes import Sizes, num_cores
from benchmarks.broker_statistics import rounded
from benchmarks.engine_report import medians
from benchmarks.peers.celery_redis import make as celery_redis
from benchmarks.peers.installing import PeerError
from benchmarks.report import say

PARTS: Final = ("rates", "depth", "chunks", "costs", "eta", "retention")
PEERS: Final = ("rq", "celery")
_ONCE: Final = frozenset({"eta", "retention"})
"""They take long, and average over hundreds of jobs by themselves: the first round only."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options; ``--peers`` without a word means none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks broker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--small", action="store_true", help="try it in a minute; writes nothing")
    parser.add_argument("--work-dir", type=Path, help="default: in the user's cache folder")
    return parser.parse_args(arguments)


class Bench:
    """One run.

    Args:
        folder: Where servers, logs and peers go.
        sizes: How much is measured.
        peers: Who takes part beside us.
    """

    def __init__(self, folder: Path, sizes: Sizes, peers: list[str]) -> None:
        self.absent: dict[str, str] = {}
        self._folder = folder / "broker"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sizes = sizes
        self._peers = peers
        self._celery = (
            self._install(folder / "peers" / "celery_redis") if "celery" in peers else None
        )

    def measure(self, part: str) -> dict[str, Any]:
        """Return the figures of one part."""
        if part == "rates":
            return self._rates()
        measured: dict[str, Any] = _MEASURES[part](self._folder, self._sizes)
        return measured

    def _rates(self) -> dict[str, Any]:
        found = {"mixfleet": broker_rates.measure(self._folder, self._sizes)}
        if "rq" in self._peers:
            found["rq"] = broker_rates.measure_rq(self._folder, self._sizes)
        if self._celery is not None:
            try:
                found["celery"] = broker_rates.measure_celery(
                    self._folder, self._sizes, self._celery
                )
            except PeerError as error:
                self._leave_out("celery", error)
        return {**found, "floor": broker_rates.measure_floor(self._folder, self._sizes)}

    def _install(self, folder: Path) -> Path | None:
        try:
            return celery_redis.make(folder, say)
        except PeerError as error:
            self._leave_out("celery", error)
            return None

    def _leave_out(self, peer: str, error: PeerError) -> None:
        self.absent[peer] = str(error)
        self._celery = None
        say(f"{peer}: absent: {error}")


_MEASURES: Final = {
    "depth": broker_depth.measure,
    "chunks": broker_chunks.measure,
    "costs": broker_costs.measure,
    "eta": broker_eta.measure,
    "retention": broker_retention.measure,
}


def run_rounds(bench: Bench, parts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return the figures of each round by part; the parts take turns."""
    found: list[dict[str, Any]] = []
    for number in range(rounds):
        figures: dict[str, Any] = {}
        for part in parts:
            if number and part in _ONCE:
                continue
            started = time.perf_counter()
            figures[part] = rounded(bench.measure(part))
            say(f"round {number + 1} {part}: {time.perf_counter() - started:.0f} s")
        found.append(figures)
    return found


def versions(peers: list[str]) -> dict[str, str]:
    """Return what takes part, by name."""
    has_hiredis = importlib.util.find_spec("hiredis") is not None
    found = {
        "server": server_version(),
        "redis-py": version("redis"),
        "hiredis": version("hiredis") if has_hiredis else "not installed",
    }
    return found | ({"rq": version("rq")} if "rq" in peers else {})


def main() -> None:
    """Measure, print the tables, and write the JSON."""
    arguments = parse_arguments(sys.argv[1:])
    # As Ctrl-C does: no server may be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    sizes = Sizes.small() if arguments.small else Sizes.full()
    folder = arguments.work_dir or user_cache_path("mixfleet") / "benchmarks"
    load = os.getloadavg()[0]
    bench = Bench(folder, sizes, arguments.peers)
    runs = run_rounds(bench, arguments.parts, arguments.rounds)
    parts = rounded(medians(runs))
    found = goals(parts)
    print(broker_report.text(parts, found, bench.absent))
    if not arguments.small:
        record = {
            "rounds": arguments.rounds,
            "cores": num_cores(),
            "load_at_start": load,
            "versions": versions(arguments.peers),
            **parts,
            "goals": found,
            # The last line of what failed is its error; those before name folders.
            "absent": {name: why.rpartition(" / ")[2] for name, why in bench.absent.items()},
            "each_round": runs,
        }
        print(report.write("broker", record))


if __name__ == "__main__":
    main()
