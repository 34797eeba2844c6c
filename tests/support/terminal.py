"""A command on a pseudo terminal, driven as a person would: wait for text, type, press Ctrl-C."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

CTRL_C = "\x03"
CTRL_D = "\x04"

# Makes the pseudo terminal the controlling one, so that Ctrl-C becomes a SIGINT.
_LAUNCHER = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """Runs ``command``; all that it writes is in ``output``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self.output = ""
        self._searched = 0

    def wait_for(self, text: str, timeout_s: float = 20.0) -> None:
        """Read until ``text`` comes after what the last call waited for."""
        deadline = time.monotonic() + timeout_s
        while (found := self.output.find(text, self._searched)) < 0:
            left_s = deadline - time.monotonic()
            if not self._read(left_s):
                raise AssertionError(f"no {text!r} in {self.output[self._searched :]!r}")
        self._searched = found + len(text)

    def press(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for_exit(self, timeout_s: float = 20.0) -> int:
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))

    def _read(self, timeout_s: float) -> bool:
        """Read what there is, waiting for it; False at the end or when nothing came in time."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, timeout_s))
        if not ready:
            return False
        try:
            data = os.read(self._master, 4096)
        except OSError:  # Linux's way to say that the other side has closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
