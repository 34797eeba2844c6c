"""Measures Celery from outside: its producers and its worker are processes of its environment.

A worker's rate is counted by what is left in its queue, from the first moment at which something
was taken.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from redis import Redis

from benchmarks.broker_statistics import rate
from benchmarks.peers.celery_redis.names import QUEUE, TASKS, UNACKED, URL_VARIABLE
from benchmarks.peers.installing import PeerError, last_line

ROOT: Final = Path(__file__).parents[3]
Pool = Literal["prefork", "solo"]
_IMPORT_S: Final = 2.0
"""A producer has so long to import Celery before it begins."""
_LIMIT_S: Final = 60.0
_LOOK_S: Final = 0.002
_END_S: Final = 10.0


class Celery:
    """Celery against one Redis.

    Args:
        python: Of its environment.
        url: Of the Redis.
        redis: A client of it.
        log: Where its processes write.

    Raises:
        PeerError: From every method: one of its processes failed or was not done in time.
    """

    def __init__(self, python: Path, url: str, redis: Redis, log: Path) -> None:
        self._python = str(python)
        self._redis: Any = redis
        self._log = log
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment = {**os.environ, "PYTHONPATH": path, URL_VARIABLE: url}

    def submits_per_s(self, num_processes: int, num_tasks: int) -> float:
        """Return the rate at which so many producers send; the tasks stay in the queue."""
        each = num_tasks // num_processes
        return rate(each * num_processes, self._send(num_processes, each))

    def works_per_s(self, pool: Pool, num_processes: int) -> float:
        """Return the rate at which a worker empties the queue."""
        waiting = self._left()
        with self._worker(pool, num_processes) as worker:
            self._await(worker, lambda: self._left() < waiting)
            left, began = self._left(), time.monotonic()
            self._await(worker, lambda: not self._left())
            return left / (time.monotonic() - began)

    def both_per_s(self, pool: Pool, producers: int, num_processes: int, num_tasks: int) -> float:
        """Return the rate of tasks that so many producers send and so many processes run."""
        each = num_tasks // producers
        with self._worker(pool, num_processes) as worker:
            self._send(1, 1)
            self._await(worker, lambda: not self._left())
            spans = self._send(producers, each)
            self._await(worker, lambda: not self._left())
            return rate(each * producers, [*spans, (spans[0][0], time.monotonic())])

    def _send(self, num_processes: int, each: int) -> list[tuple[float, float]]:
        start = time.monotonic() + _IMPORT_S
        command = [self._python, "-m", TASKS, str(each), str(start)]
        with self._log.open("a") as log:
            producers = [
                subprocess.Popen(
                    command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
                )
                for _ in range(num_processes)
            ]
            try:
                outputs = [producer.communicate(timeout=_LIMIT_S)[0] for producer in producers]
            except subprocess.TimeoutExpired as error:
                raise PeerError(f"a producer is not done after {_LIMIT_S:g} s") from error
            finally:
                for producer in producers:
                    producer.kill()
        if any(producer.returncode for producer in producers):
            raise PeerError(f"a producer failed: {last_line(self._log)}")
        spans = [output.split() for output in outputs]
        return [(float(began), float(ended)) for began, ended in spans]

    def _left(self) -> int:
        """Return how many tasks wait or were fetched and not begun."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.llen(QUEUE)
            pipeline.hlen(UNACKED)
            return sum(pipeline.execute())

    def _await(self, worker: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            if worker.poll() is not None:
                raise PeerError(f"its worker ended: {last_line(self._log)}")
            if time.monotonic() > deadline:
                raise PeerError(f"its worker is not done after {_LIMIT_S:g} s")
            time.sleep(_LOOK_S)

    @contextmanager
    def _worker(self, pool: Pool, num_processes: int) -> Iterator["subprocess.Popen[bytes]"]:
        command = [self._python, "-m", "celery", "-A", TASKS, "worker", "--pool", pool]
        command += ["--concurrency", str(num_processes), "--loglevel", "ERROR"]
        # Each of these would talk to workers that are not there.
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with self._log.open("a") as log:
            worker = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        try:
            yield worker
        finally:
            worker.terminate()
            try:
                worker.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
