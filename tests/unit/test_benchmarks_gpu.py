"""The GPU benchmark: its arithmetic, and every part of it with a tiny model on the CPU."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_peer, gpu_report, report
from benchmarks.floor import experts_hit
from benchmarks.gpu_bench import Bench, Part
from benchmarks.gpu_budget import Budget
from benchmarks.gpu_decode import decode_table, invariance_cost
from benchmarks.gpu_floor import decode_work, prefill_seconds, sizes_of, step_seconds
from benchmarks.gpu_goals import GOALS, Goal, goals
from benchmarks.gpu_kernels import Kernel, kernel_table, labelled, medians, profiled, short
from benchmarks.gpu_load import Loaded, NotMeasurableError, load
from benchmarks.gpu_machine import machine_facts, measure_rates
from benchmarks.gpu_offline import lengths, offline
from benchmarks.gpu_parts import stages
from benchmarks.gpu_replay import decode_chunks, replayed_seconds, unrecorded_step
from benchmarks.gpu_requests import percentile, random_prompts
from benchmarks.gpu_scale import FULL, TINY, Traffic
from benchmarks.gpu_stage import StageJob, run_parts
from benchmarks.gpu_warm import warm_up
from benchmarks.gpu_weights import RandomCheckpoint

from mixfleet_engine.capture import NoRecorder
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.decode_step import DecodeSteps
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


@pytest.mark.slow
def test_what_runs_is_profiled_in_its_order() -> None:
    x = torch.randn(20, 20)

    def work() -> None:
        torch.mm(x, x)
        x.exp()

    names = [kernel.name for kernel in profiled(work, CPU, repeats=3)]
    assert names.index("mm") < names.index("exp")
    assert names.count("mm") == names.count("exp") == 1


def loaded_with_steps(num_blocks: int = 40) -> tuple[Loaded, DecodeSteps, list[Any]]:
    seen: list[Any] = []

    def forward(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return torch.zeros(len(batch.token_ids), TINY.model.vocab_size)

    steps = DecodeSteps(
        forward,
        NoRecorder(),
        torch.zeros(8, dtype=torch.int64),
        max_rows=8,
        context_length=TINY.model.context_length,
        block_size=16,
        vocab_size=TINY.model.vocab_size,
        device=CPU,
    )
    runner = SimpleNamespace(
        num_blocks=num_blocks,
        block_size=16,
        _steps=steps,
        _model=SimpleNamespace(forward=lambda batch, _: forward(batch)),
        _cache=None,
    )
    loaded = Loaded(runner=runner, scale=TINY, config=EngineConfig(), device=CPU, load_s=0.0)
    return loaded, steps, seen


def test_the_step_that_has_just_run_is_replayed_and_no_other() -> None:
    loaded, steps, seen = loaded_with_steps()
    steps.run(decode_chunks(loaded, 3), [-1] * 3, "greedy")
    seen.clear()
    seconds = replayed_seconds(loaded, 3, TINY.context + 1)
    assert seconds is not None
    assert 0 < seconds < 1
    assert {len(batch.token_ids) for batch in seen} == {4}
    assert replayed_seconds(loaded, 1, TINY.context + 1) is None


def test_a_step_launched_kernel_by_kernel_has_the_tables_context() -> None:
    loaded, _, seen = loaded_with_steps()
    unrecorded_step(loaded, 4)()
    placed = seen[-1].placed
    assert placed.starts.tolist() == [TINY.context] * 4
    blocks = placed.block_tables[:, : TINY.context // 16 + 1].flatten().tolist()
    assert sorted(blocks) == list(range(len(blocks)))
    with pytest.raises(NotMeasurableError, match="no KV cache for 4 sequences"):
        unrecorded_step(loaded_with_steps(num_blocks=11)[0], 4)


def test_warming_up_runs_a_step_of_every_bucket_once() -> None:
    loaded, steps, seen = loaded_with_steps()
    found: dict[str, Any] = {}
    warm_up(loaded, Budget(time.time() + 1000), found, contexts=(16, 512, 4096))
    assert {shape.num_rows for shape in steps.shapes} == {1, 2, 4}
    assert {shape.max_context for shape in steps.shapes} == {512}
    assert found == {"shapes": 3}
    assert max(int(batch.placed.starts.max()) for batch in seen) == 511
    seen.clear()
    warm_up(loaded, Budget(time.time() + 10), found)
    assert found["skipped_batches"].startswith("1 and more: ")
    assert not seen


def tiny_bench(left_s: float = 100.0) -> Bench:
    return Bench(TINY, RATES, Budget(time.time() + left_s))


def test_a_part_that_fails_keeps_its_figures_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(_: Bench, found: dict[str, Any]) -> None:
        found["before"] = 1
        raise torch.OutOfMemoryError("out of memory: 3 GiB")

    def works(_: Bench, found: dict[str, Any]) -> Iterator[None]:
        found["figure"] = 1
        yield
        found["figure"] = 2

    def cannot(bench: Bench, _: dict[str, Any]) -> None:
        assert bench.loaded.load_s

    parts = (
        Part(name="fails", needed_s=0, measure=fails),
        Part(name="long", needed_s=1000, measure=works),
        Part(name="cannot", needed_s=0, measure=cannot),
        Part(name="works", needed_s=0, measure=works),
    )
    saved: list[list[str]] = []
    found = run_parts(tiny_bench(), parts, lambda results: saved.append(list(results)))
    assert saved == [[part.name for part in parts[: n + 1]] for n in (0, 1, 2, 3, 3)]
    assert found["fails"]["before"] == 1
    assert found["fails"]["error"] == "OutOfMemoryError: out of memory: 3 GiB"
    assert re.fullmatch(r"takes about 1000 s, \d+ s are left", found["long"]["skipped"])
    assert found["cannot"]["skipped"] == "the model was not loaded"
    assert found["works"]["figure"] == 2
    assert "out of memory" in capsys.readouterr().err


def test_every_stage_has_a_limit_and_its_parts_fit_it() -> None:
    for scale in (FULL, TINY):
        assert list(stages(scale)) == list(gpu.STAGE_LIMITS_S)
    for name, parts in stages(FULL).items():
        assert sum(part.needed_s for part in parts) <= gpu.STAGE_LIMITS_S[name]


@pytest.mark.slow
def test_a_tiny_run_measures_all_that_a_cpu_can() -> None:
    found = {"machine": {"machine": machine_facts(CPU) | {"rates": measure_rates(TINY, CPU)}}}
    for name, parts in stages(TINY).items():
        if name not in ("machine", "transformers"):
            found[name] = run_parts(tiny_bench(), parts, lambda _: None)
    errors = {(s, p) for s, parts in found.items() for p in parts if "error" in parts[p]}
    assert errors == set()
    assert list(found["fp8"]["decode"]["decode"]) == ["1", "2", "4"]
    assert found["fp8"]["128/128"]["output_tokens"] == 8 * 4
    assert len(found["fp8"]["itl"]["runs"]) == 3
    assert set(found["int4"]["halves"]["4"]) == {"attention", "experts", "output"}
    assert "no steps to record" in found["int4"]["kernels"]["skipped"]
    assert all(found[name]["decode"]["same_answers"] for name in ("int4", "fp8", "bf16"))
    record = {"stages": found, **gpu_report.summarise(found)}
    text = gpu_report.text(json.loads(json.dumps(record)))
    for line in ("int4: 2 layers", "fp8 offline mix", "fp8 halves, batch 4", "absent: int4 / ker"):
        assert line in text


def test_answers_that_hang_on_their_batch_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(TINY)
    launch = loaded.runner.launch

    def other_tokens_in_company(plan: Any) -> Any:
        found = launch(plan)
        if len(plan.chunks) > 1:
            found.tokens[0] = type(found.tokens[0])(7)
        return found

    monkeypatch.setattr(loaded.runner, "launch", other_tokens_in_company)
    found: dict[str, Any] = {}
    list(decode_table(loaded, (1, 2), RATES, tiny_bench().budget, found))
    assert found["same_answers"] is False


def test_what_has_no_time_left_is_named() -> None:
    loaded, found = load(TINY), dict[str, Any]()
    list(decode_table(loaded, (1, 2), RATES, Budget(0.0), found))
    assert found["skipped_batches"] == "1 and more: takes about 10 s, 0 s are left"
    assert found["decode"] == {}
    cut: dict[str, Any] = {}
    offline(loaded, TINY.traffics[0], Budget(0.0), cut)
    assert cut["output_tokens"] == 0
    assert "cut_after_s" in cut


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_transformers_runs_beside_where_it_is_installed() -> None:
    pytest.importorskip("transformers")
    found: dict[str, Any] = {}
    gpu_peer.peer_table(TINY.with_layers(1), CPU, tiny_bench().budget, found)
    ways = [found[name] for name in gpu_peer.EXPERTS if "decode" in found[name]]
    assert ways
    assert found["best"]["decode"]["2"] == max(way["decode"]["2"] for way in ways)


def test_without_transformers_that_part_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotMeasurableError, match="not installed"):
        gpu_peer.peer_table(TINY, CPU, tiny_bench().budget, {})


def test_without_a_gpu_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()


def test_the_results_of_a_gpu_are_not_overwritten_by_a_tiny_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(report.RESULTS / "gpu.json")
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--stages", "--out", out])
    with pytest.raises(SystemExit, match="not for --tiny"):
        gpu.main()


def test_a_tiny_run_writes_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(_: Any, __: Any, found: dict[str, Any], changed: Any) -> None:
        found["machine"] = {"machine": {"device": "cpu"}}
        changed()

    monkeypatch.setattr(gpu, "run_stage", stage)
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--stages", "machine"])
    gpu.main()
    assert "device cpu" in (printed := capsys.readouterr().out)
    assert "no result is written" in printed


@pytest.mark.slow
def test_a_stage_runs_in_a_process_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    job = StageJob(stage="machine", deadline=time.time() + 60, is_tiny=True, rates=None)
    found: dict[str, Any] = {}
    gpu.run_stage(job, tmp_path, found, lambda: None)
    assert found["machine"]["machine"]["rates"]["bf16_flops"] > 0
    late = StageJob(stage="int4", deadline=0.0, is_tiny=True, rates=None)
    gpu.run_stage(late, tmp_path, found, lambda: None)
    assert found["int4"] == {"stage": "ended by signal 9"}


@pytest.mark.slow
def test_it_comes_up_where_little_more_than_torch_is_installed() -> None:
    missing = "transformers safetensors tokenizers sentencepiece platformdirs redis llguidance"
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing.split()!r}))\n"
        "sys.argv = ['gpu', '--help']\n"
        "from benchmarks import gpu\n"
        "gpu.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


def test_the_commit_is_unknown_where_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.commit(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit(Path(report.__file__).parent) == "unknown"
    monkeypatch.setenv(report.COMMIT, "abc1234")
    written = report.write("some", {"figure": 1}, tmp_path / "some.json")
    assert json.loads(written.read_text())["commit"] == "abc1234"
