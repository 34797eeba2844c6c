"""The GPU benchmark's figures as one text, and the ratios that follow from several stages."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from benchmarks.gpu_goals import figure, goals, invariance_costs

Figures = dict[str, Any]
_MODELS: Final = ("int4", "int4 not invariant", "fp8", "bf16")
_OFFLINE: Final = ("1000/1000", "128/128", "mix")


def summarise(stages: Mapping[str, Any]) -> Figures:
    """Return what follows from the stages' figures: goals, ratios, the cost of invariance."""
    return {
        "goals": list(goals(stages)),
        "of_transformers": of_transformers(stages),
        "invariance_cost": invariance_costs(stages),
    }


def of_transformers(stages: Mapping[str, Any]) -> dict[str, float]:
    """Return how many times as fast as transformers the bf16 model is, both with the same layers.

    The keys are ``prefill`` and the batch sizes.
    """
    ours, theirs = figure(stages, "bf16"), figure(stages, "transformers", "decode", "best")
    if not theirs or figure(ours, "decode", "decode") is None:
        return {}
    found = {
        batch: ours["decode"]["decode"][batch]["tokens_per_s"] / rate
        for batch, rate in theirs["decode"].items()
        if batch in ours["decode"]["decode"]
    }
    prefill = figure(ours, "decode", "prefill", "tokens_per_s")
    return {"prefill": prefill / theirs["prefill_tokens_per_s"], **found} if prefill else found


def text(record: Mapping[str, Any]) -> str:
    """Return the tables of a run, whatever of it there is."""
    stages = record["stages"]
    parts = [_machine(stages), _decode(stages), _others(stages)]
    parts += [_pieces(stages, part) for part in ("halves", "kernels")]
    parts += [_goals(record["goals"]), _ratios(record), _absent(stages)]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)


def _machine(stages: Mapping[str, Any]) -> Iterator[str]:
    found = figure(stages, "machine", "machine") or {}
    yield f"device {found.get('device', '?')}, driver {found.get('driver_version', '?')}"
    for name, rate in found.get("rates", {}).items():
        unit, size = ("GB/s", 1e9) if "bytes" in name else ("TFLOP/s", 1e12)
        yield f"  {name.partition('_')[0]:<6}{rate / size:10,.1f} {unit}"


def _decode(stages: Mapping[str, Any]) -> Iterator[str]:
    header = ("batch", "tok/s", "ITL ms p50", "p99", "of floor", "host gap")
    for stage in _MODELS:
        rows = figure(stages, stage, "decode", "decode")
        if not rows:
            continue
        layers, load_s = (figure(stages, stage, "load", name) for name in ("layers", "load_s"))
        yield f"{stage}: {layers} layers, loaded in {load_s:.1f} s"
        yield _row(header)
        for batch, row in rows.items():
            itl = (f"{row[name] * 1000:.2f}" for name in ("itl_p50_s", "itl_p99_s"))
            shares = (_percent(row.get(name)) for name in ("of_floor", "host_gap"))
            yield _row((batch, f"{row['tokens_per_s']:,.0f}", *itl, *shares))
        prefill = stages[stage]["decode"]["prefill"]
        of_floor = _percent(prefill.get("of_floor"))
        yield f"  prefill {prefill['tokens_per_s']:,.0f} tok/s, {of_floor} of floor"


def _others(stages: Mapping[str, Any]) -> Iterator[str]:
    for name in _OFFLINE:
        rate = figure(stages, "fp8", name, "output_tokens_per_s")
        if rate:
            cut = ", cut off" if "cut_after_s" in stages["fp8"][name] else ""
            yield f"fp8 offline {name}: {rate:,.0f} output tok/s{cut}"
    idle = figure(stages, "fp8", "itl", "idle_p50_s")
    for run in figure(stages, "fp8", "itl", "runs") or []:
        times = " ".join(
            f"{name} {run[key] * 1000:.1f} ms ({run[key] / idle:.1f} x)"
            for name, key in (("p50", "p50_s"), ("p99", "p99_s"), ("longest", "longest_s"))
        )
        end = "cut off" if run["is_cut"] else "its first token"
        yield (
            f"fp8 ITL beside a long prompt, target {run['target_s'] * 1000:.0f} ms: {times}; "
            f"{end} after {run['prefill_s']:.1f} s"
        )


def _pieces(stages: Mapping[str, Any], part: str) -> Iterator[str]:
    """Yield the table of half-layers or kernels."""
    for stage in _MODELS:
        for batch, rows in (figure(stages, stage, part) or {}).items():
            if not batch.isdigit():
                continue
            yield f"{stage} {part}, batch {batch}: ms a step, of floor"
            for name, row in rows.items():
                launches = f"{row['launches']:5} x" if "launches" in row else ""
                share = _percent(row.get("of_floor"))
                yield f"  {name[:40]:<40}{row['seconds'] * 1000:9.3f} {share:>7}{launches}"


def _goals(found: list[Figures]) -> Iterator[str]:
    if found:
        yield f"{'goal (one H100)':<52}{'measured':>10}{'must':>9}{'good':>9}  met"
    for goal in found:
        numbers = f"{goal['measured']:>10,.5g}{goal['must']:>9,.5g}{goal['ambitious']:>9,.5g}"
        yield f"{goal['goal']:<52}{numbers}  {goal['met']}"


def _ratios(record: Mapping[str, Any]) -> Iterator[str]:
    for batch, cost in record["invariance_cost"].items():
        yield f"batch invariance, int4, batch {batch}: {cost:+.1%}"
    for name, ratio in record["of_transformers"].items():
        what = name if name == "prefill" else f"decode, batch {name}"
        yield f"bf16 {what}: {ratio:.1f} x transformers"


def _absent(stages: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was left out or failed, with the reason."""
    for stage, parts in stages.items():
        for part, found in parts.items():
            if isinstance(found, str):
                yield f"absent: {stage}: {found}"
                continue
            for name in ("skipped", "skipped_batches", "error"):
                if name in found:
                    lines = found[name].strip().splitlines() or ["?"]
                    yield f"absent: {stage} / {part}: {name}: {lines[0]}"


def _row(cells: tuple[str, ...]) -> str:
    return "  " + "".join(f"{cell:>12}" for cell in cells)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
