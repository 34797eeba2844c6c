"""Says that this process still reads the jobs that are to end with their reader.

One thread for all of them, started with the first. A process that dies says nothing any more, and
the fleet cancels what nobody will read.
"""

import logging
import threading

from mixfleet.transport import Transport
from mixfleet_broker.errors import BrokerError
from mixfleet_broker.terms import READER_S

logger = logging.getLogger(__name__)

PERIOD_S = READER_S / 3


class Attendance:
    """The jobs that are read here and are to end with that; safe to share between threads.

    Args:
        transport: The fleet.
        period_s: How often it is told.
    """

    def __init__(self, transport: Transport, *, period_s: float = PERIOD_S) -> None:
        self._transport = transport
        self._period_s = period_s
        self._lock = threading.Lock()
        self._job_ids: set[str] = set()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, job_id: str) -> None:
        """Attend a job from now on; the submit itself has said so for the first time."""
        with self._lock:
            self._job_ids.add(job_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="attendance", daemon=True)
                self._thread.start()

    def leave(self, job_id: str) -> None:
        """Attend a job no longer; harmless where it was not."""
        with self._lock:
            self._job_ids.discard(job_id)

    def close(self) -> None:
        """Attend nothing any more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            with self._lock:
                job_ids = tuple(self._job_ids)
            try:
                if job_ids:
                    self._transport.attend(job_ids)
            except BrokerError as error:
                # The next turn tries again; a job that is missed once is not cancelled yet.
                logger.warning("attendance not said jobs=%d: %s", len(job_ids), error)
