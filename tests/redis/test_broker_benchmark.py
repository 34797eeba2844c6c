"""The broker benchmark runs, at sizes whose figures mean nothing."""

from pathlib import Path

import pytest
from benchmarks import broker, broker_report
from benchmarks.broker_goals import goals
from benchmarks.broker_sizes import Sizes

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(tmp_path: Path) -> broker.Bench:
    return broker.Bench(tmp_path, Sizes.small(), [])


@pytest.mark.parametrize("part", broker.PARTS)
def test_a_part_runs_and_has_a_table_and_goals(part: str, bench: broker.Bench) -> None:
    [figures] = broker.run_rounds(bench, [part], rounds=1)
    assert part in figures
    shown = broker_report.text(figures, goals(figures), bench.absent)
    assert shown.count("## ") == 2
    if part != "eta":  # waits are too short here for shares of them
        assert goals(figures)


def test_every_chunk_reaches_every_kind_of_reader(bench: broker.Bench) -> None:
    sizes = Sizes.small()
    # A step at the edge of what is measured may be counted on one side only.
    a_step = sizes.chunk_cases[0].streams_per_worker / sizes.chunk_s
    for name, case in bench.measure("chunks").items():
        assert case["gaps"] == 0, name
        assert case["latency_ms"]["count"] > 0, name
        assert abs(case["read_per_s"] - case["appended_per_s"]) <= 1.01 * a_step, name


def test_a_call_is_one_round_trip(bench: broker.Bench) -> None:
    calls = bench.measure("costs")["calls"]
    assert {name: call["round_trips"] for name, call in calls.items()} == dict.fromkeys(calls, 1.0)


def test_nothing_is_left_of_jobs_after_their_time(bench: broker.Bench) -> None:
    found = bench.measure("retention")
    assert found["at_the_end"]["keys"] > 200
    assert found["left_of_jobs"] == 0
    assert "unknown" not in found["left_by_kind"]


def test_no_server_is_left_behind(bench: broker.Bench, tmp_path: Path) -> None:
    bench.measure("costs")
    assert list(tmp_path.glob("broker/redis-*")) == []
