"""The broker's goals, each with what one run measured."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

Figures = Mapping[str, Any]

MIN_JOBS_PER_S: Final = 3000
MAX_GROWTH: Final = {"claim": 1.5}
"""From the shallowest queue to the deepest: noise, no more."""
MAX_OTHER_GROWTH: Final = 2.0
"""Of calls on one job of many: it lies outside the processor's caches, and that shows."""
MAX_P95_MS: Final = 20
LATENCY_STREAMS: Final = 1000
MIN_DELIVERED: Final = 0.95
"""Of the planned chunks; a case that delivers less says nothing about latency."""
MAX_ETA_SHARE: Final = 0.25


def goals(parts: Figures) -> list[dict[str, Any]]:
    """Return every goal that the run has figures for.

    Args:
        parts: The figures by part, as :mod:`benchmarks.broker` collects them.
    """
    found: list[dict[str, Any]] = []
    for part, check in _CHECKS.items():
        if part in parts:
            found += check(parts[part])
    return found


def _goal(text: str, measured: float, *, met: bool) -> dict[str, Any]:
    return {"goal": text, "measured": measured, "met": met}


def _rates(figures: Figures) -> Iterator[dict[str, Any]]:
    measured = max(figures["mixfleet"]["both_per_s"].values())
    text = f"at least {MIN_JOBS_PER_S} jobs/s submitted, claimed and ended on these cores"
    yield _goal(text, measured, met=measured >= MIN_JOBS_PER_S)


def _depth(figures: Figures) -> Iterator[dict[str, Any]]:
    for arrangement, rows in figures.items():
        depths = sorted(rows, key=int)
        if len(depths) < 2:
            continue
        first, last = rows[depths[0]], rows[depths[-1]]
        for call in first:
            growth = last[call]["server_p50_ms"] / max(first[call]["server_p50_ms"], 1e-3)
            limit = MAX_GROWTH.get(call, MAX_OTHER_GROWTH)
            text = (
                f"{call}, {arrangement}: with {depths[-1]} jobs waiting at most {limit:g} x the "
                f"time with {depths[0]}"
            )
            yield _goal(text, growth, met=growth <= limit)


def _chunks(figures: Figures) -> Iterator[dict[str, Any]]:
    for name, case in figures.items():
        is_ours = "connection" in case["way"]
        planned = case["planned_per_s"]
        if is_ours and planned:
            delivered = case["read_per_s"] / planned
            text = f"{name}: at least {MIN_DELIVERED:.0%} of the planned chunks, none missing"
            met = delivered >= MIN_DELIVERED and not case["gaps"]
            yield _goal(text, delivered, met=met)
        if is_ours and planned and case["streams"] == LATENCY_STREAMS:
            p95_ms = case["latency_ms"]["p95"]
            text = f"{name}: p95 below {MAX_P95_MS} ms from append to reader"
            yield _goal(text, p95_ms, met=p95_ms < MAX_P95_MS)


def _costs(figures: Figures) -> Iterator[dict[str, Any]]:
    most = max(call["round_trips"] for call in figures["calls"].values())
    yield _goal("every call is one round trip", most, met=most <= 1)


def _eta(figures: Figures) -> Iterator[dict[str, Any]]:
    for setting, found in figures.items():
        for moment in ("at_submit", "at_half"):
            share = found[moment].get("median_share")
            if share is not None:
                text = (
                    f"estimate {moment.replace('_', ' ')}, {setting}: median error at most "
                    f"{MAX_ETA_SHARE:.0%} of the wait that is left"
                )
                yield _goal(text, share, met=share <= MAX_ETA_SHARE)


def _retention(figures: Figures) -> Iterator[dict[str, Any]]:
    left = figures["left_of_jobs"]
    text = f"after their time no key is left of {figures['jobs']} jobs"
    yield _goal(text, left, met=left == 0)


_CHECKS: Final = {
    "rates": _rates,
    "depth": _depth,
    "chunks": _chunks,
    "costs": _costs,
    "eta": _eta,
    "retention": _retention,
}
