"""The engine's goals, as ratios of figures that one run measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "mixfleet"
_BF16 = ("bf16", "eager", "grouped_mm", "compiled")
"""How the peers' variants with bf16 weights end."""
MAX_OUTSIDE_MODEL = 0.08
MAX_CONTEXT_GROWTH = 1.1
"""A step may get this much slower than its bytes say, from the shortest context to the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioGoal:
    """At least so many times as fast as a peer."""

    name: str
    figure: str
    """``prefill``, or a batch size for the decode rate."""
    peer: str
    at_least: float
    ours: str = ""
    """Only variants that end so; empty is the best of all."""
    theirs: tuple[str, ...] = ("",)
    """The peer's variants that end in one of these."""


RATIOS = (
    RatioGoal(
        name="batch 1 bf16, at least 0.95 x llama.cpp bf16",
        figure="1",
        peer="llama_cpp",
        at_least=0.95,
        ours=":bf16",
        theirs=("bf16",),
    ),
    RatioGoal(
        name="batch 1 best, at least llama.cpp's best quantised",
        figure="1",
        peer="llama_cpp",
        at_least=1.0,
        theirs=("q8_0", "q4_0"),
    ),
    RatioGoal(name="batch 8, at least 1.6 x vLLM", figure="8", peer="vllm_cpu", at_least=1.6),
    RatioGoal(name="batch 32, at least 1.4 x vLLM", figure="32", peer="vllm_cpu", at_least=1.4),
    RatioGoal(
        name="prefill, at least 1.1 x transformers",
        figure="prefill",
        peer="transformers",
        at_least=1.1,
    ),
)


def goals(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every goal that the run has figures for, with what was measured."""
    found = []
    for name, model in models.items():
        engines = model["engines"]
        for goal in RATIOS:
            ours = best(engines, OURS, (goal.ours,), goal.figure)
            theirs = best(engines, goal.peer, goal.theirs, goal.figure)
            if ours and theirs:
                ratio = ours / theirs
                met = ratio >= goal.at_least
                found.append({"model": name, "goal": goal.name, "measured": ratio, "met": met})
        for engine, figures in engines.items():
            found += [{"model": name, **goal} for goal in _own_goals(engine, figures)]
    return found


def ratios(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return our best figure over each peer's best, by model, peer and figure.

    ``best`` is of all variants on both sides, ``bf16`` of those with bf16 weights.
    """
    found: dict[str, Any] = {}
    for name, model in models.items():
        engines = model["engines"]
        peers = dict.fromkeys(engine.partition(" ")[0] for engine in engines)
        for peer in (peer for peer in peers if peer != OURS):
            for figure in ("prefill", *model["experts_hit"]):
                for kind, ending in (("best", ""), ("bf16", ":bf16")):
                    ours = best(engines, OURS, (ending,), figure)
                    theirs = best(engines, peer, _BF16 if ending else ("",), figure)
                    if ours and theirs:
                        row = found.setdefault(name, {}).setdefault(f"{kind} / {peer}", {})
                        row[figure] = ours / theirs
    return found


def best(
    engines: Mapping[str, Any], peer: str, endings: tuple[str, ...], figure: str
) -> float | None:
    """Return the best rate of ``peer``'s variants with one of the ``endings``; None without any."""
    speeds = [
        engine["prefill_tokens_per_s"]
        if figure == "prefill"
        else engine["decode"].get(figure, {}).get("tokens_per_s", 0.0)
        for name, engine in engines.items()
        if name.startswith(f"{peer} ") and name.endswith(endings)
    ]
    return max(speeds, default=None)


def _own_goals(engine: str, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for kind, how in (("overhead", "greedy"), ("overhead_sampled", "sampled")):
        if kind in figures:
            share = figures[kind]["outside_model_share"]
            text = f"{engine}: at most 8 % of a step outside the model, {how}"
            met = share <= MAX_OUTSIDE_MODEL
            found.append({"goal": text, "measured": share, "met": met})
    for batch in dict.fromkeys(row["batch"] for row in figures.get("contexts", [])):
        growth = context_growth([row for row in figures["contexts"] if row["batch"] == batch])
        if growth is not None:
            text = f"{engine}: a longer context costs no more than its bytes, batch {batch}"
            met = growth <= MAX_CONTEXT_GROWTH
            found.append({"goal": text, "measured": growth, "met": met})
    return found


def context_growth(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how a step's time grew from the first context to the last, over how its bytes grew.

    The bytes are weights and KV cache. 1 means that a longer context costs as much as reading it
    does, less that it hides behind the weights. None with a single context, or where the batch
    size was not measured otherwise.
    """
    if len(rows) < 2 or "weight_bytes" not in rows[0]:
        return None
    first, last = rows[0], rows[-1]
    first_bytes, last_bytes = (row["weight_bytes"] + row["kv_bytes"] for row in (first, last))
    return float((last["step_s"] / first["step_s"]) / (last_bytes / first_bytes))
