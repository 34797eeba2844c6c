"""A real server on a unix socket: once per session, and empty for each test; or one to be broken.

A folder's conftest takes what it needs: ``from support.redis_server import redis as redis``, with
``redis_server`` and ``redis_url``, on which it depends.
"""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from mixfleet_broker.server_binary import find_server
from support.worker_process import until

START_LIMIT_S = 20.0
EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")
ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")
UNSYNCED = ("--appendonly", "yes", "--appendfsync", "no")
"""What it has confirmed is in its log, so that a server that is killed loses nothing. With everysec
it keeps writes back while the disk is busy."""


class RedisServer:
    """A server in a directory of its own, as a context manager.

    Args:
        options: Of the server; without any it keeps nothing.
    """

    def __init__(self, *options: str) -> None:
        # Not pytest's tmp_path: a socket's path may have about a hundred characters.
        self._directory = Path(tempfile.mkdtemp(prefix="mixfleet-"))
        self._socket = self._directory / "redis.sock"
        self._log = self._directory / "appendonlydir"
        self._kept = self._directory / "kept"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self._socket

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def client(self) -> Redis:
        return Redis.from_url(self.url)

    def kill(self) -> None:
        """End it as a crash does; its files stay."""
        self.process.kill()
        self.process.wait()

    def await_written(self) -> None:
        """Wait until all that it has confirmed so far is in its log."""
        with self.client() as client:
            # It keeps writes back while one waits for the disk, and writes before it replies else.
            until(
                lambda: not client.info("persistence")["aof_pending_bio_fsync"],
                "nothing waits for the disk",
            )

    def keep_log(self) -> None:
        """Remember the log as it is now."""
        shutil.copytree(self._log, self._kept)

    def lose_what_followed(self) -> None:
        """Let a killed server have the log that was kept."""
        shutil.rmtree(self._log)
        self._kept.rename(self._log)

    def lose_everything(self) -> None:
        """Forget what a killed server had on disk."""
        shutil.rmtree(self._log, ignore_errors=True)

    def pause(self) -> None:
        """Stop it where it is, as a machine that sleeps."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Start it, or start it again on what it had kept, at the same place."""
        command = [str(find_server()), "--port", "0", "--unixsocket", str(self._socket)]
        command += ["--dir", str(self._directory), "--save", "", "--appendonly", "no"]
        command += self._options
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory)

    def _wait_until_it_answers(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_LIMIT_S
        with self.client() as client:
            while not _answers(client):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"no server: exit status {process.poll()}")
                time.sleep(0.01)


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty server."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client of an empty server; its replies are bytes."""
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def no_redis() -> Iterator[Redis]:
    """A client of a server that is not there, and that does not try twice."""
    with Redis(unix_socket_path="/nowhere/redis.sock", retry=Retry(NoBackoff(), 0)) as client:
        yield client
