"""The worker's loop: take, cancel, submit, step, publish.

It owns the engine and runs on the main thread. It never touches Redis and waits for nothing
while the engine has work.
"""

import logging
import time
from collections.abc import Callable, Sequence

from mixfleet_broker.errors import EngineFailedError, MessageError
from mixfleet_broker.queue import Lease
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.errors import RequestRejectedError
from mixfleet_engine.request import StepOutput
from mixfleet_worker.handoff import (
    Close,
    DrainOrdered,
    EndWrite,
    IOFailed,
    IsolateJob,
    LostJob,
    Mailboxes,
    ReleaseJob,
    StepReport,
    StopClaiming,
    TakenJob,
    Wake,
    Write,
    receive,
)
from mixfleet_worker.intake import CompleteJob, Intake
from mixfleet_worker.publisher import Publisher, completion, rejection

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
"""How long an idle loop waits before it reports again that it lives."""
ENGINE_FAILED = EngineFailedError.code
TOKENS_PER_JOB = 256
"""KV tokens that must be free for each further job: what a short chat needs to begin."""


class EngineBrokenError(Exception):
    """The engine raised twice with no good step in between; only a new process can help."""


class WorkerLoop:
    """Runs jobs on one engine until it is told to stop.

    Args:
        intake: Makes requests of claimed jobs.
        engine: Owned by the thread that calls :meth:`run`.
        publisher: Makes text of tokens.
        mailboxes: The two queues to and from the I/O thread.
        worker_id: For the logs.
        drain_s: Longest time that jobs in flight get to finish after the first :meth:`stop`.
        clock: Monotonic seconds.
        abandoned: Whether the process that this worker belongs to is gone.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        engine: GenerationEngine,
        publisher: Publisher,
        mailboxes: Mailboxes,
        worker_id: str,
        drain_s: float,
        clock: Callable[[], float] = time.monotonic,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self._intake = intake
        self._engine = engine
        self._publisher = publisher
        self._to_loop = mailboxes.to_loop
        self._to_io = mailboxes.to_io
        self._worker_id = worker_id
        self._drain_s = drain_s
        self._clock = clock
        self._abandoned = abandoned
        self._num_taken = 0
        self._num_stops = 0
        self._drain_until: float | None = None
        self._engine_failed = False

    def stop(self) -> None:
        """Ask for a drain; asked twice, leave at once. Safe in a signal handler."""
        self._num_stops += 1
        self._to_loop.put(Wake())

    def run(self) -> None:
        """Serve until stopped and drained. What is still in flight then goes back to the queue.

        Raises:
            EngineBrokenError: The engine failed again right after it had failed.
        """
        try:
            self.tick(0.0)  # tells the I/O thread how much room there is
            while not self._is_over():
                self.tick(IDLE_WAIT_S)
        finally:
            self._to_io.put(Close())

    def tick(self, wait_s: float) -> None:
        """Do one turn of the five steps; when there is no work, wait for some first."""
        taken, lost = self._take(0.0 if self._engine.has_work else wait_s)
        self._cancel(lost)
        writes = self._submit(taken)
        outputs, failed = self._step()
        self._publish([*writes, *failed], outputs)

    def _take(self, wait_s: float) -> tuple[list[TakenJob], list[Lease]]:
        """Return the jobs that came and the leases that went."""
        taken: dict[str, TakenJob] = {}
        lost: list[Lease] = []
        for item in receive(self._to_loop, wait_s):
            if isinstance(item, TakenJob):
                self._num_taken += 1
                taken[item.claimed.lease.job_id] = item
            elif isinstance(item, LostJob):
                lost.append(item.lease)
                same = taken.get(item.lease.job_id)
                if same is not None and same.claimed.lease == item.lease:
                    del taken[item.lease.job_id]
            elif isinstance(item, DrainOrdered):
                self._num_stops = max(1, self._num_stops)
            elif isinstance(item, IOFailed):
                raise item.error
        return list(taken.values()), lost

    def _cancel(self, lost: Sequence[Lease]) -> None:
        for lease in lost:
            # A later run of the same job may be in flight here already: only the lease counts.
            if self._publisher.lease_of(lease.job_id) == lease:
                self._publisher.drop(lease.job_id)
                self._engine.abort(lease.job_id)

    def _submit(self, taken: Sequence[TakenJob]) -> list[Write]:
        """Give the jobs to the engine; return the ends of those that it does not get."""
        if self._drain_until is not None:
            for job in taken:
                self._to_io.put(ReleaseJob(lease=job.claimed.lease))
            return []
        ends = [self._admit(job) for job in taken]
        return [end for end in ends if end is not None]

    def _admit(self, taken: TakenJob) -> EndWrite | None:
        lease = taken.claimed.lease
        try:
            job = self._intake.admit(taken)
            if isinstance(job, CompleteJob):
                return completion(job, self._clock())
            self._engine.submit(job.request)
        except (MessageError, RequestRejectedError) as error:
            logger.info(
                "job rejected job_id=%s code=%s worker_id=%s",
                lease.job_id,
                error.code,
                self._worker_id,
            )
            return rejection(taken, error.code, str(error), self._clock())
        except Exception as error:  # a loop top: one job's surprise must not end its neighbours
            logger.exception("intake failed job_id=%s worker_id=%s", lease.job_id, self._worker_id)
            return rejection(taken, ENGINE_FAILED, _described(error), self._clock())
        self._publisher.open(job)
        return None

    def _step(self) -> tuple[list[StepOutput], list[EndWrite]]:
        """Return the new tokens, or the end of the one job in flight if the engine raised on it."""
        if not self._engine.has_work:
            return [], []
        try:
            outputs = self._engine.step()
        except Exception as error:  # a loop top: the job fails, the worker goes on
            return [], self._survive(error)
        self._engine_failed = False
        return outputs, []

    def _survive(self, error: Exception) -> list[EndWrite]:
        """Return the end of the job that the engine failed on; of several nobody knows which.

        So these go back to be run alone, one by one. The same holds for a job on which an engine
        fails that has just failed: it may be broken for good.
        """
        job_ids = [lease.job_id for lease in self._publisher.leases]
        logger.error(
            "engine failed job_ids=%s worker_id=%s",
            ",".join(job_ids),
            self._worker_id,
            exc_info=error,
        )
        ends = []
        if len(job_ids) == 1 and not self._engine_failed:
            ends = self._publisher.fail_all(ENGINE_FAILED, _described(error), self._clock())
        for lease in self._publisher.leases:
            self._to_io.put(IsolateJob(lease=lease))
        for job_id in job_ids:
            self._publisher.drop(job_id)
            self._engine.abort(job_id)
        if self._engine_failed:
            raise EngineBrokenError(f"the engine failed twice in a row: {error}") from error
        self._engine_failed = True
        return ends

    def _publish(self, ends: Sequence[Write], outputs: Sequence[StepOutput]) -> None:
        """Hand everything to the I/O thread; this is also the sign that the loop lives."""
        published = self._publisher.publish(outputs, self._clock())
        for request_id in published.stopped:
            self._engine.abort(request_id)
        report = StepReport(
            writes=(*ends, *published.writes),
            free_slots=self._room(),
            num_taken=self._num_taken,
        )
        self._to_io.put(report)

    def _room(self) -> int:
        """Return how many more jobs fit, by slots and by KV tokens."""
        if not self._engine.has_work:
            return self._engine.free_slots
        tokens_per_job = min(TOKENS_PER_JOB, self._engine.context_length)
        return min(self._engine.free_slots, self._engine.free_tokens // tokens_per_job)

    def _is_over(self) -> bool:
        """Begin or end the drain when it is time; whether the loop is to be left."""
        if self._num_stops == 0 and self._abandoned():
            logger.warning("parent is gone, draining worker_id=%s", self._worker_id)
            self._num_stops = 1
        if self._num_stops == 0:
            return False
        now = self._clock()
        if self._drain_until is None:
            self._drain_until = now + self._drain_s
            self._to_io.put(StopClaiming())
            logger.info(
                "draining jobs=%d drain_s=%g worker_id=%s",
                self._publisher.num_open,
                self._drain_s,
                self._worker_id,
            )
        at_once = self._num_stops > 1
        return at_once or self._publisher.num_open == 0 or now >= self._drain_until


def _described(error: Exception) -> str:
    """Return one line for the reader; the traceback is in the worker's log."""
    return f"{type(error).__name__}: {error}"
