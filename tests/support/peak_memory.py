"""Loads a model in a process of its own and prints what memory that took.

    python -m support.peak_memory TINY_FOLDER FOLDER WEIGHT_DTYPE BACKEND

The tiny model is loaded first, so that what torch allocates at first use does not count.

Counted is anonymous memory only: the pages of a mapped checkpoint are resident too, but the system
takes them back when it needs them.
"""

import json
import sys
import threading
from pathlib import Path

from mixfleet_engine.config import EngineConfig
from mixfleet_engine.loading import load_runner


def anonymous_bytes() -> int:
    """Return this process's resident memory that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


class Watch(threading.Thread):
    """Looks as often as it can until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Keep the largest number seen."""
        while not self._stopped.wait(0.0005):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def stop(self) -> int:
        """Return the peak."""
        self._stopped.set()
        self.join()
        return max(self.peak_bytes, anonymous_bytes())


def main() -> None:
    """Load, and print the bytes before, at the peak and after."""
    tiny, folder, weight_dtype, backend = sys.argv[1:]
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16",
        threads=1,
        num_blocks=8,
        weight_dtype=weight_dtype,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
    )
    load_runner(Path(tiny), config)
    before = anonymous_bytes()
    watch = Watch()
    watch.start()
    runner = load_runner(Path(folder), config)
    peak = watch.stop()
    found = {"before": before, "peak": peak, "after": anonymous_bytes()}
    sys.stdout.write(json.dumps(found))
    del runner


if __name__ == "__main__":
    main()
