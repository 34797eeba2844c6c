"""``make bench``: what runs on this machine. ``python -m benchmarks NAME``: one of them.

The engine's benchmark installs its peers, which takes long, so it runs only by name.
"""

import importlib
import sys

BENCHMARKS = ("fleet", "engine", "quality", "broker")


def main() -> None:
    """Run the benchmark that the first word names, ``fleet`` without one."""
    name = "fleet"
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        name = sys.argv.pop(1)
    if name not in BENCHMARKS:
        sys.exit(f"no benchmark {name!r}: {', '.join(BENCHMARKS)}")
    importlib.import_module(f"benchmarks.{name}").main()


main()
