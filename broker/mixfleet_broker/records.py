"""What the queue says of jobs: plain values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from mixfleet_broker.messages import (
    JobState,
)


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
    alone: bool = False
    """It may have killed workers: nothing else may run beside it."""
    time_left_s: float | None = None
    """Until it must be complete; None: it may take its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """What became of the jobs whose leases or times had ended."""

    requeued: tuple[str, ...]
    failed: tuple[str, ...]
    """Lost too often."""
    expired: tuple[str, ...] = ()
    """Their deadline was over."""


Outlook = Literal["queued", "suspect", "no_worker", "paused", "started", "ended"]
"""A job's state as its reader wants to know it: it waits its turn; it waits to be run alone; it
waits and nobody serves its model; it waits and its workers are told to take nothing; it runs; it
is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """What is known of a job."""

    job_id: str
    state: JobState
    position: int | None
    """Jobs before it in the queue; None unless it waits in the order."""
    worker_id: str | None
    """Who runs it, or ran it last."""
    attempt: int
    """Runs so far."""
    num_losses: int
    tokens_ahead: int | None = None
    """Tokens expected of the jobs before it, prompts and answers."""
    eta_s: float | None = None
    """When it may start, by the measured speed of the fleet; None while nothing is known of it."""
    waited_s: float | None = None
    """Since it was submitted."""
    num_workers: int = 0
    """Live workers that take jobs of its model."""
    num_slots: int = 0
    """Jobs that these run at once."""
    outlook: Outlook = "queued"
    tenant: str = "default"
    """Whose job it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRun:
    """A run that did not end its job."""

    worker_id: str
    ended_at: float
    """Unix time by Redis's clock."""
    reason: str
    """lost, released, isolated or failed."""
    num_tokens: int
    """Of the answer, as delivered by then."""


class CancelOutcome(StrEnum):
    """What a cancel met."""

    CANCELED = "canceled"
    """The job waited or ran, and does so no more."""
    ALREADY_ENDED = "already_ended"
    """Nothing was changed; also the answer to a repeated cancel."""
    UNKNOWN = "unknown"
    """There is no such job in this queue."""
