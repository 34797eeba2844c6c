"""From the runs of the engine benchmark to medians, ratios, goals and tables."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.engine_goals import OURS, goals, ratios
from benchmarks.floor import WEIGHT_BYTES, Sizes, experts_hit, step_seconds, weight_bytes

MACHINE = "machine"
_MIB = 1 << 20

Figures = dict[str, Any]


def summarise(runs: Sequence[Figures], sizes: Mapping[str, Sizes]) -> Figures:
    """Return the medians over the rounds with floors, ratios and goals.

    Args:
        runs: One entry per run: ``round``, ``model``, ``engine`` and the figures of that run.
        sizes: Each model's.
    """
    # A limit is what was reached at best; the median would be what others left of it.
    machine = maxima([_plain(run) for run in runs if run["engine"] == MACHINE])
    models = {model: _model(runs, model, found, machine) for model, found in sizes.items()}
    return {
        "machine": machine,
        "models": models,
        "ratios": ratios(models),
        "goals": goals(models),
    }


def _model(runs: Sequence[Figures], model: str, sizes: Sizes, machine: Figures) -> Figures:
    names = dict.fromkeys(
        run["engine"] for run in runs if run["model"] == model and run["engine"] != MACHINE
    )
    engines: dict[str, Figures] = {}
    for name in names:
        found = [run for run in runs if (run["model"], run["engine"]) == (model, name)]
        engines[name] = medians([_plain(run) for run in found])
    hit = next((e["experts_hit"] for e in engines.values() if "experts_hit" in e), None)
    for name, figures in engines.items():
        weights = weights_of(name)
        for batch, decode in figures["decode"].items():
            measured = None if hit is None else hit.get(batch)
            floor = step_seconds(sizes, int(batch), weights, machine, measured)
            for row in figures.get("contexts", []):
                if row["batch"] == int(batch):
                    row["weight_bytes"] = weight_bytes(sizes, int(batch), weights, measured)
            decode["of_floor"] = decode["tokens_per_s"] * floor / int(batch)
    batches = {batch: None for e in engines.values() for batch in e["decode"]}
    read = {
        batch: {"uniform": experts_hit(sizes, int(batch)), "measured": (hit or {}).get(batch)}
        for batch in batches
    }
    floors = {
        weights: {
            batch: int(batch)
            / step_seconds(sizes, int(batch), weights, machine, read[batch]["measured"])
            for batch in batches
        }
        for weights in WEIGHT_BYTES
    }
    return {"experts_hit": read, "floor_tokens_per_s": floors, "engines": engines}


def weights_of(engine: str) -> str:
    """Return how an engine stores weights, by its name: the last word if it says so, else bf16."""
    last = engine.replace(":", " ").split()[-1]
    return last if last in WEIGHT_BYTES else "bf16"


def _plain(run: Figures) -> Figures:
    return {key: run[key] for key in run if key not in ("round", "model", "engine")}


def medians(found: Sequence[Any]) -> Any:
    """Return ``found`` with every number replaced by the median, the rest as in the first.

    An entry that only some have, a measurement of the first round for example, is the median of
    those.
    """
    first = found[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for one in found for key in one)
        return {key: medians([one[key] for one in found if key in one]) for key in keys}
    if isinstance(first, list):
        return next((one for one in found if one), first)
    if isinstance(first, (int, float)):
        return statistics.median(found)
    return first


def maxima(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest figure of each name; nothing of nothing."""
    return {key: max(one[key] for one in found) for key in (found[0] if found else {})}


def text(figures: Figures, absent: Mapping[str, str]) -> str:
    """Return the tables as Markdown."""
    machine = figures["machine"]
    lines: list[str] = []
    if machine:
        lines += [
            f"Read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s; "
            f"bf16 {machine['bf16_flops'] / 1e9:.0f} GFLOP/s, "
            f"fp32 {machine['fp32_flops'] / 1e9:.0f} GFLOP/s, "
            f"int8 {machine['int8_ops'] / 1e9:.0f} GOP/s"
        ]
    for name, model in figures["models"].items():
        lines += ["", f"## {name}", "", *_engines_table(model), "", *_details(model)]
        lines += ["", *_ratios_table(figures["ratios"].get(name, {}))]
    lines += ["", "## Goals", "", *_goals_table(figures["goals"])]
    if absent:
        lines += ["", *(f"absent: {name}: {reason}" for name, reason in absent.items())]
    return "\n".join(lines)


def _engines_table(model: Figures) -> list[str]:
    batches = list(model["experts_hit"])
    header = ["engine", "prefill tok/s", *(f"B={batch} tok/s (of floor)" for batch in batches)]
    rows = [[*header, "TTFT 128 ms", "start s", "peak MiB"]]
    for name, engine in model["engines"].items():
        rows.append(
            [
                name,
                f"{engine['prefill_tokens_per_s']:.0f}",
                *(_rate(engine["decode"].get(batch)) for batch in batches),
                f"{1000 * engine['ttft_s']:.0f}",
                f"{engine['startup_s']:.1f}",
                f"{engine['peak_rss_bytes'] / _MIB:.0f}",
            ]
        )
        if "decode_sampled" in engine:
            found = (engine["decode_sampled"].get(batch) for batch in batches)
            sampled = ("" if one is None else f"{one['tokens_per_s']:.1f}" for one in found)
            rows.append([f"{name}, t=0.7 top-p=0.9", "", *sampled, "", "", ""])
    for weights in ("bf16", "int8", "int4"):
        floors = model["floor_tokens_per_s"][weights]
        rows.append([f"floor {weights}", "", *(f"{floors[b]:.1f}" for b in batches), "", "", ""])
    return table(rows)


def _rate(decode: Figures | None) -> str:
    return "" if decode is None else f"{decode['tokens_per_s']:.1f} ({decode['of_floor']:.0%})"


def _details(model: Figures) -> list[str]:
    lines = []
    for name, engine in model["engines"].items():
        if "loaded" in engine:
            lines.append(f"{name}: {engine['loaded']}")
        for kind in ("overhead", "overhead_sampled"):
            if kind not in engine:
                continue
            share = engine[kind]
            sampled = ", t=0.7 top-p=0.9" if "sampled" in kind else ""
            lines.append(
                f"{name}{sampled}, batch 8: "
                f"outside the model {share['outside_model_share']:.1%} of a step "
                f"(scheduler {share['scheduler_share']:.1%}, sampler {share['sampler_share']:.1%}, "
                f"detokeniser {share['detokenizer_share']:.1%})"
            )
        if engine.get("contexts"):
            lines += ["", *_contexts_table(engine["contexts"]), ""]
    return lines


def _contexts_table(rows: Iterable[Figures]) -> list[str]:
    cells = [["batch", "context", "step ms", "KV read MiB"]]
    for row in rows:
        read = f"{row['kv_bytes'] / _MIB:.1f}"
        cells.append([str(row["batch"]), str(row["context"]), f"{1000 * row['step_s']:.1f}", read])
    return table(cells)


def _ratios_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not rows:
        return []
    columns = list(next(iter(rows.values())))
    header = [f"{OURS} / its best", *(c if c == "prefill" else f"B={c}" for c in columns)]
    return table(
        [header, *([name, *(f"{row[c]:.2f}" for c in columns)] for name, row in rows.items())]
    )


def _goals_table(found: Iterable[Figures]) -> list[str]:
    cells = [["model", "goal", "measured", "met"]]
    for goal in found:
        met = "yes" if goal["met"] else "no"
        cells.append([goal["model"], goal["goal"], f"{goal['measured']:.3f}", met])
    return table(cells)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; the first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
