"""Real worker processes, each with its log in a file that a failing test can show."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mixfleet_broker.connection import connect
from mixfleet_broker.registry import WorkerRecord, workers

START_LIMIT_S = 60.0
LEASE_S = 1.0
"""The shortest there is: a test waits for the end of a dead worker's lease."""


def until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Wait for `condition`, looking again and again; fail after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.01)


class WorkerProcess:
    """`python -m mixfleet_worker` with a short lease; killed at the end of the block."""

    def __init__(
        self,
        url: str,
        worker_id: str,
        directory: Path,
        *arguments: str | Path,
        key_prefix: str = "",
    ) -> None:
        self.worker_id = worker_id
        self._key_prefix = key_prefix
        self.log_file = directory / f"{worker_id}.log"
        self._redis_url = url
        self._command = [
            *(sys.executable, "-m", "mixfleet_worker", "--redis", url, "--worker-id", worker_id),
            *("--lease-s", str(LEASE_S), "--threads", "1", *map(str, arguments)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def record(self) -> WorkerRecord | None:
        """What the worker says of itself in the registry."""
        with connect(self._redis_url) as redis:
            records = workers(redis, prefix=self._key_prefix)
        return next((record for record in records if record.worker_id == self.worker_id), None)

    def launch(self) -> None:
        """Start it without waiting until it is ready."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(self._command, stderr=log, stdout=log)

    def __enter__(self) -> Self:
        self.launch()
        until(self._is_up, f"worker {self.worker_id} is ready", START_LIMIT_S)
        return self

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log
        return self.record() is not None

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop it where it is, as a machine that sleeps."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to drain."""
        self.process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        """Wait for its end."""
        return self.process.wait(timeout=20)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.kill()
