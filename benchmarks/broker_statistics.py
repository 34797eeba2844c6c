"""Small sums over what the broker's benchmark measured."""

import math
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, TypeVar

Result = TypeVar("Result")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that at least ``share`` of them do not exceed.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return how many there are and, if there are any, their percentiles."""
    ordered = sorted(values)
    found: dict[str, float] = {"count": len(ordered)}
    if ordered:
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)):
            found[name] = percentile(ordered, share)
    return found


def rate(num_items: int, spans: Sequence[tuple[float, float]]) -> float:
    """Return items per second from the earliest start to the latest end of ``spans``."""
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    return num_items / seconds


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the milliseconds that ``call`` took, and what it returned."""
    started = perf_counter()
    result = call()
    return 1000 * (perf_counter() - started), result


def rounded(figures: Any) -> Any:
    """Return ``figures`` with five digits of every number, more than any of them is worth."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, float):
        return float(f"{figures:.5g}")
    return figures
