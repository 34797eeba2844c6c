"""A program of one rank that stops, as a hanging process does, at a chosen point of its start.

    python -m support.rank_start CHECKPOINT WHERE RANK PATIENCE_S

WHERE is ``started``, ``opening`` or ``loading``; the environment is torchrun's.
"""

import os
import signal
import sys
import time
from pathlib import Path

from mixfleet_engine.errors import EngineError
from mixfleet_engine.loading import load_runner
from mixfleet_engine.parallel import TensorParallel
from mixfleet_engine.ranks import RanksLostError
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_engine.start_watch import POLL_S
from mixfleet_worker.group import LOST_STATUS
from support.rank_scenario import CONFIG


def main(checkpoint: Path, where: str, victim: int, patience_s: float) -> int:
    """Start one rank; returns its exit status."""
    rendezvous = Rendezvous.from_environment()
    assert rendezvous is not None
    stops = rendezvous.shard.rank == victim

    def progress(done: int, total: int) -> None:
        if stops and where == "loading" and 2 * done > total:
            time.sleep(10 * POLL_S)  # a load so short that nobody sees it cannot hang either
            os.kill(os.getpid(), signal.SIGSTOP)

    if stops and where == "started":
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        with TensorParallel.connect(rendezvous, "cpu", patience_s=patience_s) as ranks:
            if stops and where == "opening":
                time.sleep(10 * POLL_S)
                os.kill(os.getpid(), signal.SIGSTOP)
            load_runner(checkpoint, CONFIG, progress, ranks)
            if rendezvous.shard.rank > 0:
                ranks.receive()
    except EngineError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201 - what the worker's command does
        return 1
    except RanksLostError:
        return LOST_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
