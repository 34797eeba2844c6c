"""Clients in processes of their own, to be killed and stopped. What they read lies in a file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from support import client_program
from support.worker_process import until

TESTS = Path(__file__).parents[1]


class ClientProcess:
    """One question of one process, see client_program.py; killed at the end of the block."""

    def __init__(self, url: str, question: str, directory: Path, *flags: str) -> None:
        self._file = directory / f"{question}.out"
        self._command = [sys.executable, client_program.__file__, url, question, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def job_id(self) -> str:
        return self._said("job_id")[0]

    @property
    def text(self) -> str:
        """What it has read so far."""
        return "".join(self._said("text"))

    @property
    def num_pieces(self) -> int:
        return len(self._said("text"))

    @property
    def end(self) -> str | None:
        """How its job ended, as far as it knows."""
        return next(iter(self._said("end")), None)

    def await_pieces(self, number: int) -> None:
        """Wait until it has read so many pieces of its answer."""
        until(lambda: self.num_pieces >= number, f"{number} pieces of the answer were read")

    def await_end(self) -> str:
        """Wait until its job has ended, and return how."""
        until(lambda: self.end is not None, "the client has seen the end")
        return self.end or ""

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop it where it is: it reads nothing, and its connection stays."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def _said(self, name: str) -> list[str]:
        lines = self._file.read_text().splitlines(keepends=True)
        said = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line[name] for line in said if name in line]

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with self._file.open("wb") as out:
            self._process = subprocess.Popen(
                self._command, stdout=out, env={**os.environ, "PYTHONPATH": path}
            )
        until(lambda: bool(self._said("job_id")), "the client has sent its question")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
