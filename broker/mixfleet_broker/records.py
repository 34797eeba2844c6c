"""What the queue says of jobs: plain values."""

from dataclasses import dataclass
from enum import StrEnum

from mixfleet_broker.messages import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to write one job's answer, until it ends or is taken away."""

    job_id: str
    token: str
    run: int
    """Grows from run to run of a job; the first half of the ids of its events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that was given to a worker."""

    lease: Lease
    payload: bytes
    """For ``decode_job``; unchecked, so that a bad one hurts no other job of the claim."""
    num_delivered: int
    """Tokens of the answer that earlier runs gave to the reader."""
    attempt: int
    """1 for the first run."""
    num_losses: int
    """Earlier runs that ended with the loss of their worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """What became of the jobs whose leases had ended."""

    requeued: tuple[str, ...]
    failed: tuple[str, ...]
    """Lost too often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """What is known of a job."""

    job_id: str
    state: JobState
    position: int | None
    """Jobs before it in the queue; None unless it is queued."""
    worker_id: str | None
    """Who runs it, or ran it last."""
    attempt: int
    """Runs so far."""
    num_losses: int


class CancelOutcome(StrEnum):
    """What a cancel met."""

    CANCELED = "canceled"
    """The job waited or ran, and does so no more."""
    ALREADY_ENDED = "already_ended"
    """Nothing was changed; also the answer to a repeated cancel."""
    UNKNOWN = "unknown"
    """There is no such job in this queue."""
