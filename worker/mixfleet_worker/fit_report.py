"""What ``mixfleet doctor --fit`` says: a model's memory, on named machines and on this one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import ConfigError, DoesNotFitError
from mixfleet_engine.fit import CONTEXTS, FitRow, fit_table, require_fit
from mixfleet_engine.machines import Machine, named_machines
from mixfleet_engine.plan import (
    MemoryPlan,
    auto_batch_size,
    kv_bytes_per_token,
    num_parameters,
    packed_dtype,
    sharing_problem,
    weight_bytes,
)

_SHOWN_WEIGHTS: Final = ("float32", "bfloat16", "fp8", "int8", "int4")
_TABLE_WEIGHTS: Final = ("bfloat16", "fp8", "int8", "int4")
_KV_DTYPES: Final = ("bfloat16", "fp8")
_GIB: Final = 1 << 30
_KIB: Final = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This machine, and what its engine computes in unless told otherwise."""

    machine: Machine
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the model runs on this machine."""

    machine: Machine
    context: int
    plan: MemoryPlan | None
    """None: it does not."""
    problem: str | None
    """Why not, with the numbers and what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """All figures of one answer."""

    name: str
    model: ModelConfig
    contexts: tuple[int, ...]
    rows: tuple[FitRow, ...]
    """Named machines, then this one."""
    verdict: Verdict | None
    """None: this machine's devices are not known."""


def fit_report(
    name: str,
    model: ModelConfig,
    here: Here | None,
    *,
    weight_dtype: str | None = None,
    context: int | None = None,
) -> FitReport:
    """Return what there is to say.

    Args:
        name: Of the model, for people.
        model: Its sizes.
        here: This machine; None if it is not known.
        weight_dtype: Answer for this one only.
        context: Answer for this one only.

    Raises:
        ConfigError: The context is longer than the model's.
    """
    if context is not None and context > model.context_length:
        raise ConfigError(f"context={context}: the model has {model.context_length}")
    shared = _shared(model, here.machine) if here else None
    machines = (*named_machines(), *([shared] if shared else []))
    contexts = CONTEXTS if context is None else (context,)
    rows = fit_table(
        model,
        machines,
        weight_dtypes=(weight_dtype,) if weight_dtype else _own_first(model, _TABLE_WEIGHTS),
        kv_dtypes=_KV_DTYPES,
        contexts=contexts,
    )
    verdict = None
    if here and shared:
        chosen = weight_dtype or packed_dtype(model) or here.dtype
        verdict = _verdict(model, shared, chosen, here.dtype, context or model.context_length)
    return FitReport(name=name, model=model, contexts=contexts, rows=tuple(rows), verdict=verdict)


def _own_first(model: ModelConfig, weight_dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the weight dtypes with the packed form of the model's own checkpoint in front."""
    packed = packed_dtype(model)
    return (packed, *weight_dtypes) if packed else weight_dtypes


def _shared(model: ModelConfig, machine: Machine) -> Machine:
    """Return ``machine`` with as many of its devices as can share the model."""
    count = machine.num_devices
    while count > 1 and sharing_problem(model, count) is not None:
        count -= 1
    return machine.with_devices(count)


def _verdict(
    model: ModelConfig, machine: Machine, weight_dtype: str, kv_dtype: str, context: int
) -> Verdict:
    plan, problem = None, None
    try:
        plan = require_fit(model, machine, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    except DoesNotFitError as error:
        problem = str(error)
    return Verdict(machine=machine, context=context, plan=plan, problem=problem)


def as_json(report: FitReport) -> dict[str, Any]:
    """Return the report as plain data, all sizes in bytes."""
    model = report.model
    return {
        "model": report.name,
        "num_parameters": num_parameters(model),
        "context_length": model.context_length,
        "weight_bytes": {
            dtype: weight_bytes(model, dtype) for dtype in _own_first(model, _SHOWN_WEIGHTS)
        },
        "kv_bytes_per_token": {dtype: kv_bytes_per_token(model, dtype) for dtype in _KV_DTYPES},
        "table": [_row_json(row, report.contexts) for row in report.rows],
        "here": report.verdict and _verdict_json(report.verdict),
    }


def _row_json(row: FitRow, contexts: Sequence[int]) -> dict[str, Any]:
    sequences = {str(length): n for length, n in zip(contexts, row.sequences, strict=True)}
    return {
        "machine": row.machine.label,
        "num_devices": row.machine.num_devices,
        "device_bytes": row.machine.available_bytes,
        "weight_dtype": row.weight_dtype,
        "kv_dtype": row.kv_dtype,
        **_plan_json(row.plan),
        "sequences": sequences,
        "problem": row.problem,
    }


def _plan_json(plan: MemoryPlan | None) -> dict[str, int | None]:
    names = ("weight_bytes_per_device", "reserve_bytes_per_device", "kv_tokens")
    if plan is None:
        return dict.fromkeys(names)
    return dict(zip(names, (plan.weight_bytes, plan.reserve_bytes, plan.kv_tokens), strict=True))


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    plan = verdict.plan
    return {
        "machine": verdict.machine.label,
        "device_bytes": verdict.machine.available_bytes,
        "fits": plan is not None,
        "problem": verdict.problem,
        "weight_dtype": plan and plan.weight_dtype,
        "kv_dtype": plan and plan.kv_dtype,
        **_plan_json(plan),
        "context": verdict.context,
        "sequences": plan and plan.sequences(verdict.context),
        "max_batch_size": plan and auto_batch_size(plan, verdict.context),
    }


def print_report(report: FitReport, console: Console) -> None:
    """Print the report for people, at 80 columns."""
    model = report.model
    console.print(
        f"{report.name}: {num_parameters(model) / 1e9:.2f} B parameters, "
        f"{model.n_layers} layers, {model.num_experts} experts, context {model.context_length}\n"
    )
    weights = Table("weights", box=None, pad_edge=False, header_style="bold")
    weights.add_column("GiB", justify="right")
    for dtype in _own_first(model, _SHOWN_WEIGHTS):
        weights.add_row(dtype, f"{weight_bytes(model, dtype) / _GIB:.2f}")
    console.print(weights)
    sizes = (f"{_kib(kv_bytes_per_token(model, dtype))} in {dtype}" for dtype in _KV_DTYPES)
    console.print(f"\nKV cache per token: {', '.join(sizes)}\n")
    shown = [length for length in report.contexts if length <= model.context_length]
    if shown:
        console.print("Full sequences that fit at the same time, by KV dtype and context;")
        console.print("no: the model itself does not fit. fp8 KV cache is --kv-dtype fp8.\n")
        console.print(_table(report, len(shown)))
    for length in report.contexts[len(shown) :]:
        console.print(f"{_tokens(length)}: longer than the model's context")
    console.print(f"\n{verdict_line(report.verdict)}", soft_wrap=True)


def _table(report: FitReport, num_contexts: int) -> Table:
    table = Table("machine", "weights", box=None, pad_edge=False, header_style="bold")
    for kv_dtype in _KV_DTYPES:
        for length in report.contexts[:num_contexts]:
            table.add_column(f"{kv_dtype}\n{_tokens(length)}", justify="right")
    has_int8 = any(row.weight_dtype == "int8" for row in report.rows)
    last = None
    rows = [row for row in report.rows if not (has_int8 and row.weight_dtype == "fp8")]
    for first in range(0, len(rows), len(_KV_DTYPES)):
        pair = rows[first : first + len(_KV_DTYPES)]
        is_here = report.verdict is not None and pair[0].machine is report.verdict.machine
        label = f"here: {pair[0].machine.label}" if is_here else pair[0].machine.label
        weights = pair[0].weight_dtype
        table.add_row(
            "" if label == last else label,
            "int8, fp8" if weights == "int8" and len(report.rows) > len(rows) else weights,
            *(_cell(row, n) for row in pair for n in row.sequences[:num_contexts]),
        )
        last = label
    return table


def _cell(row: FitRow, sequences: int | None) -> str:
    return "no" if row.problem else str(sequences)


def verdict_line(verdict: Verdict | None) -> str:
    """Return in one line whether the model runs on this machine."""
    if verdict is None:
        return "torch is not installed, so only the named machines"
    if verdict.plan is None:
        return f"here: {verdict.problem}"
    plan, machine = verdict.plan, verdict.machine
    each = " each" if machine.num_devices > 1 else ""
    return (
        f"here: fits {machine.label} in {plan.weight_dtype}: {_gib(machine.available_bytes)}{each} "
        f"- {_gib(plan.weight_bytes)} weights - {_gib(plan.reserve_bytes)} reserve = "
        f"{plan.kv_tokens} tokens of KV cache in {plan.kv_dtype}, "
        f"{plan.sequences(verdict.context)} sequences of {verdict.context}; "
        f"max_batch_size=auto is {auto_batch_size(plan, verdict.context)}"
    )


def _tokens(length: int) -> str:
    return f"{length // _KIB}K" if length % _KIB == 0 else str(length)


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / _KIB:g} KiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
