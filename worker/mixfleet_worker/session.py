"""What the I/O thread needs of the broker."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mixfleet_broker.channel import delivered_tokens
from mixfleet_broker.flush import Flush, FlushResult
from mixfleet_broker.orders import Order, order_of, wait_for_word
from mixfleet_broker.queue import ClaimedJob, JobQueue, Lease
from mixfleet_broker.registry import Registration
from mixfleet_worker.handoff import EndWrite, Write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the worker's public record says of this moment."""

    in_flight: int
    draining: bool
    paused: bool = False

    @property
    def state(self) -> Literal["idle", "busy", "paused", "draining"]:
        """The moment in one word."""
        if self.draining:
            return "draining"
        if self.paused:
            return "paused"
        return "busy" if self.in_flight else "idle"


class Session(Protocol):
    """One worker's connection to the broker. Not thread-safe: the I/O thread owns it.

    Every method may raise a ``BrokerError`` and may then be called again with the same arguments,
    whether or not the first call had its effect.
    """

    def claim(
        self, max_jobs: int, claim_token: str, *, idle: bool, reaps: bool = True
    ) -> list[ClaimedJob]:
        """Lease up to ``max_jobs`` jobs; the same token gives the same jobs again.

        Only an idle worker may get a job that is to be run alone, and only one that ``reaps`` a job
        whose lease has ended.
        """
        ...

    def delivered_tokens(self, job_id: str) -> tuple[int, ...]:
        """Return the tokens of the answer that are on the job's channel.

        Raises:
            MessageError: Something on the channel is not of the schema.
        """
        ...

    def flush(self, writes: Sequence[Write]) -> FlushResult:
        """Send the writes, at most one of each job, in one round trip; fetch words along."""
        ...

    def renew(self, leases: Sequence[Lease]) -> set[str]:
        """Prolong the leases; return the ids of the jobs that are not ours any more."""
        ...

    def release(self, leases: Sequence[Lease]) -> int:
        """Give the jobs back to the queue without blame; return how many were still ours."""
        ...

    def isolate(self, leases: Sequence[Lease]) -> int:
        """Give the jobs back to be run alone, without blame; return how many were still ours."""
        ...

    def reap(self) -> None:
        """Put the jobs of ended leases, anybody's, back into the queue."""
        ...

    def beat(self, activity: Activity) -> Order | None:
        """Say that this worker lives; return what it is told to do."""
        ...

    def order(self) -> Order | None:
        """Return what this worker is told to do."""
        ...

    def sign_off(self) -> None:
        """Say that this worker is gone."""
        ...

    def wait_for_jobs(self, timeout_s: float) -> str | None:
        """Wait for the bell (an empty text) or a word; None when neither came."""
        ...

    def wait_for_word(self, timeout_s: float) -> str | None:
        """Wait for a word; None when none came."""
        ...


class QueueSession:
    """Implements :class:`Session` with the queue of one model.

    Args:
        queue: Its client must be patient for less than a lease, or the worker could not give up
            its jobs in time.
        registration: The worker's public record.
    """

    def __init__(self, *, queue: JobQueue, registration: Registration) -> None:
        self._queue = queue
        self._registration = registration
        self._worker_id = registration.record.worker_id

    def claim(
        self, max_jobs: int, claim_token: str, *, idle: bool, reaps: bool = True
    ) -> list[ClaimedJob]:
        """See :meth:`Session.claim`."""
        return self._queue.claim(self._worker_id, max_jobs, claim_token, idle=idle, reaps=reaps)

    def delivered_tokens(self, job_id: str) -> tuple[int, ...]:
        """See :meth:`Session.delivered_tokens`."""
        return delivered_tokens(self._queue.redis, job_id, prefix=self._queue.prefix)

    def flush(self, writes: Sequence[Write]) -> FlushResult:
        """See :meth:`Session.flush`."""
        flush = Flush(self._queue, self._worker_id)
        for write in writes:
            if isinstance(write, EndWrite):
                flush.finish(write.lease, write.end, write.chunk)
            else:
                flush.append(write.lease, write.chunk)
        return flush.send()

    def renew(self, leases: Sequence[Lease]) -> set[str]:
        """See :meth:`Session.renew`."""
        return self._queue.renew(self._worker_id, leases)

    def release(self, leases: Sequence[Lease]) -> int:
        """See :meth:`Session.release`."""
        return self._queue.release(leases)

    def isolate(self, leases: Sequence[Lease]) -> int:
        """See :meth:`Session.isolate`."""
        return self._queue.isolate(leases)

    def reap(self) -> None:
        """See :meth:`Session.reap`."""
        reaped = self._queue.reap()
        if reaped.requeued or reaped.failed:
            logger.warning(
                "reaped requeued=%s failed=%s worker_id=%s",
                ",".join(reaped.requeued) or "-",
                ",".join(reaped.failed) or "-",
                self._worker_id,
            )

    def beat(self, activity: Activity) -> Order | None:
        """See :meth:`Session.beat`."""
        return self._registration.beat(state=activity.state, in_flight=activity.in_flight)

    def order(self) -> Order | None:
        """See :meth:`Session.order`."""
        return order_of(self._queue.redis, self._worker_id, prefix=self._queue.prefix)

    def sign_off(self) -> None:
        """See :meth:`Session.sign_off`."""
        self._registration.deregister()

    def wait_for_jobs(self, timeout_s: float) -> str | None:
        """See :meth:`Session.wait_for_jobs`."""
        return self._queue.wait_for_jobs_or_word(self._worker_id, timeout_s)

    def wait_for_word(self, timeout_s: float) -> str | None:
        """See :meth:`Session.wait_for_word`."""
        queue = self._queue
        return wait_for_word(queue.redis, self._worker_id, timeout_s, prefix=queue.prefix)
