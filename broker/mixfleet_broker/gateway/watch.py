"""What the gateway notes of each job that it serves: times for metrics, one line in the log."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
    Requeued,
    RunStarted,
    TokenChunk,
)

logger = logging.getLogger("mixfleet_broker.gateway.jobs")

REFUSED: Final = "refused"


@dataclass(slots=True)
class WatchedJob:
    """One job in flight. Times are seconds of the gateway's monotonic clock."""

    job_id: str
    model: str
    key_id: str
    """Of the API key, or the tenant where there is none."""
    submitted_at: float
    traceparent: str | None = None
    started_at: float | None = None
    """When its first run began."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    worker_id: str = ""
    num_prompt_tokens: int | None = None
    num_tokens: int = 0
    num_runs: int = 0
    ended_at: float | None = None
    end: JobEnd | None = None
    waits: bool = True


class JobObserver:
    """Is told of jobs as they go; each method may be overridden."""

    def submitting(self, job: WatchedJob) -> None:
        """Say that a job is about to be queued; called in its request's context."""

    def started(self, job: WatchedJob) -> None:
        """Say that a run of the job began; ``job.num_runs`` counts them."""

    def tokens(self, job: WatchedJob, num_new: int, since_s: float | None) -> None:
        """Say that tokens came, ``since_s`` after the ones before; None for the first."""

    def ended(self, job: WatchedJob) -> None:
        """Say that it ended, as ``job.end`` says."""

    def refused(self, model: str, code: str) -> None:
        """Say that a job was not taken."""

    def dropped(self, job: WatchedJob, reason: str) -> None:
        """Say that no more is heard of a job: it was refused, or its reader went away."""


class JobWatch:
    """The jobs that this gateway serves now.

    Args:
        observers: Told of everything; more may be added to :attr:`observers`.
        clock: Monotonic seconds.
    """

    def __init__(
        self, observers: Iterable[JobObserver] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.observers = list(observers)
        self._clock = clock
        self._jobs: dict[str, WatchedJob] = {}
        self._num_waiting = 0

    @property
    def num_jobs(self) -> int:
        """Jobs that are watched now."""
        return len(self._jobs)

    def num_waiting(self) -> int:
        """Return how many of them have not started."""
        return self._num_waiting

    def submitting(self, job: ChatJob, key_id: str) -> bool:
        """Begin to watch a job; False when an earlier request under its id is watched already."""
        if job.job_id in self._jobs:
            return False
        watched = self._jobs[job.job_id] = WatchedJob(
            job_id=job.job_id,
            model=job.model,
            key_id=key_id,
            submitted_at=self._clock(),
            traceparent=job.traceparent,
        )
        self._num_waiting += 1
        for observer in self.observers:
            observer.submitting(watched)
        return True

    def refused(self, job: ChatJob, error: MixfleetError) -> None:
        """Forget a job that was not taken, or whose request was not."""
        watched = self._forget(job.job_id)
        if watched is None:
            return
        logger.info("job_refused job_id=%s model=%s code=%s", job.job_id, job.model, error.code)
        for observer in self.observers:
            observer.refused(job.model, error.code)
            observer.dropped(watched, error.code)

    def turned_away(self, model: str, code: str) -> None:
        """Note a request that a limit of its key has stopped."""
        for observer in self.observers:
            observer.refused(model, code)

    def saw(self, job_id: str, event: JobEvent) -> None:
        """Note what came on a job's channel."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if isinstance(event, TokenChunk):
            self._tokens(job, event)
        elif isinstance(event, RunStarted):
            self._started(job, event)
        elif isinstance(event, Requeued):
            self._set_waiting(job, waits=True)
        else:
            self._ended(job, event)

    def left(self, job_id: str) -> None:
        """Forget a job whose reader went away while it goes on."""
        job = self._forget(job_id)
        if job is None:
            return
        logger.info("job_left job_id=%s", job_id)
        for observer in self.observers:
            observer.dropped(job, "left")

    def _started(self, job: WatchedJob, event: RunStarted) -> None:
        self._set_waiting(job, waits=False)
        job.num_runs += 1
        job.worker_id = event.worker_id
        if job.started_at is None:
            job.started_at = self._clock()
        for observer in self.observers:
            observer.started(job)

    def _tokens(self, job: WatchedJob, chunk: TokenChunk) -> None:
        now, num_new = self._clock(), len(chunk.token_ids)
        if chunk.num_prompt_tokens is not None:
            job.num_prompt_tokens = chunk.num_prompt_tokens
        if num_new == 0:
            return
        since_s = None if job.last_token_at is None else now - job.last_token_at
        job.last_token_at, job.num_tokens = now, chunk.num_tokens
        if job.first_token_at is None:
            job.first_token_at = now
        for observer in self.observers:
            observer.tokens(job, num_new, since_s)

    def _ended(self, job: WatchedJob, end: JobEnd) -> None:
        job.ended_at, job.end = self._clock(), end
        self._forget(job.job_id)
        _log_end(job, end)
        for observer in self.observers:
            observer.ended(job)

    def _set_waiting(self, job: WatchedJob, *, waits: bool) -> None:
        self._num_waiting += waits - job.waits
        job.waits = waits

    def _forget(self, job_id: str) -> WatchedJob | None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._set_waiting(job, waits=False)
        return job


def _log_end(job: WatchedJob, end: JobEnd) -> None:
    usage = end.usage
    logger.info(
        "job_served job_id=%s key=%s model=%s state=%s reason=%s prompt_tokens=%s tokens=%d "
        "queue_ms=%s ttft_ms=%s total_ms=%s runs=%d worker_id=%s",
        job.job_id,
        job.key_id,
        job.model,
        end.state,
        end.finish_reason or end.code or "-",
        usage.prompt_tokens if usage is not None else job.num_prompt_tokens,
        usage.completion_tokens if usage is not None else job.num_tokens,
        _ms(job.submitted_at, job.started_at),
        _ms(job.submitted_at, job.first_token_at),
        _ms(job.submitted_at, job.ended_at),
        job.num_runs,
        job.worker_id or "-",
    )


def _ms(since: float, until: float | None) -> str:
    return "-" if until is None else f"{1000 * (until - since):.0f}"
