"""The GPU benchmark: its arithmetic, its random weights and its tables."""

import statistics
from typing import Any

import pytest
import torch
from benchmarks import gpu_report
from benchmarks.floor import experts_hit
from benchmarks.gpu_budget import Budget
from benchmarks.gpu_decode import invariance_cost
from benchmarks.gpu_floor import decode_work, prefill_seconds, sizes_of, step_seconds
from benchmarks.gpu_goals import GOALS, Goal, goals
from benchmarks.gpu_kernels import Kernel, kernel_table, labelled, medians, short
from benchmarks.gpu_offline import lengths
from benchmarks.gpu_requests import percentile, random_prompts
from benchmarks.gpu_scale import FULL, TINY, Traffic
from benchmarks.gpu_weights import RandomCheckpoint

from mixfleet_engine.weight_loader import _pinned
from mixfleet_engine.weights import weight_shapes

CPU = torch.device("cpu")
RATES = {"copy_bytes_per_s": 3.0e12, "bf16_flops": 650e12, "fp8_flops": 1100e12}


def floor_rate(batch: int, weight_dtype: str, kv_dtype: str) -> float:
    work = decode_work(
        FULL.model, batch=batch, context=1024, weight_dtype=weight_dtype, kv_dtype=kv_dtype
    )
    return batch / step_seconds(work, RATES)


@pytest.mark.parametrize(
    ("batch", "weight_dtype", "expected"),
    # Worked out from sizes of 1.474 and 5.637 thousand million numbers, at 3 TB/s; a number of
    # int4 takes 4.25 bits.
    [(1, "fp8", 235), (8, "fp8", 563), (64, "fp8", 3770), (256, "fp8", 12_040), (64, "int4", 6600)],
)
def test_the_floor_of_a_step_is_the_time_to_read_its_weights_and_keys(
    batch: int, weight_dtype: str, expected: float
) -> None:
    assert floor_rate(batch, weight_dtype, "fp8") == pytest.approx(expected, rel=0.02)


def test_many_rows_make_a_step_wait_for_its_products() -> None:
    work = decode_work(FULL.model, batch=4000, context=1, weight_dtype="int4", kv_dtype="fp8")
    moved = sum(part.num_bytes for part in work.values()) / RATES["copy_bytes_per_s"]
    flops = sum(part.flops for part in work.values())
    assert flops == pytest.approx(4000 * 2 * 12.75e9, rel=0.01)
    assert step_seconds(work, RATES) == flops / RATES["bf16_flops"] > moved


def test_an_fp8_product_counts_as_bf16_where_the_machine_has_none() -> None:
    work = decode_work(FULL.model, batch=1, context=1, weight_dtype="fp8", kv_dtype="fp8")
    assert work["up"].rate(RATES) == 1100e12
    assert work["up"].rate({"bf16_flops": 650e12}) == 650e12
    assert work["attention"].rate(RATES) == 650e12


def test_the_floor_of_a_prefill_grows_with_the_square_of_a_prompts_length() -> None:
    def seconds(length: int) -> float:
        return prefill_seconds(
            FULL.model, num_prompts=1, length=length, weight_dtype="bfloat16", rates=RATES
        )

    # 25.2 GFLOP per token without the output matrix, and half of 0.524 MFLOP per position.
    assert 1000 / seconds(1000) == pytest.approx(650e12 / (25.2e9 + 0.262e6 * 1000), rel=0.01)
    assert seconds(20_000) > 20 * seconds(1000)


@pytest.mark.parametrize(
    ("figure", "is_limit", "expected"),
    [
        *[(9, False, "no"), (10, False, "must"), (20, False, "ambitious")],
        *[(21, True, "no"), (20, True, "must"), (10, True, "ambitious")],
    ],
)
def test_a_goal_is_met_from_its_limit_on(figure: float, is_limit: bool, expected: str) -> None:
    must, ambitious = (20, 10) if is_limit else (10, 20)
    goal = Goal(name="", measured=lambda _: None, must=must, ambitious=ambitious, is_limit=is_limit)
    assert goal.met_by(figure) == expected


def decode_rows(**step_s: float) -> dict[str, Any]:
    return {
        name.removeprefix("b"): {"tokens_per_s": 1 / seconds, "step_s": seconds, "host_gap": 0.01}
        for name, seconds in step_s.items()
    }


def some_stages() -> dict[str, Any]:
    prefill = {"tokens_per_s": 15_000.0}
    runs = [{"p99_of_idle": 8.0}, {"p99_of_idle": 2.0}]
    return {
        "int4": {
            "load": {"load_s": 12.0},
            "decode": {
                "decode": decode_rows(b1=0.004, b64=0.022),
                "prefill": prefill,
                "same_answers": False,
            },
        },
        "int4 not invariant": {"decode": {"decode": decode_rows(b1=0.004, b64=0.020)}},
        "fp8": {"itl": {"runs": runs}, "decode": {"error": "out of memory"}},
        "bf16": {"decode": {"decode": decode_rows(b1=0.01), "prefill": prefill}},
        "transformers": {
            "decode": {"best": {"decode": {"1": 20.0, "16": 90.0}, "prefill_tokens_per_s": 3000.0}}
        },
    }


def test_every_goal_that_has_a_figure_is_looked_at_and_no_other() -> None:
    found = {goal["goal"]: (goal["measured"], goal["met"]) for goal in goals(some_stages())}
    assert found == {
        "int4 decode, batch 1, tok/s": (pytest.approx(250), "must"),
        "int4 decode, batch 64, tok/s": (pytest.approx(1 / 0.022), "no"),
        "prefill, tok/s": (15_000.0, "must"),
        "p99 ITL beside a long prefill, times idle": (2.0, "must"),
        "host gap, largest share of a step": (0.01, "ambitious"),
        "cost of batch invariance, share of a step": (pytest.approx(0.1), "ambitious"),
        "load without a disk, int4, s": (12.0, "ambitious"),
        "int4: the same tokens alone and in any batch": (0.0, "no"),
    }
    assert list(goals({})) == []
    assert len({goal.name for goal in GOALS}) == len(GOALS)


def test_ratios_are_of_what_both_sides_measured() -> None:
    summary = gpu_report.summarise(some_stages())
    assert summary["of_transformers"] == {"prefill": 5.0, "1": pytest.approx(5.0)}
    assert summary["invariance_cost"] == {"1": 0.0, "64": pytest.approx(0.1)}
    assert gpu_report.of_transformers({}) == {}
    assert invariance_cost({}, decode_rows(b1=1.0)) == {}


def test_drawn_lengths_are_the_same_each_time_and_about_their_mean() -> None:
    (mix,) = [traffic for traffic in FULL.traffics if traffic.is_drawn]
    found = lengths(mix)
    assert found == lengths(mix)
    assert len(found) == mix.num_requests
    prompts, outputs = zip(*found, strict=True)
    assert statistics.fmean(outputs) == pytest.approx(145, rel=0.1)
    assert statistics.fmean(prompts) == pytest.approx(400, rel=0.1)
    assert min(outputs) >= 1
    assert max(outputs) <= 6 * 145
    assert max(p + o for p, o in found) <= FULL.model.context_length
    equal = Traffic(name="", num_requests=3, prompt_tokens=5, output_tokens=7)
    assert lengths(equal) == [(5, 7)] * 3


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3.0


def test_a_budget_names_what_is_short() -> None:
    now = 100.0
    budget = Budget(130.0, lambda: now)
    assert budget.shortage(30) is None
    assert budget.shortage(31) == "takes about 31 s, 30 s are left"
    now = 140.0
    assert budget.left_s == 0
    assert budget.shortage(0) is None


def test_random_prompts_are_longer_lists_of_the_same() -> None:
    few, many = (random_prompts("a", count, 6, 50) for count in (2, 5))
    assert many[:2] == few
    assert len({tuple(prompt) for prompt in many}) == 5
    assert random_prompts("b", 2, 6, 50) != few


def test_random_weights_hang_on_their_names_alone() -> None:
    made, again = (RandomCheckpoint(TINY.model, CPU, torch.bfloat16) for _ in range(2))
    shapes = weight_shapes(TINY.model)
    assert made.names == frozenset(shapes)
    name = "layers.1.feed_forward.experts.2.w1.weight"
    assert made.stored(name, shapes[name]) == {name: made.found_shape(name)}
    whole = made.read(name)
    assert whole.shape == shapes[name]
    assert torch.equal(again.read(name, slice(3, 9), slice(0, 5)), whole[3:9, :5])
    assert not torch.equal(made.read(name.replace("experts.2", "experts.1")), whole)
    assert float(whole.float().std() * TINY.model.dim**0.5) == pytest.approx(1, rel=0.02)
    assert torch.equal(made.read("norm.weight").float(), torch.ones(TINY.model.dim))


def test_random_routers_choose_all_experts_about_equally_often() -> None:
    made = RandomCheckpoint(TINY.model, CPU, torch.float32)
    tokens = made.read("tok_embeddings.weight")
    gate = made.read("layers.0.feed_forward.gate.weight")
    chosen = (tokens @ gate.T).topk(TINY.model.experts_per_token).indices
    counts = chosen.flatten().bincount(minlength=TINY.model.num_experts)
    assert counts.max() < 1.5 * counts.min()
    groups = chosen.view(-1, 2, TINY.model.experts_per_token)
    hit = statistics.fmean(group.unique().numel() for group in groups)
    assert hit == pytest.approx(experts_hit(sizes_of(TINY.model), 2), rel=0.05)


def test_reading_ahead_leaves_what_is_on_a_device_where_it_is() -> None:
    found = torch.empty(2, device="meta")
    assert _pinned(found) is found


def test_runs_of_equal_kernels_become_one_by_medians() -> None:
    launches = [Kernel(name, s) for s in (1.0, 9.0, 2.0) for name in ("a", "b")]
    assert medians(launches, 3) == [Kernel("a", 2.0), Kernel("b", 2.0)]
    for broken in (launches[:-1], [*launches[:-1], Kernel("c", 1.0)], []):
        with pytest.raises(RuntimeError, match="which differ"):
            medians(broken, 3)


def a_step(num_layers: int) -> list[Kernel]:
    layer = ["_rms_norm", "_gemm", "_decode_splits", "_merge_splits", "_gemm", "_gemv", "_gemm"]
    names = [*layer * num_layers, "_gemm"]
    return [Kernel(name, float(place)) for place, name in enumerate(names)]


def test_products_are_told_apart_by_their_order() -> None:
    layer = ["_rms_norm", "qkv", "attention", "attention", "wo", "up", "down"]
    assert labelled(a_step(2), 2) == [*layer * 2, "output"]
    unknown = labelled([*a_step(2), Kernel("_gemm", 1.0)], 2)
    assert "qkv" not in unknown
    assert unknown.count("attention") == 4


def test_a_kernel_table_has_shares_and_floors_and_the_longest_first() -> None:
    work = decode_work(FULL.model, batch=1, context=8, weight_dtype="int4", kv_dtype="fp8")
    rows = kernel_table(a_step(2), 2, work, RATES)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert next(iter(rows)) == "attention"
    assert rows["up"] == {
        "launches": 2,
        "seconds": 5.0 + 12.0,
        "kernels": ["_gemv"],
        "share": 17.0 / sum(range(15)),
        "floor_s": work["up"].num_bytes / RATES["copy_bytes_per_s"],
        "of_floor": work["up"].seconds(RATES) / 17.0,
    }
    assert "of_floor" not in rows["_rms_norm"]
    assert "of_floor" not in kernel_table(a_step(2), 2, work, None)["up"]


def test_a_kernels_name_is_short() -> None:
    long = "void at::native::vectorized_elementwise_kernel<4, at::native::Fill<int> >(int)"
    assert short(long) == "vectorized_elementwise_kernel"
    assert short("_gemm") == "_gemm"
