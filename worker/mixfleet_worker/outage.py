"""What the I/O thread knows of Redis's absences: when to try again, whom to spare afterwards."""

import logging
import random
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0


class Outage:
    """Used by one thread.

    Args:
        worker_id: For the logs.
        lease_s: How long a lease holds without renewal.
        clock: Monotonic seconds.
    """

    def __init__(self, *, worker_id: str, lease_s: float, clock: Callable[[], float]) -> None:
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._clock = clock
        self._backoff_s = 0.0
        self._retry_at = 0.0
        self._answered_at = clock()
        self._spares_until = clock()

    @property
    def pause_s(self) -> float:
        """How long Redis is to be left alone now; 0 or less: not at all."""
        return self._retry_at - self._clock()

    @property
    def may_reap(self) -> bool:
        """Whether a lease that has ended says that its worker is dead.

        Not so after an outage: Redis was away for the others too, and they are as alive as this
        worker. The first to come back would take the jobs of all others, and blame the jobs for it.
        """
        return self._clock() >= self._spares_until

    def begin_turn(self) -> None:
        """Notice that Redis has not answered for so long that leases may have ended for it."""
        now = self._clock()
        if now - self._answered_at > 2 * self._lease_s / 3:
            self._spares_until = now + self._lease_s

    def end_turn(self) -> None:
        """Redis has answered."""
        self._answered_at = self._clock()
        if self._backoff_s > 0.0:
            logger.info("broker is back worker_id=%s", self._worker_id)
            self._backoff_s = 0.0

    def fail(self, error: Exception) -> None:
        """Redis has not answered, or refused: leave it alone for a moment."""
        if self._backoff_s == 0.0:
            logger.warning("broker away, decoding goes on worker_id=%s: %s", self._worker_id, error)
        self._retry_at = self._clock() + self.next_backoff_s()

    def next_backoff_s(self) -> float:
        """Return how long to wait before the next try, longer each time."""
        self._backoff_s = min(LAST_BACKOFF_S, 2 * self._backoff_s or FIRST_BACKOFF_S)
        # Jitter: a fleet must not come back all at once.
        return self._backoff_s * random.uniform(0.5, 1.0)
