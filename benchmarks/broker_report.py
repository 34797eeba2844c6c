"""The tables of the broker's benchmark, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.engine_report import table

Figures = Mapping[str, Any]

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20


def text(parts: Figures, goals: Sequence[Figures], absent: Mapping[str, str]) -> str:
    """Return all tables.

    Args:
        parts: The figures by part.
        goals: What :func:`benchmarks.broker_goals.goals` returns.
        absent: Who is left out, and why.
    """
    lines: list[str] = []
    for part, (title, tables) in _PARTS.items():
        if part in parts:
            lines += ["", f"## {title}", "", *tables(parts[part])]
    lines += ["", "## Goals", "", *_goals(goals)]
    lines += [f"absent: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _rates(figures: Figures) -> list[str]:
    systems = {name: found for name, found in figures.items() if name != "floor"}
    processes = list(next(iter(systems.values()))["submits_per_s"])
    rows = [
        [
            "jobs/s",
            *(f"submit, {n} proc." for n in processes),
            *(f"work off, {n} proc." for n in processes),
            "both at once (clients + workers)",
        ]
    ]
    for name, found in systems.items():
        rates = [found[kind][n] for kind in ("submits_per_s", "works_per_s") for n in processes]
        how, both = max(found["both_per_s"].items(), key=lambda one: one[1])
        rows.append([name, *(f"{one:.0f}" for one in rates), f"{both:.0f} ({how})"])
    floor = figures["floor"]
    line = (
        f"Floor, one client, no queue: {floor['pings_per_s']:.0f} PING/s, "
        f"{floor['pushes_per_s']:.0f} RPUSH/s; in pipelines of 16 "
        f"{floor['pushes_by_16_per_s']:.0f} RPUSH/s, by LPOP of 16 "
        f"{floor['pops_by_16_per_s']:.0f} jobs/s."
    )
    return [*table(rows), "", line]


def _depth(figures: Figures) -> list[str]:
    lines: list[str] = []
    for arrangement, rows in figures.items():
        calls = list(next(iter(rows.values())))
        cells = [[f"{arrangement}: jobs waiting", *(f"{call} ms (in Redis)" for call in calls)]]
        for depth, found in rows.items():
            times = (found[call] for call in calls)
            shown = (f"{one['p50_ms']:.3f} ({one['server_p50_ms']:.3f})" for one in times)
            cells.append([depth, *shown])
        lines += [*table(cells), ""]
    return [*lines, "Medians; a claim is of 16 jobs, a cancel and a standing of any queued job."]


def _chunks(figures: Figures) -> list[str]:
    header = ["streams", "chunks/s each", "readers", "planned/s", "read/s", "p50 ms", "p95 ms"]
    rows = [[*header, "p99 ms", "step ms", "cores: writers + readers + Redis"]]
    for case in figures.values():
        latency, cores = case["latency_ms"], case["cores_used"]
        spread = (f"{latency[p]:.1f}" if p in latency else "-" for p in ("p50", "p95", "p99"))
        used = " + ".join(f"{cores[who]:.2f}" for who in ("writers", "readers", "redis"))
        each, planned = case["chunks_per_s_per_stream"], case["planned_per_s"]
        rows.append(
            [
                f"{case['streams']:.0f}",
                f"{each:g}" if each else "full speed",
                case["way"],
                f"{planned:.0f}" if planned else "-",
                f"{case['read_per_s']:.0f}",
                *spread,
                f"{case['step_ms'].get('p50', 0):.2f}",
                used,
            ]
        )
    return table(rows)


def _costs(figures: Figures) -> list[str]:
    rows = [["call", "round trips", "commands in Redis", "Redis's processor us"]]
    for name, call in figures["calls"].items():
        costs = [f"{call['round_trips']:.2f}", f"{call['commands']:.1f}", f"{call['redis_us']:.0f}"]
        rows.append([name, *costs])
    job = figures["job"]
    spent = ", ".join(f"{what} {us:.0f}" for what, us in job["redis_us"].items())
    kept = ", ".join(f"{state} {size / _KIB:.1f}" for state, size in job["bytes"].items())
    lines = [
        f"A job with a prompt of 1.2 KB and an answer of 200 tokens: Redis's processor us {spent}.",
        f"Its memory in KiB: {kept}.",
    ]
    for state, kinds in job["bytes_by_kind"].items():
        sizes = ", ".join(f"{kind} {size:.0f}" for kind, size in kinds.items())
        lines.append(f"- {state}, bytes by key: {sizes}")
    return [*table(rows), "", *lines]


def _eta(figures: Figures) -> list[str]:
    header = ["estimate", "asked", "median wait s", "median error s", "p90 error s", "bias s"]
    rows = [[*header, "median share of what is left", "p90 share"]]
    for setting, found in figures.items():
        for moment in ("at_submit", "at_half"):
            errors = found[moment]
            numbers = ("median_error_s", "p90_error_s", "median_bias_s")
            shares = ("median_share", "p90_share")
            rows.append(
                [
                    f"{moment.replace('_', ' ')}, {setting}",
                    f"{errors['asked']:.0f}",
                    f"{found['median_wait_s']:.2f}",
                    *(f"{errors[n]:.2f}" if n in errors else "-" for n in numbers),
                    *(f"{errors[n]:.0%}" if n in errors else "-" for n in shares),
                ]
            )
    return table(rows)


def _retention(figures: Figures) -> list[str]:
    end = figures["at_the_end"]
    left = ", ".join(f"{kind} {n:.0f}" for kind, n in figures["left_by_kind"].items()) or "none"
    return [
        f"{figures['jobs']:.0f} jobs, kept for {figures['kept_s']:.0f} s, ended in "
        f"{figures['run_s']:.1f} s: then {end['keys']:.0f} keys, {end['bytes'] / _MIB:.1f} MiB.",
        f"{figures['gone_after_s']:.1f} s later, after one reap of {figures['reap_ms']:.1f} ms: "
        f"{figures['left_of_jobs']:.0f} keys of jobs, {figures['left_bytes'] / _MIB:.1f} MiB.",
        f"Keys that are left: {left}.",
    ]


def _goals(goals: Sequence[Figures]) -> list[str]:
    rows = [["goal", "measured", "met"]]
    for goal in goals:
        rows.append([goal["goal"], f"{goal['measured']:.4g}", "yes" if goal["met"] else "no"])
    return [*table(rows), ""]


_PARTS: Final = {
    "rates": ("Jobs per second", _rates),
    "depth": ("Calls while jobs wait", _depth),
    "chunks": ("From append to reader", _chunks),
    "costs": ("What a call and a job cost", _costs),
    "eta": ("Estimates of the wait", _eta),
    "retention": ("What is left", _retention),
}
