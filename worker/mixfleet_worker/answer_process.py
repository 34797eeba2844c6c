"""The process beside a worker that answers inquiries, seen from the worker.

Tokenizing a megabyte holds the interpreter's lock for half a second, and any Python code beside
the steps slows them much more than by its share: each step takes the lock anew at each of its
operations. So the work is done elsewhere. The process starts with the first question, and again
with the next one after it has died.
"""

import logging
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Final

from mixfleet_broker.errors import EngineFailedError, MessageError
from mixfleet_broker.inquiry_codec import MAX_INQUIRY_BYTES, encode_refusal
from mixfleet_worker.answering import AnswerSetup
from mixfleet_worker.frames import receive_frame, send_frame
from mixfleet_worker.supervisor import described

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S: Final = 30.0
"""A process that is silent for so long is ended: nobody waits longer for an answer."""

END_S: Final = 1.0
"""How long one that has closed its connection may take to end."""


class AnswerProcess:
    """Asks the process and starts it where there is none. Used by one thread, closed by any.

    Args:
        setup: What it needs to know of the worker.
        limit_s: How long it may take for one answer.
    """

    def __init__(self, setup: AnswerSetup, *, limit_s: float = ANSWER_LIMIT_S) -> None:
        self._setup = setup
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return None if self._process is None else self._process.pid

    def answer(self, body: bytes) -> bytes:
        """Return the bytes of the answer: a refusal if the process dies of the question."""
        if len(body) > MAX_INQUIRY_BYTES:
            message = f"message: {len(body)} bytes, the limit is {MAX_INQUIRY_BYTES}"
            return encode_refusal(MessageError.code, message)
        try:
            connection = self._connection or self._start()
            send_frame(connection, body)
            return receive_frame(connection)
        except (EOFError, OSError) as error:
            return self._failed(error)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(self._limit_s)
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-m", "mixfleet_worker.answering", self._setup.to_json()]
            self._connection = ours
            self._process = subprocess.Popen(
                [*command, str(descriptor)], pass_fds=[descriptor], stdin=subprocess.DEVNULL
            )
        return ours

    def _failed(self, error: Exception) -> bytes:
        reason = self._reason(error)
        logger.error("answering process ended pid=%s: %s", self.pid, reason)
        self.close()
        message = f"the process that answers inquiries has failed: {reason}"
        return encode_refusal(EngineFailedError.code, message)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"it was silent for {self._limit_s:g} s"
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                return described(self._process.wait(timeout=END_S))
        return str(error)
