"""A Redis of our own where none is given: a child process, durable, private to the user.

The server outlives an owner that is killed, and with it the jobs: the next
:meth:`EmbeddedRedis.start` on the same data directory finds the server and becomes its owner.
Two servers never run on one directory, see server_directory.py.
"""

import logging
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.server_address import choose_address
from mixfleet_broker.server_binary import find_server
from mixfleet_broker.server_directory import FileLock, ServerDirectory, ServerState

logger = logging.getLogger(__name__)

START_S: Final = 15.0
"""Longest silence of a starting server; one that says it is loading its data is not silent."""
_STOP_S: Final = 15.0
_ANSWER_S: Final = 1.0
_POLL_S: Final = 0.02

Answer = Literal["ready", "loading", "none"]


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the embedded server of ``data_dir`` if one runs and answers."""
    state = ServerDirectory(data_dir).read_state()
    return state.url if state is not None and _ask(state) == "ready" else None


class EmbeddedRedis:
    """The Redis of one data directory: started here, or the one that runs already.

    Example::

        with EmbeddedRedis(data_dir) as server:
            redis = connect(server.url)
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        program: Path | None = None,
        start_timeout_s: float = START_S,
    ) -> None:
        """Nothing starts yet.

        Args:
            data_dir: The server's files are in its subdirectory ``redis``.
            program: Server to run; default: see :func:`find_server`.
            start_timeout_s: Longest silence of a starting server.
        """
        self._data_dir = data_dir
        self._directory = ServerDirectory(data_dir)
        self._program = program
        self._start_timeout_s = start_timeout_s
        self._owner_lock = FileLock(self._directory.owner_lock_file)
        self._process: subprocess.Popen[bytes] | None = None
        self._state: ServerState | None = None

    @property
    def url(self) -> str:
        """Where the server answers; may hold a password, see ``safe_redis_url``.

        Raises:
            BrokerUnavailableError: It was not started, or was stopped.
        """
        return self._running.url

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._running.pid

    @property
    def is_owned(self) -> bool:
        """Whether :meth:`stop` ends the server; False if another live process started it."""
        return self._owner_lock.held

    @property
    def is_alive(self) -> bool:
        """Whether the server answers now, be it only that it is loading its data."""
        return self._state is not None and _ask(self._state) != "none"

    @property
    def _running(self) -> ServerState:
        if self._state is None:
            raise BrokerUnavailableError(f"the embedded Redis of {self._data_dir} is not started")
        return self._state

    def start(self) -> Self:
        """Run the server, or find the one that runs, and return when it answers.

        Calling it again restarts a server that has died since and otherwise changes nothing.

        Raises:
            MissingExtraError: No server program is installed.
            BrokerUnavailableError: The server did not start in time; its last log lines are in
                the text.
        """
        self._directory.create()
        deadline = time.monotonic() + self._start_timeout_s
        while not self._owner_lock.try_acquire():
            if self._find():
                logger.info("embedded_redis_shared pid=%d", self.pid)
                return self
            self._wait(deadline, "another process is starting or stopping it and does not finish")
        try:
            self._start_as_owner(deadline)
        except BaseException:
            # A server of ours that hangs is still ours to stop.
            if self._process is None or self._process.poll() is not None:
                self._owner_lock.close()
            raise
        return self

    def stop(self) -> None:
        """End the server if it is ours, its data on disk; otherwise only forget it."""
        state, self._state = self._state, None
        if state is None or not self._owner_lock.held:
            return
        self._directory.remove_state()  # first, so that nobody finds a server that is ending
        try:
            if self._process is not None:
                _end_child(self._process)
            else:
                self._end_adopted(state)
        finally:
            self._process = None
            self._owner_lock.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start_as_owner(self, deadline: float) -> None:
        server_lock = FileLock(self._directory.server_lock_file)
        while not server_lock.try_acquire():
            if self._find():
                if self._process is None:
                    logger.info("embedded_redis_adopted pid=%d", self.pid)
                return
            self._wait(deadline, f"a server holds {self._directory.server_lock_file}; end it")
        if self._process is not None:
            _end_child(self._process)  # dead already, else it would hold the lock
        try:
            process, state = self._spawn(server_lock)
        finally:
            server_lock.close()
        try:
            self._await_answer(process, state)
        except BaseException:
            self._directory.remove_state()
            _end_child(process)
            raise
        self._process, self._state = process, state

    def _find(self) -> bool:
        state = self._directory.read_state()
        if state is None or _ask(state) != "ready":
            return False
        self._state = state
        return True

    def _spawn(self, server_lock: FileLock) -> tuple[subprocess.Popen[bytes], ServerState]:
        program = self._program or find_server()
        address = choose_address(self._directory)
        self._directory.write_config(port=address.port, password=address.password)
        log = self._directory.new_log()
        try:
            process = subprocess.Popen(
                # A locale that is not installed would keep the server from starting.
                ["env", "LC_ALL=C", program, self._directory.config_file],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory.path,
                pass_fds=(server_lock.fd,),
                # Out of the terminal's reach: on Ctrl-C the workers still need it to drain.
                start_new_session=True,
            )
        finally:
            os.close(log)
        state = ServerState(pid=process.pid, url=address.url)
        self._directory.write_state(state)
        logger.info("embedded_redis_started pid=%d url=%s", state.pid, safe_redis_url(state.url))
        return process, state

    def _await_answer(self, process: subprocess.Popen[bytes], state: ServerState) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while (answer := _ask(state)) != "ready":
            if answer == "loading":
                deadline = time.monotonic() + self._start_timeout_s
            if process.poll() is not None:
                raise self._failure(f"it ended with status {process.returncode}")
            self._wait(deadline, f"no answer for {self._start_timeout_s:g} s")

    def _wait(self, deadline: float, reason: str) -> None:
        if time.monotonic() > deadline:
            raise self._failure(reason)
        time.sleep(_POLL_S)

    def _failure(self, reason: str) -> BrokerUnavailableError:
        return BrokerUnavailableError(
            f"the embedded Redis of {self._data_dir} did not start: {reason}. "
            f"Its last log lines:\n{self._directory.last_log_lines()}"
        )

    def _end_adopted(self, state: ServerState) -> None:
        # Not our child, so its pid might be another process by now; it is asked, not signalled.
        with _client(state) as client, suppress(RedisError, OSError):
            client.shutdown()
        server_lock = FileLock(self._directory.server_lock_file)
        deadline = time.monotonic() + _STOP_S
        while not server_lock.try_acquire():
            if time.monotonic() > deadline:
                logger.warning("embedded_redis_left_running pid=%d: it ignored SHUTDOWN", state.pid)
                return
            time.sleep(_POLL_S)
        server_lock.close()


def _end_child(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        logger.warning("embedded_redis_killed pid=%d: it ignored SIGTERM", process.pid)
        process.kill()
        process.wait()


def _client(state: ServerState) -> Redis:
    return Redis.from_url(
        state.url,
        socket_timeout=_ANSWER_S,
        socket_connect_timeout=_ANSWER_S,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )


def _ask(state: ServerState) -> Answer:
    """Ask the server at ``state.url`` whether it is the one with that pid and ready."""
    with _client(state) as client:
        try:
            if client.info("server").get("process_id") != state.pid:
                return "none"
            client.ping()
        except BusyLoadingError:
            return "loading"
        except (RedisError, OSError):
            return "none"
    return "ready"
