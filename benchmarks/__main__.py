"""``make bench``: what runs on this machine. ``python -m benchmarks NAME``: one of them.

The engine's benchmark installs its peers, which takes long, so it runs only by name.
"""

import importlib
import sys
from pathlib import Path

BENCHMARKS = ("fleet", "engine", "quality", "broker", "chaos", "gateway", "gpu")


def main() -> None:
    """Run the benchmark that the first word names, ``fleet`` without one."""
    name = "fleet"
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        name = sys.argv.pop(1)
    if name not in BENCHMARKS:
        sys.exit(f"no benchmark {name!r}: {', '.join(BENCHMARKS)}")
    # The soak breaks things with the means of the tests, and checks by their rules.
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    importlib.import_module(f"benchmarks.{name}").main()


main()
