"""One GPU: Mixtral 8x7B of the true shape with random weights, beside what the device can do.

    python -m benchmarks gpu [--minutes 9] [--stages machine int4 ...] [--out FILE] [--tiny]

Needs torch and triton, and transformers for the comparison with it. Each stage runs in a process of
its own and is ended when its time is over. What was measured is written after every part, so a run
that is cut off leaves its figures.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import gpu_report, report
from benchmarks.gpu_budget import Budget
from benchmarks.gpu_goals import figure
from benchmarks.gpu_stage import StageJob
from benchmarks.report import say

STAGE_LIMITS_S: Final = {
    "machine": 60,
    "int4": 260,
    "int4 not invariant": 90,
    "fp8": 330,
    "bf16": 120,
    "transformers": 90,
}
"""A stage that hangs must not take the others' time."""
_LEAST_STAGE_S: Final = 15
"""A stage is not begun with less time left: torch alone takes most of it."""
_POLL_S: Final = 0.3
_GRACE_S: Final = 2.0
"""A stage that is still there so long after its deadline is ended."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    names = list(STAGE_LIMITS_S)
    parser.add_argument("--stages", nargs="*", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="default: results/gpu.json")
    parser.add_argument(
        "--tiny", action="store_true", help="try everything with a tiny model, on a CPU too"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run all stages and return their figures by name.

    Args:
        arguments: The options.
        save: Called with all figures whenever there are new ones.
    """
    # A moment is left to write and print.
    budget = Budget(time.time() + 60 * arguments.minutes - 5)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in arguments.stages:
            if shortage := budget.shortage(0 if arguments.tiny else _LEAST_STAGE_S):
                found[stage] = {"stage": shortage}
                continue
            say(stage)
            job = StageJob(
                stage=stage,
                deadline=min(budget.deadline, time.time() + STAGE_LIMITS_S[stage]),
                is_tiny=arguments.tiny,
                rates=figure(found, "machine", "machine", "rates"),
            )
            run_stage(job, Path(folder), found, lambda: save(found))
            save(found)
    return found


def run_stage(
    job: StageJob, folder: Path, found: dict[str, Any], changed: Callable[[], None]
) -> None:
    """Run one stage in a process of its own and keep its figures in ``found``.

    It knows its deadline. One that has not ended a little later hangs, and is killed.
    """
    file, result = folder / "job.json", folder / "result.json"
    job.write(file)
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_stage", str(file), str(result)]
    with subprocess.Popen(command) as process:
        try:
            last = ""
            while process.poll() is None and time.time() < job.deadline + _GRACE_S:
                time.sleep(_POLL_S)
                if result.exists() and (written := result.read_text()) != last:
                    last = written
                    found[job.stage] = json.loads(written)
                    changed()
        finally:
            process.kill()  # nothing, where it has ended
    found[job.stage] = json.loads(result.read_text()) if result.exists() else {}
    if process.returncode < 0:
        found[job.stage]["stage"] = f"ended by signal {-process.returncode}"
    elif process.returncode:
        found[job.stage]["stage"] = f"failed with exit status {process.returncode}"


def main() -> None:
    """Measure, write after every part, and print the tables."""
    arguments = parse_arguments(sys.argv[1:])
    results = report.RESULTS / "gpu.json"
    if arguments.tiny and arguments.out and arguments.out.resolve() == results.resolve():
        sys.exit(f"{results} is for figures of a GPU and the whole model, not for --tiny")
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device here: nothing is measured, and no result is written; "
            "--tiny tries every part on the CPU"
        )

    def record(found: dict[str, Any]) -> dict[str, Any]:
        settings = {"minutes": arguments.minutes, "tiny": arguments.tiny}
        summary = gpu_report.summarise(found)
        if arguments.tiny:
            summary["goals"] = []  # they are another model's
        return {**settings, "stages": found, **summary}

    def save(found: dict[str, Any]) -> None:
        if arguments.out or not arguments.tiny:
            report.write("gpu", record(found), arguments.out)

    found = run(arguments, save)
    print(gpu_report.text(record(found)))
    if arguments.out or not arguments.tiny:
        print(arguments.out or results)
    else:
        print("a tiny model says nothing about speed: no result is written")


if __name__ == "__main__":
    main()
