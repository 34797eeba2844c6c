"""What every benchmark writes beside its figures, so that they can be read years later."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


COMMIT = "MIXFLEET_COMMIT"
"""Environment variable that names the commit where there is no repository to ask."""


def write(name: str, figures: Mapping[str, object], path: Path | None = None) -> Path:
    """Write the figures with command, hardware, versions and commit.

    Args:
        name: Of the benchmark.
        figures: What it measured.
        path: Where to; None: ``results/<name>.json``.
    """
    path = path or RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "-m", "benchmarks", name, *sys.argv[1:]]),
        "commit": os.environ.get(COMMIT) or commit(RESULTS),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "python": platform.python_version(),
        **figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def commit(folder: Path) -> str:
    """Return the commit that is checked out at ``folder``, marked if something has changed since.

    ``unknown`` where there is no repository or no git.
    """
    try:
        found = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
