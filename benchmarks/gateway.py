"""The gateway beside its floor: streams over HTTP, and the same streams read from Redis directly.

    python -m benchmarks gateway [--rounds 3] [--small]

Redis, one gateway, one simulated worker and one process of clients share this machine, on loopback;
it ends by itself. The worker writes the time instead of words, so that every chunk says how old it
is when it arrives.
"""

import argparse
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from platformdirs import user_cache_path

from benchmarks import report
from benchmarks.broker_processes import Call, run_together
from benchmarks.broker_server import BenchServer, cpu_s, server_version
from benchmarks.broker_sizes import num_cores
from benchmarks.broker_statistics import rounded, spread
from benchmarks.engine_report import medians
from benchmarks.gateway_clients import Plan, Seen, by_polling, from_channels, over_http, requests
from benchmarks.gateway_worker import Pace, serve
from benchmarks.report import say

CASES: Final = {1: 20.0, 64: 20.0, 512: 5.0, 2000: 2.0}
"""Streams, and the tokens per second of each."""
SLOTS: Final = 64
"""Of each worker."""
POLLED: Final = 64
GOAL_STREAMS: Final = 512
GOAL_MS: Final = 10.0
CONCURRENCY: Final = 64
_WARMUP_S: Final = 5.0
_START_S: Final = 30.0


@contextmanager
def gateway_process(url: str, log: Path) -> Iterator[tuple[int, int]]:
    """Run a gateway; give its port and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "mixfleet", "gateway", "--listen", f"127.0.0.1:{port}"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--log-level", "warning"],
            env={**os.environ, "MIXFLEET_REDIS": url},
            stdout=file,
            stderr=file,
        )
    try:
        _await_answer(port, process, log)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_answer(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=1).close()
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the gateway does not start: {log.read_text()}") from None
            time.sleep(0.05)
        else:
            return


def measure_streams(
    folder: Path, way: str, streams: int, tokens_per_s: float, measured_s: float
) -> dict[str, Any]:
    """Return the figures of one number of streams, read in one way."""
    tokens = round((_WARMUP_S + measured_s) * tokens_per_s)
    run_s = _WARMUP_S + measured_s + 20.0
    plan = Plan(streams=streams, tokens=tokens, warmup_s=_WARMUP_S, limit_s=run_s + 30.0)
    workers = -(-streams // SLOTS)
    pace = Pace(workers=workers, slots=SLOTS, steps_per_s=tokens_per_s, tokens=tokens, run_s=run_s)
    with (
        BenchServer(folder) as server,
        gateway_process(server.url, folder / "gateway.log") as (
            port,
            pid,
        ),
    ):
        with server.client() as redis:
            before, redis_before = _process_cpu_s(pid), cpu_s(redis)
            clients = {
                "gateway": Call(over_http, (port, plan)),
                "direct": Call(from_channels, (server.url, plan)),
                "poll": Call(by_polling, (port, plan)),
            }[way]
            seen, _ = run_together(
                [clients, Call(serve, (server.url, pace))], timeout_s=run_s + 60.0
            )
            assert isinstance(seen, Seen)
            found = _figures(seen, streams * tokens)
            found["redis_cpu_share"] = (cpu_s(redis) - redis_before) / seen.lasted_s
        if way != "direct":
            found["gateway_cpu_share"] = (_process_cpu_s(pid) - before) / seen.lasted_s
            found["gateway_peak_mib"] = _peak_mib(pid)
    return found


def measure_requests(folder: Path, run_s: float) -> dict[str, Any]:
    """Return how many short requests without streaming one gateway answers."""
    pace = Pace(workers=1, slots=SLOTS, steps_per_s=1000.0, tokens=1, run_s=run_s + 1.0)
    with (
        BenchServer(folder) as server,
        gateway_process(server.url, folder / "gateway.log") as (
            port,
            _,
        ),
    ):
        seen, _ = run_together(
            [
                Call(requests, (port, CONCURRENCY, run_s)),
                Call(serve, (server.url, pace)),
            ],
            timeout_s=run_s + 60.0,
        )
    assert isinstance(seen, Seen)
    return {"per_s": seen.num_ended / seen.lasted_s, "latency_ms": spread(seen.ttft_ms)}


def _figures(seen: Seen, planned: int) -> dict[str, Any]:
    return {
        "ttft_ms": spread(seen.ttft_ms),
        "chunk_ms": spread(seen.chunk_ms),
        "delivered": seen.num_chunks / planned,
        "client_cpu_share": seen.cpu_s / seen.lasted_s,
    }


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(folder: Path, *, small: bool) -> dict[str, Any]:
    """Return the figures of one round."""
    measured_s = 2.0 if small else 8.0
    found: dict[str, Any] = {"requests": measure_requests(folder, measured_s)}
    say(f"requests: {found['requests']['per_s']:.0f}/s")
    for streams, tokens_per_s in CASES.items():
        if small and streams > 64:
            continue
        ways = ["direct", "gateway", *(["poll"] if streams == POLLED else [])]
        case: dict[str, Any] = {"tokens_per_s": tokens_per_s}
        for way in ways:
            case[way] = measure_streams(folder, way, streams, tokens_per_s, measured_s)
            ms = case[way]["chunk_ms"]
            say(f"{streams} {way}: p50 {ms.get('p50', 0):.1f} p95 {ms.get('p95', 0):.1f} ms")
        for name in ("ttft_ms", "chunk_ms"):
            case[f"added_{name}"] = {
                p: case["gateway"][name][p] - case["direct"][name][p] for p in ("p50", "p95", "p99")
            }
        found[str(streams)] = case
    return found


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals with what was measured."""
    case = figures.get(str(GOAL_STREAMS))
    if case is None:
        return []
    measured = case["added_chunk_ms"]["p95"]
    return [
        {
            "goal": f"the gateway adds less than {GOAL_MS:g} ms to a chunk, p95 at {GOAL_STREAMS}",
            "measured": measured,
            "met": measured < GOAL_MS,
        }
    ]


def text(figures: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Return the tables as Markdown."""
    per_s = figures["requests"]
    lines = [
        f"{per_s['per_s']:.0f} requests/s, p50 {per_s['latency_ms']['p50']:.1f} ms, p95 "
        f"{per_s['latency_ms']['p95']:.1f} ms at {CONCURRENCY} at a time",
        "",
        "| streams x tokens/s | way | chunk p50 / p95 / p99 ms | TTFT p50 / p95 ms | delivered | "
        "gateway CPU, peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for streams in (key for key in figures if key.isdigit()):
        case = figures[streams]
        for way in ("direct", "gateway", "poll"):
            if way not in case:
                continue
            row, chunk, ttft = case[way], case[way]["chunk_ms"], case[way]["ttft_ms"]
            use = (
                f"{row['gateway_cpu_share']:.0%}, {row['gateway_peak_mib']:.0f}"
                if "gateway_cpu_share" in row
                else ""
            )
            lines.append(
                f"| {streams} x {case['tokens_per_s']:g} | {way} | {chunk['p50']:.1f} / "
                f"{chunk['p95']:.1f} / {chunk['p99']:.1f} | {ttft['p50']:.1f} / {ttft['p95']:.1f} "
                f"| {row['delivered']:.1%} | {use} |"
            )
    lines += [
        "",
        *(f"{'met' if g['met'] else 'MISSED'}: {g['goal']}: {g['measured']:.1f}" for g in found),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gateway")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="try it in a minute; writes nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    folder = user_cache_path("mixfleet") / "benchmarks" / "gateway"
    folder.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    runs = [rounded(measure(folder, small=arguments.small)) for _ in range(arguments.rounds)]
    figures = rounded(medians(runs))
    found = goals(figures)
    print(text(figures, found))
    if not arguments.small:
        record = {
            "rounds": arguments.rounds,
            "cores": num_cores(),
            "load_at_start": load,
            "open_files_limit": [soft, hard],
            "versions": {"server": server_version()},
            **figures,
            "goals": found,
            "each_round": runs,
        }
        print(report.write("gateway", record))


if __name__ == "__main__":
    main()
