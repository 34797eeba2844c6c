"""One stage of the GPU benchmark in a process of its own: a model, and what is measured of it.

    python -m benchmarks.gpu_stage JOB.json RESULT.json

A process of its own gives its memory back in full, and what breaks the device in it breaks no other
stage. Its result is written anew after each part, so that whatever ends it leaves what it had.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import torch

from benchmarks.gpu_bench import Bench, Part
from benchmarks.gpu_budget import Budget
from benchmarks.gpu_load import NotMeasurableError
from benchmarks.gpu_parts import stages
from benchmarks.gpu_requests import Figures
from benchmarks.gpu_scale import FULL, TINY
from benchmarks.report import say

_MOST_ERROR: Final = 2000
"""Characters kept of an error's text: its end, where Triton says what it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """What one process measures."""

    stage: str
    deadline: float
    """Epoch seconds."""
    is_tiny: bool
    rates: dict[str, float] | None
    """As `measure_rates` returned them; None: there are no floors."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the job that :meth:`write` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write it for the stage's process."""
        path.write_text(json.dumps(asdict(self)))


def run_parts(bench: Bench, parts: tuple[Part, ...], save: Callable[[Figures], None]) -> Figures:
    """Measure all parts and return their figures by name; what failed or was left out says why.

    Args:
        bench: What they share.
        parts: In order.
        save: Called with all figures whenever there are more, and after each part.
    """
    results: Figures = {}
    for part in parts:
        found: Figures = {}
        results[part.name] = found
        if shortage := bench.budget.shortage(part.needed_s):
            found["skipped"] = shortage
        else:
            _measure(bench, part, found, lambda: save(results))
        save(results)
        _free(bench.device)
    return results


def _measure(bench: Bench, part: Part, found: Figures, save: Callable[[], None]) -> None:
    left_s = bench.budget.left_s
    try:
        for _ in part.measure(bench, found) or ():
            save()
    except NotMeasurableError as error:
        found["skipped"] = str(error)
    except Exception as error:  # whatever a kernel, a compiler or the memory may do
        found["error"] = f"{type(error).__name__}: {error}"[-_MOST_ERROR:]
        traceback.print_exc()
    found["took_s"] = left_s - bench.budget.left_s
    say(f"  {part.name}: {found['took_s']:.0f} s {found.get('skipped') or found.get('error', '')}")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # After a fault in a kernel every call fails; the next part will say so.
            say(f"  memory not freed: {error}")


def main() -> None:
    """Measure the stage that the job names."""
    job, result = StageJob.read(Path(sys.argv[1])), Path(sys.argv[2])
    scale = TINY if job.is_tiny else FULL
    bench = Bench(scale, job.rates, Budget(job.deadline))

    def save(figures: Figures) -> None:
        written = result.with_suffix(".new")
        written.write_text(json.dumps(figures))
        written.replace(result)

    run_parts(bench, stages(bench.scale)[job.stage], save)


if __name__ == "__main__":
    main()
