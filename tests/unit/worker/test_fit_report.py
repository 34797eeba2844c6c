import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.fit import fit_table
from mixfleet_engine.machines import Machine, named_machines
from mixfleet_engine.plan import auto_batch_size, plan_memory, weight_bytes
from mixfleet_engine.published import PUBLISHED
from mixfleet_worker.fit_report import (
    FitReport,
    Here,
    as_json,
    fit_report,
    print_report,
    verdict_line,
)
from support.memory_machines import machine
from support.packed_checkpoints import Packing, write_packed_checkpoint
from support.tiny_model import tiny_config

SMALL, LARGE = PUBLISHED["mixtral-8x7b"], PUBLISHED["mixtral-8x22b"]


def report_of(
    model: ModelConfig = SMALL, where: Machine | None = None, **options: Any
) -> FitReport:
    here = Here(machine=where, dtype="bfloat16") if where else None
    return fit_report("some-model", model, here, **options)


def printed(report: FitReport) -> list[str]:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=80))
    return stream.getvalue().splitlines()


def cells(lines: list[str], label: str, weights: str) -> list[str]:
    """Return the numbers of one row; its label stands in the first row of its machine only."""
    labels = [found.label for found in named_machines()]
    start = next(n for n, line in enumerate(lines) if line.startswith(label))
    for line in lines[start:]:
        own = line.removeprefix(label)
        if own.strip().startswith(weights):
            return own.strip().removeprefix(weights).split()
        assert line.startswith((label, " ")) or not any(line.startswith(n) for n in labels)
    raise AssertionError(f"no row {weights} of {label}")


def test_the_first_lines_have_the_sizes() -> None:
    lines = printed(report_of())
    assert lines[0] == "some-model: 46.70 B parameters, 32 layers, 8 experts, context 32768"
    assert "bfloat16   86.99" in [line.strip() for line in lines]
    assert "KV cache per token: 128 KiB in bfloat16, 64 KiB in fp8" in lines


@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["8x7b", "8x22b"])
def test_the_printed_table_has_the_numbers_of_the_planner(model: ModelConfig) -> None:
    lines = printed(report_of(model))
    columns = 2 if model is SMALL else 3
    table = fit_table(model, named_machines())
    rows = {(row.machine.label, row.weight_dtype, row.kv_dtype): row for row in table}
    for found in named_machines():
        for weights, shown in (("bfloat16", "bfloat16"), ("int8", "int8, fp8"), ("int4", "int4")):
            pair = [rows[found.label, weights, kv] for kv in ("bfloat16", "fp8")]
            expected = [
                "no" if row.problem else str(number)
                for row in pair
                for number in row.sequences[:columns]
            ]
            assert cells(lines, found.label, shown) == expected


@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_the_report_is_readable_at_80_columns(model: ModelConfig) -> None:
    *table, _ = printed(report_of(model, machine(24)))
    assert max(len(line) for line in table) <= 80
    assert not any("…" in line for line in table)


def test_a_context_longer_than_the_models_is_left_out_with_a_word() -> None:
    assert "64K: longer than the model's context" in printed(report_of(SMALL))
    assert not any("longer than" in line for line in printed(report_of(LARGE)))


def test_a_small_context_leaves_no_table_but_the_word() -> None:
    lines = printed(report_of(tiny_config()))
    assert "8K: longer than the model's context" in lines
    assert not any("A100" in line for line in lines)


def test_one_context_and_one_dtype_can_be_asked_for() -> None:
    report = report_of(weight_dtype="fp8", context=1000)
    assert {row.weight_dtype for row in report.rows} == {"fp8"}
    lines = printed(report)
    row = fit_table(
        SMALL, [named_machines()[0]], weight_dtypes=["fp8"], kv_dtypes=["fp8"], contexts=[1000]
    )[0]
    assert cells(lines, "1x A100 80GB", "fp8")[-1] == str(row.sequences[0])
    assert not any("int8" in line for line in lines[12:])


def test_a_context_that_the_model_does_not_have_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="context=40000: the model has 32768"):
        report_of(context=40_000)


def test_the_verdict_of_a_machine_that_fits_has_every_step_of_the_sum() -> None:
    where = machine(60, num_devices=2)
    plan = plan_memory(SMALL, where, weight_dtype="bfloat16", kv_dtype="bfloat16")
    line = verdict_line(report_of(SMALL, where).verdict)
    assert line == (
        "here: fits 2x GPU in bfloat16: 60.00 GiB each - 43.50 GiB weights - 5.60 GiB reserve = "
        f"{plan.kv_tokens} tokens of KV cache in bfloat16, 5 sequences of 32768; "
        f"max_batch_size=auto is {auto_batch_size(plan, 32_768)}"
    )
    assert plan.kv_tokens == pytest.approx((60 - 43.497 - 5.6) * (1 << 14), rel=0.001)


@pytest.mark.parametrize("has_files", [False, True])
def test_a_packed_checkpoint_is_planned_as_it_is_unless_told_otherwise(
    has_files: bool, tmp_path: Path
) -> None:
    write_packed_checkpoint(tmp_path, Packing(method="awq"))
    if not has_files:
        (tmp_path / "model.safetensors").unlink()
    model = ModelConfig.from_checkpoint(tmp_path)
    report = report_of(model, machine(24), context=128)
    packed, int4 = (weight_bytes(model, dtype) for dtype in ("awq", "int4"))
    # Scales and zero points, and an output matrix that stays bf16.
    assert int4 < packed < weight_bytes(model, "bfloat16")
    assert as_json(report)["weight_bytes"]["awq"] == packed
    assert report.verdict is not None
    assert report.verdict.plan is not None
    assert (report.verdict.plan.weight_dtype, report.verdict.plan.weight_bytes) == ("awq", packed)
    lines = printed(report)
    assert f"awq       {packed / (1 << 30):.2f}" in [line.strip() for line in lines]
    assert len(cells(lines, "1x A100 80GB", "awq")) == 2


def test_the_verdict_of_a_machine_that_is_too_small_is_the_refusal() -> None:
    line = verdict_line(report_of(SMALL, machine(24)).verdict)
    assert line.startswith("here: the model does not fit 1x GPU, 86.99 GiB of bfloat16 weights + ")
    plan = plan_memory(
        SMALL, machine(24, num_devices=8), weight_dtype="bfloat16", kv_dtype="bfloat16"
    )
    assert line.endswith(f"; bfloat16 fits 8x GPU, with {plan.kv_tokens} tokens of KV cache")


def test_the_verdict_is_about_the_dtype_that_was_asked_for() -> None:
    line = verdict_line(report_of(SMALL, machine(60), weight_dtype="int8").verdict)
    assert line.startswith("here: fits 1x GPU in int8: 60.00 GiB - 43.65 GiB weights - ")


def test_without_torch_there_are_only_the_named_machines() -> None:
    report = report_of(SMALL, None)
    assert printed(report)[-1] == "torch is not installed, so only the named machines"
    assert as_json(report)["here"] is None
    assert {row.machine for row in report.rows} == set(named_machines())


def test_this_machine_is_the_last_of_the_table() -> None:
    where = machine(60, num_devices=2)
    lines = printed(report_of(SMALL, where))
    (row, *_) = fit_table(SMALL, [where])
    assert cells(lines, "here: 2x GPU", "bfloat16")[:2] == [str(n) for n in row.sequences[:2]]


def test_devices_that_cannot_share_the_model_are_left_out() -> None:
    verdict = report_of(SMALL, machine(60, num_devices=3)).verdict
    assert verdict is not None
    assert verdict.machine == machine(60, num_devices=2)


def test_json_has_every_row_with_bytes_that_add_up() -> None:
    found = as_json(report_of(LARGE, machine(300)))
    assert found["num_parameters"] == 140_630_071_296
    assert found["weight_bytes"]["bfloat16"] == 281_260_142_592
    assert found["kv_bytes_per_token"] == {"bfloat16": 224 << 10, "fp8": 112 << 10}
    assert len(found["table"]) == (len(named_machines()) + 1) * 8
    for row in found["table"]:
        per_token = found["kv_bytes_per_token"][row["kv_dtype"]] // row["num_devices"]
        taken = row["weight_bytes_per_device"] + row["reserve_bytes_per_device"]
        left = row["device_bytes"] - taken
        assert row["kv_tokens"] == max(0, left) // per_token
        fits = row["problem"] is None
        expected = {str(n): row["kv_tokens"] // n if fits else 0 for n in (8192, 32_768, 65_536)}
        assert row["sequences"] == expected


def test_json_of_this_machine_says_whether_it_fits() -> None:
    fits = as_json(report_of(SMALL, machine(100), context=8192))["here"]
    plan = plan_memory(SMALL, machine(100), weight_dtype="bfloat16", kv_dtype="bfloat16")
    assert (fits["fits"], fits["problem"]) == (True, None)
    assert fits["sequences"] == plan.sequences(8192)
    assert fits["max_batch_size"] == auto_batch_size(plan, 8192)
    small = as_json(report_of(SMALL, machine(24)))["here"]
    assert (small["fits"], small["kv_tokens"], small["sequences"]) == (False, None, None)
    assert "GiB needed" in small["problem"]


def test_a_machine_that_cannot_share_the_model_is_null_in_json() -> None:
    found = as_json(report_of(tiny_config()))
    (row, *_) = (row for row in found["table"] if row["machine"] == "4x A100 80GB")
    assert row["kv_tokens"] is None
    assert row["problem"] == "tp=4: 4 ranks cannot share n_kv_heads=2 equally"
