"""The thread that takes inquiries from Redis and has them answered, one at a time.

It takes no slot, knows nothing of the engine, and touches only bytes: what they say is for
:mod:`mixfleet_worker.answering`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from mixfleet_broker.errors import BrokerError, MessageError
from mixfleet_broker.inquiries import AskedInquiry
from mixfleet_worker.answer_process import AnswerProcess
from mixfleet_worker.answering import AnswerSetup
from mixfleet_worker.outage import Outage

logger = logging.getLogger(__name__)

WAIT_S: Final = 0.5
"""Longest wait for a question: how late the thread sees that it is over."""
PAUSE_S: Final = 0.002
"""After each answer: what this thread may take of the interpreter from the steps is bounded."""


class Box(Protocol):
    """Where the questions are, see :class:`mixfleet_broker.inquiries.InquiryBox`."""

    def wait(self, timeout_s: float) -> AskedInquiry | None:
        """Return the next question; None when none came in time."""
        ...

    def give(self, inquiry_id: str, answer: bytes) -> None:
        """Send the bytes of an answer to whoever asked."""
        ...


class InquiryDesk:
    """What the thread does.

    Args:
        box: Used by this thread only.
        answer: Makes the bytes of an answer of those of a question; never raises.
        worker_id: For the logs.
        lease_s: How long a lease holds without renewal.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        box: Box,
        answer: Callable[[bytes], bytes],
        worker_id: str,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._box = box
        self._answer = answer
        self._worker_id = worker_id
        self._outage = Outage(worker_id=worker_id, lease_s=lease_s, clock=clock)
        self._stop = threading.Event()

    def run(self) -> None:
        """Work until :meth:`stop`; while Redis is away, look again and again."""
        while not self._stop.is_set():
            self.turn()
            if (pause_s := self._outage.pause_s) > 0:
                self._stop.wait(pause_s)

    def stop(self) -> None:
        """End :meth:`run` within ``WAIT_S``, or with the answer that is in the making."""
        self._stop.set()

    def turn(self) -> None:
        """Answer the next question, if one comes soon."""
        try:
            inquiry = self._box.wait(WAIT_S)
            if inquiry is not None:
                self._box.give(inquiry.inquiry_id, self._answer(inquiry.body))
                self._stop.wait(PAUSE_S)
            self._outage.end_turn()
        except MessageError as error:  # what was there is gone, and named nobody to tell
            logger.warning("inquiry dropped worker_id=%s: %s", self._worker_id, error)
        except BrokerError as error:  # an answer that is lost is asked for again
            self._outage.fail(error)


@contextmanager
def answered_inquiries(
    box: Box, setup: AnswerSetup, *, worker_id: str, lease_s: float
) -> Iterator[None]:
    """Answer inquiries in a thread as long as the block lasts."""
    process = AnswerProcess(setup)
    desk = InquiryDesk(box=box, answer=process.answer, worker_id=worker_id, lease_s=lease_s)
    # A daemon, so that a Redis that swallows its last answer cannot keep the process alive.
    thread = threading.Thread(target=desk.run, name="inquiries", daemon=True)
    thread.start()
    try:
        yield
    finally:
        desk.stop()
        thread.join(timeout=2 * WAIT_S)
        process.close()
