"""The files of an embedded server, ``<data_dir>/redis``: private, and locked by who uses them.

``server.conf``, ``server.log`` (and the previous one), ``state.json`` (pid and URL while the
server runs), the append-only files, and two locks that the operating system releases when their
holder dies, however it dies: ``owner.lock`` of the process that will stop the server, and
``server.lock``, inherited and held by the server itself.
"""

import fcntl
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

_LOG_LINES: Final = 12
_MAX_SOCKET_PATH_BYTES: Final = 103 if sys.platform == "darwin" else 107
"""What the operating system allows, less the final zero byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What ``state.json`` says of a running server."""

    pid: int
    url: str
    """Holds the password when the server listens on a port."""


class FileLock:
    """A lock on a file, held until it is released or its holder has died."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    @property
    def fd(self) -> int:
        """Open file of a held lock: a child that inherits it holds the lock too."""
        assert self._fd is not None, "the lock is not held"
        return self._fd

    def try_acquire(self) -> bool:
        """Take the lock if nobody holds it; True if this object holds it now."""
        if self._fd is not None:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def close(self) -> None:
        """Let go of it; a child that inherited it goes on holding it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ServerDirectory:
    """Where one embedded server lives."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir.absolute() / "redis"
        self.config_file = self.path / "server.conf"
        self.log_file = self.path / "server.log"
        self.owner_lock_file = self.path / "owner.lock"
        self.server_lock_file = self.path / "server.lock"
        self._state_file = self.path / "state.json"

    @property
    def socket(self) -> Path | None:
        """Where the server listens; None if the path is longer than a socket's may be."""
        path = self.path / "redis.sock"
        return path if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES else None

    def create(self) -> None:
        """Make the directory, or make it private if it exists."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)

    def read_state(self) -> ServerState | None:
        """Return what the last server left; None without one or if it is not legible."""
        try:
            content = json.loads(self._state_file.read_text(encoding="utf-8"))
            return ServerState(pid=int(content["pid"]), url=str(content["url"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write_state(self, state: ServerState) -> None:
        """Replace the state as a whole, so that a reader sees the old or the new one."""
        draft = self._state_file.with_suffix(".new")
        _write_private(draft, json.dumps(asdict(state)) + "\n")
        draft.replace(self._state_file)

    def remove_state(self) -> None:
        """Say that no server runs."""
        self._state_file.unlink(missing_ok=True)

    def write_config(self, *, port: int, password: str) -> None:
        """Write ``server.conf``; port 0 with an empty password means the socket alone.

        Every write reaches the operating system before its reply and the disk within a second.
        """
        lines = [
            f"dir {_quoted(str(self.path))}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            # Refuse a write rather than drop somebody's job.
            "maxmemory-policy noeviction",
            "daemonize no",
            'logfile ""',
            f"port {port}",
        ]
        if port:
            lines += ["bind 127.0.0.1", f"requirepass {_quoted(password)}"]
        else:
            lines += [f"unixsocket {_quoted(str(self.socket))}", "unixsocketperm 700"]
        _write_private(self.config_file, "\n".join(lines) + "\n")

    def new_log(self) -> int:
        """Start ``server.log`` anew, keep the last one as ``.1``, and return it open."""
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        return os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def last_log_lines(self) -> str:
        """Return the end of the log, for an error message."""
        try:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"no log: {error}"
        return "\n".join(lines[-_LOG_LINES:]) or f"{self.log_file} is empty"


def _write_private(file: Path, content: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
        opened.write(content)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
