"""The jobs that are leased to this worker: their leases, and the writes that they wait for.

Used by the I/O thread alone. Every method that talks to the broker may raise a ``BrokerError``
and may then simply be called again.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

from mixfleet_broker.flush import FlushResult
from mixfleet_broker.queue import Lease
from mixfleet_broker.write_outcome import Behind, WriteOutcome
from mixfleet_worker.handoff import EndWrite, LostJob, ToLoop, Write
from mixfleet_worker.held import HeldJob, waited_s
from mixfleet_worker.session import Session

logger = logging.getLogger(__name__)


class Holdings:
    """All held jobs by id.

    Args:
        session: The broker.
        to_loop: Where lost leases are told.
        worker_id: For the logs.
        lease_s: How long a lease holds; what was written is known for as long. A Redis that lost
            more has lost the renewals too, so the jobs are not ours any more.
        clock: Monotonic seconds.
        on_end: Told of each end that this worker has written.
    """

    def __init__(
        self,
        *,
        session: Session,
        to_loop: SimpleQueue[ToLoop],
        worker_id: str,
        lease_s: float,
        clock: Callable[[], float],
        on_end: Callable[[EndWrite], None] | None = None,
    ) -> None:
        self._session = session
        self._to_loop = to_loop
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._clock = clock
        self._on_end = on_end
        self._jobs: dict[str, HeldJob] = {}
        self._to_release: list[Lease] = []
        self._to_isolate: list[Lease] = []

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def has_writes(self) -> bool:
        """Whether anything is still to be written."""
        return any(job.has_writes for job in self._jobs.values())

    @property
    def has_lone_job(self) -> bool:
        """Whether a job is held beside which nothing else may run."""
        return any(job.alone for job in self._jobs.values())

    def hold(self, lease: Lease, *, alone: bool = False) -> None:
        """Take a lease that was just claimed."""
        older = self._jobs.get(lease.job_id)
        if older is not None:
            # Reaped without our notice, and claimed by us again.
            self._lose([older.lease])
        self._jobs[lease.job_id] = HeldJob(
            lease=lease,
            renewed_at=self._clock(),
            alone=alone,
            queue_s=waited_s(lease.job_id, time.time()),
        )

    def holds(self, lease: Lease) -> bool:
        """Whether this very lease is held."""
        job = self._jobs.get(lease.job_id)
        return job is not None and job.lease == lease

    def renewed_at(self, lease: Lease) -> float:
        """Return when a held lease was last known to be ours."""
        return self._jobs[lease.job_id].renewed_at

    def add(self, write: Write) -> None:
        """Take a write of the loop; one under a lease that is gone is dropped."""
        if self.holds(write.lease):
            self._jobs[write.lease.job_id].add(write)

    def let_go(self, leases: Iterable[Lease]) -> None:
        """Give jobs back to the queue at the next :meth:`release`."""
        for lease in leases:
            if self.holds(lease):
                del self._jobs[lease.job_id]
            self._to_release.append(lease)

    def isolate(self, lease: Lease) -> None:
        """Give a job back to be run alone at the next :meth:`release`."""
        if self.holds(lease):
            del self._jobs[lease.job_id]
        self._to_isolate.append(lease)

    def revoke(self, job_id: str, token: str) -> None:
        """Stop a job that somebody has ended, if this very run of it is held."""
        job = self._jobs.get(job_id)
        # A complete answer learns its fate by its own write.
        if job is not None and job.lease.token == token and not job.has_end:
            self._lose([job.lease])

    def let_go_all(self) -> None:
        """Give all jobs back to the queue at the next :meth:`release`."""
        self.let_go([job.lease for job in self._jobs.values()])

    def release(self) -> int:
        """Give back what was let go; return how many jobs that were still ours."""
        released = isolated = 0
        if self._to_release:
            released = self._session.release(self._to_release)
            logger.info("released jobs=%d worker_id=%s", released, self._worker_id)
            self._to_release = []
        if self._to_isolate:
            isolated = self._session.isolate(self._to_isolate)
            logger.info("isolated jobs=%d worker_id=%s", isolated, self._worker_id)
            self._to_isolate = []
        return released + isolated

    def renew_all(self) -> None:
        """Prolong all leases."""
        self._renew([job.lease for job in self._jobs.values()])

    def give_up_older_than(self, limit: float) -> None:
        """Stop the jobs whose lease was last renewed before ``limit``.

        An answer that is complete may wait on: it grows no more. The others go back without
        blame, should nobody have reaped them by the time the broker is there again.
        """
        old = [j.lease for j in self._jobs.values() if j.renewed_at < limit and not j.has_end]
        self._lose(old)
        self._to_release += old

    def write(self, *, ask: bool) -> FlushResult | None:
        """Send one write of each job, all in one round trip.

        Args:
            ask: Make the round trip even with nothing to write.

        Returns:
            What Redis answered; None if there was no round trip.
        """
        sent = [(job, write) for job in self._jobs.values() if (write := job.next_write())]
        if not (sent or ask):
            return None
        flushed = self._session.flush([write for _, write in sent])
        for (job, write), outcome in zip(sent, flushed.outcomes, strict=True):
            if isinstance(outcome, Behind):
                self._catch_up(job, outcome.num_tokens)
            elif isinstance(write, EndWrite):
                del self._jobs[job.lease.job_id]
                self._log_end(write, job.queue_s, done=outcome is WriteOutcome.DONE)
            elif outcome is WriteOutcome.DONE:
                job.settle(self._clock(), self._lease_s)
            else:
                self._lose([job.lease])
        return flushed

    def _catch_up(self, job: HeldJob, num_tokens: int) -> None:
        """Send again what Redis has lost of an answer; where it is not known let the job go.

        Its next run goes on after what the channel has.
        """
        logger.warning(
            "redis has lost tokens job_id=%s run=%d num_tokens=%d worker_id=%s",
            job.lease.job_id,
            job.lease.run,
            num_tokens,
            self._worker_id,
        )
        if not job.send_again_after(num_tokens):
            self._lose([job.lease])
            self._to_release.append(job.lease)

    def _renew(self, leases: Sequence[Lease]) -> None:
        if not leases:
            return
        now = self._clock()
        lost = self._session.renew(leases)
        self._lose(lease for lease in leases if lease.job_id in lost)
        for lease in leases:
            if lease.job_id not in lost:
                self._jobs[lease.job_id].renewed_at = now

    def _lose(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            del self._jobs[lease.job_id]
            logger.info(
                "lease gone job_id=%s run=%d worker_id=%s",
                lease.job_id,
                lease.run,
                self._worker_id,
            )
            self._to_loop.put(LostJob(lease=lease))

    def _log_end(self, write: EndWrite, queue_s: float | None, *, done: bool) -> None:
        end, times = write.end, write.times
        if not done:  # whoever has ended or taken it has said so
            logger.info(
                "end refused job_id=%s run=%d: the job is not this run's any more worker_id=%s",
                write.lease.job_id,
                write.lease.run,
                self._worker_id,
            )
            return
        if self._on_end is not None:
            self._on_end(write)
        first = times.first_token_at
        logger.info(
            "job ended job_id=%s state=%s reason=%s tokens=%d queue_s=%s ttft_s=%s total_s=%.3f "
            "worker_id=%s",
            write.lease.job_id,
            end.state,
            end.finish_reason or end.code,
            end.usage.completion_tokens if end.usage else 0,
            _seconds(queue_s),
            _seconds(None if first is None else first - times.claimed_at),
            times.ended_at - times.claimed_at,
            self._worker_id,
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
