"""The GPU engine's goals for one H100 and Mixtral 8x7B, each with what one run measured."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.gpu_decode import invariance_cost

Stages = Mapping[str, Any]
"""Figures by stage and part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure, the least that it must be, and what would be good."""

    name: str
    measured: Callable[[Stages], float | None]
    """None: the run has no such figure."""
    must: float
    ambitious: float
    is_limit: bool = False
    """Whether less is better."""

    def met_by(self, figure: float) -> str:
        """Return ``ambitious``, ``must`` or ``no``."""
        sign = -1 if self.is_limit else 1
        if sign * figure >= sign * self.ambitious:
            return "ambitious"
        return "must" if sign * figure >= sign * self.must else "no"


def figure(stages: Stages, *names: str) -> Any:
    """Return what is found under the names, one below the other; None: nothing."""
    found: Any = stages
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _decode(stage: str, batch: int) -> Callable[[Stages], float | None]:
    return lambda found: figure(found, stage, "decode", "decode", str(batch), "tokens_per_s")


def _offline(name: str) -> Callable[[Stages], float | None]:
    return lambda found: figure(found, "fp8", name, "output_tokens_per_s")


def _best_prefill(stages: Stages) -> float | None:
    found = [
        figure(stages, stage, "decode", "prefill", "tokens_per_s") for stage in ("int4", "fp8")
    ]
    return max((rate for rate in found if rate is not None), default=None)


def _itl_growth(stages: Stages) -> float | None:
    """Return the smallest p99 of the settings that were tried, over the idle ITL."""
    runs = figure(stages, "fp8", "itl", "runs") or []
    return min((run["p99_of_idle"] for run in runs), default=None)


def _largest_gap(stages: Stages) -> float | None:
    gaps = [
        row["host_gap"]
        for stage in ("int4", "fp8")
        for row in (figure(stages, stage, "decode", "decode") or {}).values()
        if "host_gap" in row
    ]
    return max(gaps, default=None)


def invariance_costs(stages: Stages) -> dict[str, float]:
    """Return by batch what batch invariance costs, as a share of a step without it."""
    invariant = figure(stages, "int4", "decode", "decode")
    free = figure(stages, "int4 not invariant", "decode", "decode")
    return invariance_cost(invariant, free) if invariant and free else {}


def _invariance(stages: Stages) -> float | None:
    return max(invariance_costs(stages).values(), default=None)


def _load(stage: str) -> Callable[[Stages], float | None]:
    return lambda found: figure(found, stage, "load", "load_s")


def _rate(
    name: str, measured: Callable[[Stages], float | None], must: float, ambitious: float
) -> Goal:
    return Goal(name=f"{name}, tok/s", measured=measured, must=must, ambitious=ambitious)


def _limit(
    name: str, measured: Callable[[Stages], float | None], must: float, ambitious: float
) -> Goal:
    return Goal(name=name, measured=measured, must=must, ambitious=ambitious, is_limit=True)


GOALS: Final = (
    _rate("int4 decode, batch 1", _decode("int4", 1), 230, 320),
    _rate("int4 decode, batch 8", _decode("int4", 8), 700, 950),
    _rate("int4 decode, batch 64", _decode("int4", 64), 3300, 4300),
    _rate("fp8 decode, batch 1", _decode("fp8", 1), 140, 175),
    _rate("fp8 decode, batch 8", _decode("fp8", 8), 370, 430),
    _rate("fp8 decode, batch 64", _decode("fp8", 64), 2400, 2900),
    _rate("fp8 decode, batch 256", _decode("fp8", 256), 5500, 7500),
    _rate("fp8 offline 1000/1000", _offline("1000/1000"), 4000, 6000),
    _rate("fp8 offline 128/128", _offline("128/128"), 6500, 9000),
    _rate("fp8 mix, mean answer 145", _offline("mix"), 4000, 5500),
    _rate("prefill", _best_prefill, 14_000, 20_000),
    _limit("p99 ITL beside a long prefill, times idle", _itl_growth, 3.0, 1.5),
    _limit("host gap, largest share of a step", _largest_gap, 0.10, 0.02),
    _limit("cost of batch invariance, share of a step", _invariance, 0.20, 0.10),
    _limit("load without a disk, int4, s", _load("int4"), 20, 20),
    _limit("load without a disk, fp8, s", _load("fp8"), 20, 20),
)


def goals(stages: Stages) -> Iterator[dict[str, Any]]:
    """Yield every goal that the run has a figure for, and whether answers hung on their batch."""
    for goal in GOALS:
        measured = goal.measured(stages)
        if measured is not None:
            yield {
                "goal": goal.name,
                "measured": measured,
                "must": goal.must,
                "ambitious": goal.ambitious,
                "met": goal.met_by(measured),
            }
    for stage in ("int4", "fp8", "bf16"):
        same = figure(stages, stage, "decode", "same_answers")
        if same is not None:
            yield {
                "goal": f"{stage}: the same tokens alone and in any batch",
                "measured": float(same),
                "must": 1.0,
                "ambitious": 1.0,
                "met": "ambitious" if same else "no",
            }
