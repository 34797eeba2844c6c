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


def write(name: str, figures: Mapping[str, object]) -> Path:
    """Write ``results/<name>.json``: the figures with command, hardware, versions and commit."""
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "-m", "benchmarks", name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD") + _dirty(),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "python": platform.python_version(),
        **figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _dirty() -> str:
    return "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
