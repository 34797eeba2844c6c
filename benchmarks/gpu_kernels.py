"""Every kernel of a decode step: how long it takes there, and how near that is to its floor.

A decode step runs under torch's profiler, launched kernel by kernel, for a replay hides them from
the profiler in some versions. Each kernel is timed where it stands,
between the others of all layers, so what it reads has long left L2. Products are told apart by
their order: four in a layer and one at the end. Where their number is another, or a kernel is not
known, it has a time and no floor.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_floor import Rates, Work
from benchmarks.gpu_requests import Figures

PRODUCTS: Final = ("qkv", "wo", "up", "down")
"""Of a layer, in order."""
_PRODUCT_WORDS: Final = ("gemm", "gemv")
_ATTENTION_WORDS: Final = ("atten", "splits")
_NO_KERNELS: Final = (" Sync", "Buffer")
"""In the names of what the profiler shows on a device beside kernels."""
_REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch."""

    name: str
    seconds: float


def profiled(
    work: Callable[[], object], device: torch.device, repeats: int = _REPEATS
) -> list[Kernel]:
    """Return the kernels of ``work`` in order, each with its median time; work has run before.

    Raises:
        RuntimeError: The runs differ in their kernels, or there were none.
    """
    kind = device.type.upper()
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events: list[Any] = [
        event
        for event in profiler.events() or []
        if event.device_type.name == kind and not any(word in event.name for word in _NO_KERNELS)
    ]
    events.sort(key=lambda event: event.time_range.start)
    launches = [Kernel(short(event.name), event.time_range.elapsed_us() / 1e6) for event in events]
    return medians(launches, repeats)


def short(name: str) -> str:
    """Return a kernel's name without the namespaces and template arguments of C++."""
    return re.split("[<(]", name.removeprefix("void "))[0].rpartition("::")[2] or name


def medians(launches: Sequence[Kernel], repeats: int) -> list[Kernel]:
    """Return one run's kernels out of those of ``repeats`` equal runs, one after the other.

    Raises:
        RuntimeError: The runs differ in their kernels, or there were none.
    """
    length = len(launches) // repeats
    runs = [launches[start : start + length] for start in range(0, length * repeats, length or 1)]
    names = {tuple(kernel.name for kernel in run) for run in runs}
    if len(names) != 1 or len(launches) % repeats:
        raise RuntimeError(f"{len(launches)} kernels in {repeats} runs, which differ")
    return [
        Kernel(same[0].name, statistics.median(kernel.seconds for kernel in same))
        for same in zip(*runs, strict=True)
    ]


def labelled(kernels: Sequence[Kernel], num_layers: int) -> list[str]:
    """Return for each kernel which part of a step it is: ``qkv``, ``up``, ... or its own name."""
    products = [
        place
        for place, kernel in enumerate(kernels)
        if any(word in kernel.name.lower() for word in _PRODUCT_WORDS)
    ]
    parts = [kernel.name for kernel in kernels]
    if len(products) == len(PRODUCTS) * num_layers + 1:
        for place, part in zip(products, [*PRODUCTS * num_layers, "output"], strict=True):
            parts[place] = part
    for place, kernel in enumerate(kernels):
        if any(word in kernel.name.lower() for word in _ATTENTION_WORDS):
            parts[place] = "attention"
    return parts


def kernel_table(
    kernels: Sequence[Kernel], num_layers: int, work: Mapping[str, Work], rates: Rates | None
) -> dict[str, Figures]:
    """Return by part the seconds of all its launches in a step, its share, and its floor.

    Args:
        kernels: Of one step, in order.
        num_layers: Of the model.
        work: What each part must do, all layers together.
        rates: The machine's; None: no floors.
    """
    rows: dict[str, Figures] = {}
    total = sum(kernel.seconds for kernel in kernels)
    for kernel, part in zip(kernels, labelled(kernels, num_layers), strict=True):
        row = rows.setdefault(part, {"launches": 0, "seconds": 0.0, "kernels": []})
        row["launches"] += 1
        row["seconds"] += kernel.seconds
        if kernel.name not in row["kernels"]:
            row["kernels"].append(kernel.name)
    for part, row in rows.items():
        row["share"] = row["seconds"] / total
        if rates and part in work:
            row["floor_s"] = work[part].seconds(rates)
            row["of_floor"] = row["floor_s"] / row["seconds"]
    return dict(sorted(rows.items(), key=lambda item: -item[1]["seconds"]))
