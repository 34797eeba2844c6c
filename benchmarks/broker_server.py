"""The Redis that is measured: started for it, on loopback, set as in production.

Its configuration is the one that `mixfleet up` writes: append-only file, flushed every second, and
no eviction. It listens on a port, as the Redis of a fleet of several machines does.
"""

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from redis import Redis
from redis.exceptions import RedisError

from mixfleet_broker.connection import connect
from mixfleet_broker.server_binary import find_server
from mixfleet_broker.server_directory import ServerDirectory

_LOOPBACK: Final = "127.0.0.1"
_START_S: Final = 20.0
_REWRITE_S: Final = 60.0


class BenchServer:
    """A server with a data folder of its own, as a context manager; both are gone afterwards.

    Args:
        folder: Where the data folder is made: on a disk, or the append-only file costs nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._path = Path()
        self.url = ""

    def __enter__(self) -> Self:
        self._parent.mkdir(parents=True, exist_ok=True)
        self._path = Path(tempfile.mkdtemp(prefix="redis-", dir=self._parent))
        directory, port = ServerDirectory(self._path), _free_port()
        password = secrets.token_urlsafe(24)
        directory.create()
        directory.write_config(port=port, password=password)
        self.url = f"redis://:{password}@{_LOOPBACK}:{port}/0"
        with directory.log_file.open("wb") as log:
            command = [str(find_server()), str(directory.config_file)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory.path)
        try:
            self._await_answer(self._process, directory)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._path)

    def client(self) -> Redis:
        """Return a client as workers and clients of the fleet use it."""
        return connect(self.url)

    def _await_answer(self, process: "subprocess.Popen[bytes]", directory: ServerDirectory) -> None:
        deadline = time.monotonic() + _START_S
        with Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                except RedisError as error:
                    if time.monotonic() > deadline or process.poll() is not None:
                        log = directory.last_log_lines()
                        raise RuntimeError(f"Redis does not start: {log}") from error
                    time.sleep(0.02)
                else:
                    return


def settle(redis: Redis) -> None:
    """Wait until the server does nothing beside its commands: it rewrites no append-only file."""
    deadline = time.monotonic() + _REWRITE_S
    while info(redis, "persistence")["aof_rewrite_in_progress"]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Redis has rewritten its append-only file for {_REWRITE_S:g} s")
        time.sleep(0.05)


def info(redis: Redis, section: str) -> dict[str, Any]:
    """Return one section of what the server says of itself."""
    found: Any = redis.info(section)
    return dict(found)


def cpu_s(redis: Redis) -> float:
    """Return the seconds of processor time that the server's main process has used."""
    found = info(redis, "cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


def script_us(redis: Redis) -> float:
    """Return the microseconds that the server has spent in scripts."""
    found = info(redis, "commandstats").get("cmdstat_evalsha")
    return float(found["usec"]) if found else 0.0


def server_version() -> str:
    """Return how the server program calls itself."""
    command = [str(find_server()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
