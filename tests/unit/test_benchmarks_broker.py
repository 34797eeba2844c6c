"""The broker benchmark's sums, goals and tables."""

import json
import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from benchmarks import broker
from benchmarks.broker_chunks import split
from benchmarks.broker_depth import tenants_of
from benchmarks.broker_eta import Track, figures
from benchmarks.broker_goals import goals
from benchmarks.broker_memory import OF_ONE_JOB, kind_of
from benchmarks.broker_processes import Call, ProcessError, Ready, run_together
from benchmarks.broker_rates import arrangements
from benchmarks.broker_report import text
from benchmarks.broker_sizes import Sizes
from benchmarks.broker_statistics import percentile, rate, rounded, spread
from benchmarks.broker_writers import STAMP, age_ms, stamp

from mixfleet_broker.keys import KEYS
from mixfleet_broker.records import Lease

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)]
)
def test_a_percentile_is_the_value_that_so_many_do_not_exceed(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_a_percentile_of_one_value_is_that_value_and_of_none_an_error() -> None:
    assert percentile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_spread_of_nothing_says_so() -> None:
    assert spread([]) == {"count": 0}
    assert spread([3, 1, 2]) == {"count": 3, "p50": 2, "p95": 3, "p99": 3, "max": 3}


def test_a_rate_counts_from_the_first_start_to_the_last_end() -> None:
    assert rate(100, [(10.0, 12.0), (11.0, 15.0)]) == pytest.approx(20)


def test_numbers_are_rounded_wherever_they_are() -> None:
    found = rounded({"a": 1.23456789, "b": {"c": 123456.789}, "d": 7, "e": "text"})
    assert found == {"a": 1.2346, "b": {"c": 123460.0}, "d": 7, "e": "text"}


def test_a_stamp_tells_its_age_and_has_a_fixed_length() -> None:
    made = stamp()
    assert len(made) == STAMP
    assert age_ms(made, int(made, 16) + 2500) == pytest.approx(2.5)


def test_half_of_the_jobs_of_many_tenants_are_the_first_ones() -> None:
    found = tenants_of("many tenants", 100)
    assert found[:50] == ["first"] * 50
    assert len(set(found[50:])) == 8
    assert found[50] != found[51]
    assert tenants_of("one tenant", 3) == ["default"] * 3


def test_streams_are_shared_out_without_a_rest() -> None:
    leases = [Lease(job_id=f"j{i}", token="t", run=1) for i in range(7)]
    assert [len(group) for group in split(leases, 3)] == [3, 3, 1]


def test_every_kind_of_key_is_told_by_its_name() -> None:
    for key in KEYS:
        assert kind_of(key(*["x1"] * key.num_fields)) == key.name
    assert kind_of("rq:job:a:b:c:d") == "unknown"
    assert {"job", "channel", "results", "execution"} <= OF_ONE_JOB
    assert not {"queue", "ready", "rates", "worker"} & OF_ONE_JOB


def test_both_sides_of_the_queue_get_the_cores_once() -> None:
    assert arrangements(2) == {"2 + 1": (2, 1), "1 + 2": (1, 2)}
    assert arrangements(1) == {"1 + 1": (1, 1)}


def a_track(wait_s: float, *etas: float | None) -> Track:
    """Return a job that was asked at its submit and then at equal distances."""
    step = wait_s / max(1, len(etas))
    asked = [(1000.0 + i * step, eta) for i, eta in enumerate(etas)]
    return Track(submitted_at=1000.0, started_at=1000.0 + wait_s, asked=asked)


def test_the_estimate_at_half_is_the_one_nearest_to_the_middle() -> None:
    assert a_track(8.0, 9.0, 7.0, 5.0, 3.0).at_half() == (1004.0, 5.0)
    assert a_track(8.0, 9.0).at_half() is None, "nobody asked around the middle"


def test_errors_of_estimates_are_shares_of_what_was_left() -> None:
    found = figures([a_track(8.0, 10.0, 7.0, 5.0, 3.0), a_track(4.0, 4.0, 3.0, 2.0, 1.0)])
    assert found["jobs"] == 2
    at_submit, at_half = found["at_submit"], found["at_half"]
    assert (at_submit["median_error_s"], at_submit["p90_error_s"]) == (0.0, 2.0)
    assert at_submit["p90_share"] == pytest.approx(0.25)
    assert at_half["p90_share"] == pytest.approx(0.25), "1 s too much of 4 s"


def test_an_estimate_that_is_missing_is_counted_and_not_taken_for_an_error() -> None:
    found = figures([a_track(8.0, None, 7.0), a_track(8.0, 8.0, 4.0)])
    assert found["at_submit"]["without_estimate"] == 1
    assert found["at_submit"]["median_error_s"] == 0.0
    nothing = figures([a_track(8.0, None)])["at_submit"]
    assert nothing == {"asked": 1, "without_estimate": 1}


def test_the_share_of_a_wait_that_is_over_at_once_is_no_figure() -> None:
    found = figures([a_track(0.01, 0.0)])
    assert "median_share" not in found["at_submit"]
    assert found["at_half"] == {"asked": 0, "without_estimate": 0}


def a_chunk_case(**changes: Any) -> dict[str, Any]:
    case = {
        "streams": 1000,
        "way": "one connection",
        "chunks_per_s_per_stream": 10.0,
        "planned_per_s": 10_000.0,
        "appended_per_s": 10_000.0,
        "read_per_s": 10_000.0,
        "latency_ms": {"count": 9, "p50": 5.0, "p95": 12.0, "p99": 15.0, "max": 20.0},
        "step_ms": {"count": 9, "p50": 2.0, "p95": 3.0, "p99": 4.0, "max": 5.0},
        "late_ms": {"count": 9, "p50": 0.1, "p95": 0.2, "p99": 0.3, "max": 0.4},
        "gaps": 0,
        "cores_used": {"writers": 0.2, "readers": 0.3, "redis": 0.1},
    }
    return case | changes


def a_system(both: float) -> dict[str, Any]:
    rates = {"1": 5000.0, "2": 7000.0}
    return {
        "submits_per_s": rates,
        "works_per_s": rates,
        "both_per_s": {"2 + 1": both, "1 + 2": both / 2},
    }


def a_depth(deepest_ms: float) -> dict[str, Any]:
    def calls(ms: float) -> dict[str, dict[str, float]]:
        times = {"p50_ms": 2 * ms, "server_p50_ms": ms, "server_max_ms": 3 * ms}
        return {"claim": times, "cancel": times}

    return {"100": calls(1.0), "100000": calls(deepest_ms)}


def all_parts() -> dict[str, Any]:
    errors = {
        "asked": 200,
        "without_estimate": 0,
        "median_error_s": 0.2,
        "p90_error_s": 0.4,
        "median_bias_s": -0.1,
        "median_share": 0.1,
        "p90_share": 0.2,
    }
    estimates = {"jobs": 200, "median_wait_s": 2.0, "longest_wait_s": 4.0}
    call = {"round_trips": 1.0, "commands": 28.0, "redis_us": 99.0}
    floors = ("pings_per_s", "pushes_per_s", "pops_by_16_per_s", "pushes_by_16_per_s")
    return {
        "rates": {
            "mixfleet": a_system(3500.0),
            "rq": a_system(400.0),
            "floor": dict.fromkeys(floors, 20_000.0),
        },
        "depth": {"one tenant": a_depth(1.2)},
        "chunks": {"1000 streams at 10/s, one connection": a_chunk_case()},
        "costs": {
            "calls": {"submit": call},
            "job": {
                "redis_us": {"submit": 80.0},
                "bytes": {"queued": 4295.0},
                "bytes_by_kind": {"queued": {"job": 3528.0}},
            },
        },
        "eta": {"max_tokens known": {**estimates, "at_submit": errors, "at_half": errors}},
        "retention": {
            "jobs": 100_000,
            "kept_s": 5,
            "run_s": 30.0,
            "at_the_end": {"keys": 40_000, "bytes": 1 << 27},
            "reap_ms": 63.0,
            "gone_after_s": 8.0,
            "left_by_kind": {"queues": 1},
            "left_of_jobs": 0,
            "left_bytes": 1 << 20,
        },
    }


def met(parts: dict[str, Any]) -> dict[str, bool]:
    return {goal["goal"]: goal["met"] for goal in goals(parts)}


def test_all_goals_are_met_by_figures_that_meet_them() -> None:
    found = met(all_parts())
    assert len(found) == 9
    assert all(found.values())


@pytest.mark.parametrize(
    ("part", "figures", "missed"),
    [
        ("rates", {"mixfleet": a_system(2999.0)}, "3000 jobs/s"),
        ("depth", {"one tenant": a_depth(1.6)}, "claim, one tenant"),
        ("depth", {"one tenant": a_depth(2.1)}, "cancel, one tenant"),
        ("chunks", {"c": a_chunk_case(latency_ms={"p95": 20.0})}, "p95 below 20 ms"),
        ("chunks", {"c": a_chunk_case(read_per_s=9_400.0)}, "at least 95%"),
        ("chunks", {"c": a_chunk_case(gaps=1)}, "none missing"),
        ("costs", {"calls": {"submit": {"round_trips": 1.02}}}, "one round trip"),
        ("retention", {"jobs": 10, "left_of_jobs": 1}, "no key is left"),
    ],
)
def test_a_goal_is_missed_by_figures_that_miss_it(
    part: str, figures: dict[str, Any], missed: str
) -> None:
    found = met({part: figures})
    assert [goal for goal, is_met in found.items() if missed in goal and not is_met]


def test_what_was_not_measured_has_no_goal() -> None:
    assert goals({}) == []
    peer = a_chunk_case(way="polling", read_per_s=1.0, latency_ms={"p95": 290.0})
    at_full_speed = a_chunk_case(planned_per_s=0.0, latency_ms={"p95": 2000.0})
    assert goals({"chunks": {"polling": peer, "full": at_full_speed}}) == []


def test_the_tables_show_every_part_and_who_is_absent() -> None:
    parts = all_parts()
    shown = text(parts, goals(parts), {"celery": "no network"})
    assert shown.count("## ") == len(broker.PARTS) + 1
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert "| rq | 5000 | 7000 | 5000 | 7000 | 400 (2 + 1) |" in rows
    assert "| 100000 | 2.400 (1.200) | 2.400 (1.200) |" in rows
    assert any("5.0 | 12.0 | 15.0" in row and "0.20 + 0.30 + 0.10" in row for row in rows)
    assert "absent: celery: no network" in shown


def test_a_part_alone_has_its_own_table_only() -> None:
    shown = text({"costs": all_parts()["costs"]}, [], {})
    assert "round trips" in shown
    assert "jobs/s" not in shown


def test_the_full_sizes_cover_what_the_goals_are_about() -> None:
    sizes = Sizes.full()
    names = [case.name for case in sizes.chunk_cases]
    assert len(set(names)) == len(names)
    assert {case.streams for case in sizes.chunk_cases} == {64, 256, 1000, 5000}
    assert all(64 <= case.streams_per_worker <= 256 for case in sizes.chunk_cases)
    for streams in (64, 256, 1000, 5000):
        ways = {case.way for case in sizes.chunk_cases if case.streams == streams}
        assert {"one connection", "100 a connection", "pub/sub", "polling"} <= ways
    assert sizes.depths == (100, 1000, 10_000, 100_000)


def test_options_choose_parts_rounds_and_peers() -> None:
    chosen = broker.parse_arguments(["--parts", "depth", "costs", "--rounds", "1", "--peers"])
    assert (chosen.parts, chosen.rounds, chosen.peers) == (["depth", "costs"], 1, [])
    default = broker.parse_arguments([])
    assert default.parts == list(broker.PARTS)
    assert default.peers == ["rq", "celery"]
    assert not default.small


class Counted(broker.Bench):
    """Remembers which parts were measured."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path, Sizes.small(), [])
        self.measured: list[str] = []

    def measure(self, part: str) -> dict[str, Any]:
        self.measured.append(part)
        return {"number": float(len(self.measured))}


def test_what_takes_long_is_measured_in_the_first_round_only(tmp_path: Path) -> None:
    bench = Counted(tmp_path)
    runs = broker.run_rounds(bench, ["depth", "eta"], 3)
    assert bench.measured == ["depth", "eta", "depth", "depth"]
    assert [sorted(one) for one in runs] == [["depth", "eta"], ["depth"], ["depth"]]


def test_figures_can_be_written_as_strict_json() -> None:
    parts = all_parts()
    json.dumps([parts, goals(parts), broker.versions(["rq"])], allow_nan=False)


def test_celery_is_pinned_and_no_dependency_of_ours() -> None:
    peer = ROOT / "benchmarks" / "peers" / "celery_redis" / "requirements.txt"
    lines = peer.read_text().split()
    assert [line for line in lines if line.count("==") != 1] == []
    assert any(line.startswith("celery==5.") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = json.dumps([project["dependencies"], project["optional-dependencies"]])
    assert "celery" not in ours
    assert "celery" not in (ROOT / "constraints.txt").read_text()


def double(ready: Ready, number: int) -> tuple[float, int]:
    return ready(), 2 * number


def fail(ready: Ready, number: int) -> None:
    if number < 8:
        ready()
    raise ValueError(f"number {number} cannot be had")


def sit_idle(ready: Ready, seconds: float) -> None:
    ready()
    threading.Event().wait(seconds)


def die(ready: Ready) -> None:
    ready()
    os._exit(1)


@pytest.mark.slow
def test_processes_start_together_and_answer_in_order() -> None:
    found = run_together([Call(double, (1,)), Call(double, (2,))], timeout_s=10)
    assert [answer for _, answer in found] == [2, 4]
    assert found[0][0] == found[1][0]


@pytest.mark.slow
def test_a_process_that_fails_says_why() -> None:
    for number in (7, 8):  # one fails after the common start, one before it
        with pytest.raises(ProcessError, match=f"number {number} cannot be had"):
            run_together([Call(double, (1,)), Call(fail, (number,))], timeout_s=10)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_wait_for_all() -> None:
    with pytest.raises(ProcessError, match="died"):
        run_together([Call(sit_idle, (60.0,)), Call(die, ())], timeout_s=60)
