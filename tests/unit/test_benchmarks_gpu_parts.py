"""The GPU benchmark: every part of it with a tiny model on the CPU, and what it writes."""

import json
import re
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
from benchmarks.gpu_bench import Bench, Part
from benchmarks.gpu_budget import Budget
from benchmarks.gpu_decode import decode_table
from benchmarks.gpu_kernels import profiled
from benchmarks.gpu_load import Loaded, NotMeasurableError, load
from benchmarks.gpu_machine import machine_facts, measure_rates
from benchmarks.gpu_offline import offline
from benchmarks.gpu_parts import stages
from benchmarks.gpu_replay import decode_chunks, replayed_seconds, unrecorded_step
from benchmarks.gpu_scale import FULL, TINY
from benchmarks.gpu_stage import StageJob, run_parts
from benchmarks.gpu_warm import warm_up

from mixfleet_engine.capture import NoRecorder
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.decode_step import DecodeSteps

CPU = torch.device("cpu")
RATES = {"copy_bytes_per_s": 3.0e12, "bf16_flops": 650e12, "fp8_flops": 1100e12}


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
