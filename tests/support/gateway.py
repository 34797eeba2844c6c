"""Real gateway processes on free ports, each with its log in a file."""

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from support.worker_process import until

START_LIMIT_S = 30.0
_PORT = re.compile(r"running on http://127\.0\.0\.1:(\d+)")


class GatewayProcess:
    """``mixfleet gateway`` on loopback, as a context manager; ended by its process id.

    Args:
        url: Of Redis.
        directory: For its log.
        arguments: More of its options.
        program: Python to run in the place of ``-m mixfleet``; it gets the same arguments.
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        *arguments: str,
        program: tuple[str, ...] = ("-m", "mixfleet"),
    ) -> None:
        self.log_file = directory / f"gateway-{id(self)}.log"
        self._command = [sys.executable, *program, "gateway", "--redis", url]
        self._command += ["--listen", "127.0.0.1:0", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, secret: str = "", **options: Any) -> httpx2.Client:
        """Return an HTTP client of it that shows a key."""
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx2.Client(
            base_url=self.url, headers=headers, trust_env=False, timeout=20.0, **options
        )

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(self._command, stderr=log, stdout=log)
        try:
            until(self._is_up, "the gateway answers", START_LIMIT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log
        found = _PORT.search(self.log)
        if found is None:
            return False
        self.port = int(found[1])
        with self.client() as client:
            return client.get("/livez").status_code == 200

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
