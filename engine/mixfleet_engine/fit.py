"""Answers to "does it fit": for one machine with the nearest thing that does, and for many."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import DoesNotFitError
from mixfleet_engine.machines import Machine
from mixfleet_engine.plan import MemoryPlan, plan_memory, sharing_problem

CONTEXTS: Final = (8192, 32_768, 65_536)
"""Lengths that the table answers for."""
_SMALLER: Final = ("bfloat16", "int8", "int4")
"""Weight dtypes to fall back to, best first; fp8 takes what int8 takes."""
_GROUP_SIZES: Final = (2, 4, 8)
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One machine, weight dtype and KV dtype."""

    machine: Machine
    weight_dtype: str
    kv_dtype: str
    plan: MemoryPlan | None
    """None: the devices cannot share the model."""
    problem: str | None
    """Why the model does not run; None: it does."""
    sequences: tuple[int | None, ...]
    """Per context, how many full sequences fit at the same time; None: the context is longer
    than the model's."""


def fit_table(
    model: ModelConfig,
    machines: Iterable[Machine],
    *,
    weight_dtypes: Sequence[str] = ("bfloat16", "fp8", "int8", "int4"),
    kv_dtypes: Sequence[str] = ("bfloat16", "fp8"),
    contexts: Sequence[int] = CONTEXTS,
) -> list[FitRow]:
    """Return a row for each machine, weight dtype and KV dtype, in this order.

    Raises:
        ConfigError: There is no such dtype.
    """
    return [
        _row(model, machine, weight_dtype, kv_dtype, contexts)
        for machine in machines
        for weight_dtype in weight_dtypes
        for kv_dtype in kv_dtypes
    ]


def require_fit(
    model: ModelConfig, machine: Machine, *, weight_dtype: str, kv_dtype: str
) -> MemoryPlan:
    """Return the plan for ``model`` on ``machine``; call it before anything is loaded.

    Raises:
        ConfigError: There is no such dtype, or so many devices cannot share the model.
        DoesNotFitError: Weights, reserve and the least KV cache are more than there is; the text
            has the numbers and the nearest thing that fits.
    """
    plan = plan_memory(model, machine, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    if plan.fits:
        return plan
    least_kv_bytes = plan.needed_bytes - plan.weight_bytes - plan.reserve_bytes
    of_one = " (of one device)" if machine.num_devices > 1 else ""
    raise DoesNotFitError(
        f"the model does not fit {machine.label}, {_gib(plan.weight_bytes)} of {weight_dtype} "
        f"weights + {_gib(plan.reserve_bytes)} reserve + {_gib(least_kv_bytes)} KV cache{of_one}",
        needed_bytes=plan.needed_bytes,
        available_bytes=machine.available_bytes,
        nearest=nearest_fit(model, plan),
    )


def nearest_fit(model: ModelConfig, plan: MemoryPlan) -> str:
    """Return in words what would fit instead of ``plan``, which does not.

    Smaller weights on the same devices come first, then more of the devices, then both. The
    cores of a CPU share one memory, so there is no more of that.
    """
    smaller_plans = list(_smaller_plans(model, plan))
    for found in (*smaller_plans, *_larger_groups(model, plan)):
        if found.fits:
            place = "it" if found.machine == plan.machine else found.machine.label
            return f"{found.weight_dtype} fits {place}, with {found.kv_tokens} tokens of KV cache"
    if plan.machine.kind == "cpu":
        if not smaller_plans:
            return "there is no smaller weight dtype"
        least = smaller_plans[-1]
        return f"{least.weight_dtype}, the smallest, needs {_gib(least.needed_bytes)}"
    most = max(_GROUP_SIZES[-1], plan.machine.num_devices)
    return f"nothing up to {plan.machine.with_devices(most).label} does"


def _smaller_plans(model: ModelConfig, plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """Yield plans for the same machine with smaller weights, the largest first."""
    for weight_dtype in _SMALLER:
        found = plan_memory(model, plan.machine, weight_dtype=weight_dtype, kv_dtype=plan.kv_dtype)
        if found.weight_bytes < plan.weight_bytes:
            yield found


def _larger_groups(model: ModelConfig, plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """Yield plans for more of the same GPUs, first with the weights as they are."""
    if plan.machine.kind == "cpu":
        return
    smaller = [found.weight_dtype for found in _smaller_plans(model, plan)]
    for weight_dtype in (plan.weight_dtype, *smaller):
        for count in _GROUP_SIZES:
            if count > plan.machine.num_devices and sharing_problem(model, count) is None:
                machine = plan.machine.with_devices(count)
                yield plan_memory(model, machine, weight_dtype=weight_dtype, kv_dtype=plan.kv_dtype)


def _row(
    model: ModelConfig,
    machine: Machine,
    weight_dtype: str,
    kv_dtype: str,
    contexts: Sequence[int],
) -> FitRow:
    plan = None
    problem = sharing_problem(model, machine.num_devices)
    if problem is None:
        plan = plan_memory(model, machine, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
        if not plan.fits:
            problem = f"{_gib(plan.needed_bytes)} of {_gib(machine.available_bytes)} needed"
    return FitRow(
        machine=machine,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        plan=plan,
        problem=problem,
        sequences=tuple(
            None if context > model.context_length else plan.sequences(context) if plan else 0
            for context in contexts
        ),
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
