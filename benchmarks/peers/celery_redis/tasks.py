"""Celery's application and its producer, run in Celery's own environment.

    python -m benchmarks.peers.celery_redis.tasks NUM_TASKS START

waits until START, sends NUM_TASKS tasks, and prints when it began and ended, all in monotonic
seconds. The task does nothing and nobody asks for its result.
"""

import importlib
import os
import sys
import time
from typing import Any

from benchmarks.peers.celery_redis.names import URL_VARIABLE

celery: Any = importlib.import_module("celery")
app: Any = celery.Celery("bench", broker=os.environ[URL_VARIABLE])
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


def _nothing() -> None:
    pass


nothing: Any = app.task(name="bench.nothing")(_nothing)


def main() -> None:
    """Send tasks."""
    num_tasks, start = int(sys.argv[1]), float(sys.argv[2])
    time.sleep(max(0.0, start - time.monotonic()))
    began = time.monotonic()
    for _ in range(num_tasks):
        nothing.delay()
    print(began, time.monotonic())


if __name__ == "__main__":
    main()
