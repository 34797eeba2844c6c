"""Reads the events of one job, from any point, and knows when to stop waiting.

The reader blocks in Redis (``XREAD BLOCK``) and never polls. Three things end a wait early: a
deadline of the caller, an outage of Redis that lasts too long, and a job that is gone.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mixfleet.transport import Transport
from mixfleet_broker.channel import FIRST
from mixfleet_broker.errors import BrokerUnavailableError, StreamTimeoutError, UnknownJobError
from mixfleet_broker.messages import (
    TERMINAL_STATES,
    JobEnd,
    JobEvent,
    TokenChunk,
)

logger = logging.getLogger(__name__)

RECONNECT_DELAY_S = 0.25
DEADLINE_GRACE_S = 1.0
"""How long the fleet has to end a job by itself once its deadline is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a reader waits, in seconds; None is for ever."""

    first_token_s: float | None = None
    """From the submit (or from attaching) to the first token."""
    total_s: float | None = None
    """From the submit (or from attaching) to the end of the answer."""
    silence_s: float = 30.0
    """Two leases: after so long without any event, the job and its workers are looked at."""
    outage_s: float = 30.0
    """An outage of Redis shorter than this is waited out."""
    deadlines_s: tuple[float, ...] = ()
    """When the job's own deadlines are over, from the submit. Workers end such a job; where none is
    there, its reader does."""


class EventReader:
    """The events of one job in order; one thread owns it."""

    def __init__(
        self,
        transport: Transport,
        job_id: str,
        *,
        model: str,
        after: str | None = None,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        started_at: float | None = None,
    ) -> None:
        self._transport = transport
        self._job_id = job_id
        self._model = model
        self._patience = patience
        self._clock = clock
        self._sleep = sleep
        self._fetched: deque[tuple[str, JobEvent]] = deque()
        self._fetched_id = after or "0-0"
        self._has_token = False
        self._has_warned = False
        self._looks_at_once = after is not None
        self._outage_since: float | None = None
        self.last_event_id = after
        """Id of the last event handed out: where another reader would go on."""
        self._last_event_at = clock()
        self.started_at = self._last_event_at if started_at is None else started_at
        """When the job was submitted (or attached to), by ``clock``."""
        self._overdue_at = sorted(
            self.started_at + within_s + DEADLINE_GRACE_S for within_s in patience.deadlines_s
        )

    def next_event(self, timeout_s: float | None = None) -> JobEvent | None:
        """Wait for the next event; None when ``timeout_s`` passes without one.

        Raises:
            StreamTimeoutError: A deadline of :class:`Patience` passed; the job goes on.
            BrokerUnavailableError: Redis was away for longer than the patience.
            UnknownJobError: The job, or what it had to say, is no longer kept.
        """
        give_up_at = None if timeout_s is None else self._clock() + timeout_s
        while not self._fetched:
            now = self._clock()
            if give_up_at is not None and now >= give_up_at:
                return None
            self._fetch(self._block_s(now, give_up_at))
        self.last_event_id, event = self._fetched.popleft()
        self._has_token = self._has_token or isinstance(event, TokenChunk)
        return event

    def _block_s(self, now: float, give_up_at: float | None) -> float:
        """Return how long to wait for events: up to the nearest deadline."""
        block_s = self._patience.silence_s
        if give_up_at is not None:
            block_s = min(block_s, give_up_at - now)
        limits = [("end of the answer", self._patience.total_s)]
        if not self._has_token:
            limits.append(("first token", self._patience.first_token_s))
        for what, limit_s in limits:
            if limit_s is None:
                continue
            left_s = self.started_at + limit_s - now
            if left_s <= 0:
                raise StreamTimeoutError(job_id=self._job_id, what=what, limit_s=limit_s)
            block_s = min(block_s, left_s)
        if self._overdue_at:
            block_s = min(block_s, max(0.0, self._overdue_at[0] - now))
        return block_s

    def _fetch(self, block_s: float) -> None:
        """Wait up to ``block_s`` for events and keep them; look around after a long silence."""
        # After an outage Redis may have lost the job: then a wait would be for nothing.
        was_away = self._outage_since is not None
        at_once = was_away or self._looks_at_once
        try:
            events = self._transport.read(
                self._job_id, self._fetched_id, 0.0 if at_once else block_s
            )
            is_silent = self._clock() - self._last_event_at >= self._patience.silence_s
            if not events and (is_silent or at_once):
                events = self._look_around()
            self._looks_at_once = False
            if not events and self._overdue_at and self._clock() >= self._overdue_at[0]:
                self._transport.expire(self._job_id, self._model)
                del self._overdue_at[0]
        except BrokerUnavailableError as error:
            self._bear_outage(error)
            return
        self._outage_since = None
        if events:
            self._fetched.extend(events)
            self._fetched_id = events[-1][0]
            self._last_event_at = self._clock()

    def _look_around(self) -> list[tuple[str, JobEvent]]:
        """Find out why nothing comes: the job is gone, has ended, or waits for a worker."""
        self._last_event_at = self._clock()
        state = self._transport.status(self._job_id, self._model).state
        if state in TERMINAL_STATES:
            # The end event and the state are written together, so it must be there by now.
            events = self._transport.read(self._job_id, self._fetched_id, 0.0)
            return events or self._end_again()
        if not self._has_warned and not self._transport.num_workers(self._model):
            self._has_warned = True
            logger.warning(
                "no worker job_id=%s model=%s state=%s", self._job_id, self._model, state
            )
        return []

    def _end_again(self) -> list[tuple[str, JobEvent]]:
        """Return the end, where that was the last event that was read before.

        Who comes back and asks for what follows the end has seen it, and hears it once more.

        Raises:
            UnknownJobError: There is none: what the job had to say is no longer kept.
        """
        last: tuple[str, JobEvent] | None = None
        while events := self._transport.read(self._job_id, last[0] if last else FIRST, 0.0):
            last = events[-1]
        if last is None or last[0] != self._fetched_id or not isinstance(last[1], JobEnd):
            raise UnknownJobError(job_id=self._job_id)
        return [last]

    def _bear_outage(self, error: BrokerUnavailableError) -> None:
        """Sleep a little before the next try; raise ``error`` once it has lasted too long."""
        now = self._clock()
        if self._outage_since is None:
            self._outage_since = now
            logger.warning("redis is away job_id=%s", self._job_id)
        if now - self._outage_since >= self._patience.outage_s:
            raise error
        self._sleep(RECONNECT_DELAY_S)
