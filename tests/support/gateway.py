"""A real gateway process on a free port of loopback."""

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from support.worker_process import START_LIMIT_S, until

_URL = re.compile(r"running on (http://127\.0\.0\.1:\d+)")


class GatewayProcess:
    """``mixfleet gateway`` as a process; ended at the end of the block.

    Args:
        url: Of Redis.
        directory: For its log.
        options: More of its command line.
    """

    def __init__(self, url: str, directory: Path, *options: str) -> None:
        self.log_file = directory / "gateway.log"
        self._command = [sys.executable, "-m", "mixfleet", "gateway", "--redis", url]
        self._command += ["--listen", "127.0.0.1:0", *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        found = _URL.search(self.log)
        assert found is not None, self.log
        return found[1]

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(self._command, stderr=log, stdout=log)
        try:
            until(self._is_up, "the gateway is ready", START_LIMIT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        return bool(_URL.search(self.log)) and httpx2.get(f"{self.url}/livez").status_code == 200

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
