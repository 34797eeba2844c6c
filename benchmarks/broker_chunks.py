"""From a worker's append to the reader's hand: latency, and how many chunks a second get there.

Writers, readers and Redis share this machine's cores, so the processor time of each is told too.
A case whose chunks arrive at less than the planned rate was too much for them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.broker_jobs import bench_queue, leases_of
from benchmarks.broker_processes import Call, run_together
from benchmarks.broker_readers import Read, poll_snapshots, read_pubsub, read_streams
from benchmarks.broker_server import BenchServer, cpu_s, settle
from benchmarks.broker_sizes import ChunkCase, Sizes, Way
from benchmarks.broker_statistics import spread
from benchmarks.broker_writers import Medium, Window, Written, write
from mixfleet_broker.records import Lease

_ANSWER_S: Final = 30.0
_READERS: Final[dict[Way, tuple[Medium, Callable[..., Read], int]]] = {
    "one connection": ("streams", read_streams, 0),
    "100 a connection": ("streams", read_streams, 100),
    "own connections": ("streams", read_streams, 1),
    "pub/sub": ("pubsub", read_pubsub, 0),
    "polling": ("snapshots", poll_snapshots, 0),
}
"""By way: where the text is, who reads it, and channels per connection, 0 for all."""


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the latencies by case."""
    return {case.name: measure_case(folder, sizes, case) for case in sizes.chunk_cases}


def measure_case(folder: Path, sizes: Sizes, case: ChunkCase) -> dict[str, Any]:
    """Return what became of the chunks of one case, on a server of its own."""
    window = Window(warmup_s=sizes.chunk_warmup_s, measured_s=sizes.chunk_s)
    medium, reader, per_connection = _READERS[case.way]
    with BenchServer(folder) as server, server.client() as redis:
        leases = leases_of(bench_queue(redis), case.streams)
        settle(redis)
        workers = split(leases, case.streams_per_worker)
        groups = split(leases, per_connection or len(leases))
        calls = [
            Call(write, (server.url, workers, medium, case.chunks_per_s, window)),
            Call(reader, (server.url, groups, window)),
        ]
        redis_s = cpu_s(redis)
        written, read = run_together(calls, timeout_s=window.end_s + _ANSWER_S)
        redis_s = cpu_s(redis) - redis_s
    return _figures(case, window, written, read, redis_s)


def split(leases: Sequence[Lease], size: int) -> list[Sequence[Lease]]:
    """Return ``leases`` in groups of at most ``size``."""
    return [leases[i : i + size] for i in range(0, len(leases), size)]


def _figures(
    case: ChunkCase, window: Window, written: Written, read: Read, redis_s: float
) -> dict[str, Any]:
    latencies = list(read.latencies_ms)
    return {
        "streams": case.streams,
        "way": case.way,
        "chunks_per_s_per_stream": case.chunks_per_s,
        "planned_per_s": case.streams * case.chunks_per_s,
        "appended_per_s": written.num_in_window / window.measured_s,
        "read_per_s": len(latencies) / window.measured_s,
        "latency_ms": spread(latencies),
        "step_ms": spread(written.step_ms),
        "late_ms": spread(written.late_ms if case.chunks_per_s else ()),
        "gaps": read.num_gaps,
        "cores_used": {
            "writers": written.cpu_s / window.end_s,
            "readers": read.cpu_s / window.end_s,
            "redis": redis_s / window.end_s,
        },
    }
