"""What the broker and the client raise, and what travels on the wire.

::

    MixfleetError
    ├── ConfigError                 a setting cannot be used; the text names it
    ├── MissingExtraError           a part that is not installed; the text says how to install it
    ├── MessageError                bytes or fields that are not of the schema
    ├── BrokerError
    │   ├── BrokerUnavailableError  no Redis answers (retryable)
    │   ├── BrokerFullError         Redis is out of memory; nothing was written (retryable)
    │   ├── NotDurableError         queued, and not yet on disk or replica (retryable)
    │   ├── QueueFullError          the queue is at its limit (retryable)
    │   │   └── TenantQueueFullError   the tenant's share of it is (retryable)
    │   ├── DeadlineUnreachableError   the job would start too late; nothing was written
    │   ├── JobConflictError        the job id is taken by a different job
    │   ├── NoWorkerError           nobody lives who could answer the inquiry (retryable)
    │   ├── InquiriesFullError      too many inquiries wait (retryable)
    │   ├── InquiryTimeoutError     no answer in the time allowed (retryable)
    │   ├── UnknownJobError         no such job, or its time to live is over
    │   ├── UnknownWorkerError      no such worker lives
    │   ├── UnknownModelError       no model given and none, or several, to choose from
    │   ├── UnknownKeyError         no such API key, or it is revoked
    │   └── RateLimitedError        the API key has used what it may for now (retryable)
    │       └── RequestOverLimitError  the request alone is more than the key may use
    └── JobError                    the job ended without a full answer
        ├── JobRejectedError        the job itself cannot run
        │   ├── InvalidRequestError
        │   ├── InvalidMessagesError
        │   └── PromptTooLongError
        ├── JobFailedError          it ran and failed
        │   ├── DeadlineExceededError  its time was over
        │   ├── EngineFailedError   the engine raised on this job
        │   └── WorkerLostError     its workers died, too often to try again
        ├── JobCancelledError       somebody cancelled it
        └── StreamTimeoutError      nothing came in the time allowed; the job may go on

``code`` is stable and travels in :class:`~mixfleet_broker.messages.JobEnd`; ``retryable`` says
whether the same call can succeed later without being changed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from mixfleet_broker.limits import LimitState
    from mixfleet_broker.messages import (
        JobEnd,
    )


class MixfleetError(Exception):
    """Base of everything that mixfleet raises on purpose."""

    code: str = "error"
    """Stable name, also on the wire."""
    retryable: ClassVar[bool] = False
    """Whether the same call can succeed later."""


class ConfigError(MixfleetError):
    """A setting cannot be used; the text names it and its value."""

    code = "config"


class MissingExtraError(MixfleetError):
    """An optional part is not installed.

    Args:
        what: What was asked for, as the user would say it.
        extra: The extra that brings it.
    """

    code = "missing_extra"

    def __init__(self, *, what: str, extra: str) -> None:
        super().__init__(f"{what} needs mixfleet[{extra}]: pip install 'mixfleet[{extra}]'")
        self.what = what
        self.extra = extra


class MessageError(MixfleetError):
    """Bytes or fields are not of the schema; the text names the field, never a prompt."""

    code = "invalid_request"


class BrokerError(MixfleetError):
    """The broker did not do what it was asked to do."""

    code = "broker"


class BrokerUnavailableError(BrokerError):
    """No Redis answers. Whether the call had its effect is unknown; all calls can be repeated."""

    code = "broker_unavailable"
    retryable = True


class BrokerFullError(BrokerError):
    """Redis is out of memory. Nothing was written."""

    code = "broker_full"
    retryable = True


class NotDurableError(BrokerError):
    """The job is queued, but no disk or replica has confirmed it. Submit the same job again."""

    code = "not_durable"
    retryable = True

    def __init__(self, *, job_id: str, durability: str, waited_s: float) -> None:
        whom = "the disk" if durability == "fsync" else "a replica"
        super().__init__(f"job {job_id}: {whom} has not confirmed it within {waited_s:g} s")
        self.job_id = job_id
        self.durability = durability
        self.waited_s = waited_s


class QueueFullError(BrokerError):
    """The queue is at its limit of jobs or tokens. Nothing was written."""

    code = "queue_full"
    retryable = True

    def __init__(
        self,
        *,
        model: str,
        depth: int,
        limit: int,
        unit: str = "jobs",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            f"the queue of {model} is full: {depth} {unit} wait, the limit is {limit}"
            f"{_again(retry_after_s)}"
        )
        self.model = model
        self.unit = unit
        self.depth = depth
        self.limit = limit
        self.retry_after_s = retry_after_s


class TenantQueueFullError(QueueFullError):
    """The tenant has as many jobs or tokens waiting as it may. Nothing was written."""

    code = "tenant_queue_full"

    def __init__(
        self,
        *,
        model: str,
        tenant: str,
        depth: int,
        limit: int,
        unit: str = "jobs",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            model=model, depth=depth, limit=limit, unit=unit, retry_after_s=retry_after_s
        )
        self.args = (
            f"{depth} {unit} of {tenant} wait in the queue of {model}, the limit is {limit}"
            f"{_again(retry_after_s)}",
        )
        self.tenant = tenant


class DeadlineUnreachableError(BrokerError):
    """The job would start later than it may. Nothing was written."""

    code = "deadline_unreachable"

    def __init__(self, *, eta_s: float, within_s: float) -> None:
        super().__init__(
            f"the job would start in about {eta_s:.1f} s, and it was to be within {within_s:g} s"
        )
        self.eta_s = eta_s
        self.within_s = within_s


class JobConflictError(BrokerError):
    """The job id is taken by a job with another content."""

    code = "job_conflict"

    def __init__(self, *, job_id: str) -> None:
        super().__init__(f"job id {job_id} is taken by a different job")
        self.job_id = job_id


class NoWorkerError(BrokerError):
    """No worker of the model lives, so nobody can answer. Nothing was written."""

    code = "no_worker"
    retryable = True

    def __init__(self, *, model: str) -> None:
        super().__init__(f"no worker of {model} lives: `mixfleet worker ls` lists those that do")
        self.model = model


class InquiriesFullError(BrokerError):
    """Too many inquiries wait for the model's workers. Nothing was written."""

    code = "inquiries_full"
    retryable = True

    def __init__(self, *, model: str, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} inquiries wait for a worker of {model}, the limit is {limit}")
        self.model = model
        self.waiting = waiting
        self.limit = limit


class InquiryTimeoutError(BrokerError):
    """No worker answered in the time allowed. Asking again changes nothing."""

    code = "inquiry_timeout"
    retryable = True

    def __init__(self, *, model: str, limit_s: float) -> None:
        super().__init__(f"no worker of {model} answered within {limit_s:g} s: ask again")
        self.model = model
        self.limit_s = limit_s


class UnknownJobError(BrokerError):
    """There is no such job, or what was kept of it has expired."""

    code = "unknown_job"

    def __init__(self, *, job_id: str) -> None:
        super().__init__(f"no job {job_id}: it never existed, or it ended too long ago")
        self.job_id = job_id


class UnknownWorkerError(BrokerError):
    """No such worker lives."""

    code = "unknown_worker"

    def __init__(self, *, worker_id: str) -> None:
        super().__init__(f"no worker {worker_id} lives: `mixfleet worker ls` lists those that do")
        self.worker_id = worker_id


class UnknownModelError(BrokerError):
    """No model was named and there is none, or more than one, to choose from."""

    code = "unknown_model"

    def __init__(self, message: str, *, models: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.models = tuple(models)


class UnknownKeyError(BrokerError):
    """There is no such API key, or it is revoked."""

    code = "unknown_key"

    def __init__(self, *, key_id: str, is_revoked: bool = False) -> None:
        found = "is revoked: make a new one" if is_revoked else "is unknown"
        super().__init__(f"API key {key_id} {found}; `mixfleet key ls` lists them")
        self.key_id = key_id
        self.is_revoked = is_revoked


class RateLimitedError(BrokerError):
    """The API key has used what it may for now. Nothing was charged."""

    code = "rate_limited"
    retryable = True

    def __init__(
        self,
        *,
        key_id: str,
        name: str,
        limit: int,
        load: int,
        retry_after_s: float | None,
        states: Sequence["LimitState"] = (),
    ) -> None:
        again = "" if retry_after_s is None else f"; try again in {retry_after_s:.3g} s"
        super().__init__(f"API key {key_id}: {load} {_LIMITED[name]}, the limit is {limit}{again}")
        self.key_id = key_id
        self.name = name
        """Of the limit: requests, tokens, tokens_day or jobs."""
        self.limit = limit
        self.load = load
        self.retry_after_s = retry_after_s
        """Who asks then is admitted if nobody else has come; for jobs: when it is worth asking."""
        self.states = tuple(states)
        """Of all limits of the key."""


class RequestOverLimitError(RateLimitedError):
    """The request alone is more than its API key may use at once. Nothing was charged."""

    code = "request_over_limit"
    retryable = False

    def __init__(
        self,
        *,
        key_id: str,
        name: str,
        limit: int,
        asked: int,
        states: Sequence["LimitState"] = (),
    ) -> None:
        super().__init__(
            key_id=key_id, name=name, limit=limit, load=asked, retry_after_s=None, states=states
        )
        self.args = (
            f"API key {key_id}: the request alone is {asked} {_LIMITED[name]}, "
            f"the limit is {limit}",
        )


_LIMITED: Final = {
    "requests": "requests in a minute",
    "tokens": "tokens in a minute",
    "tokens_day": "tokens in a day",
    "jobs": "unfinished jobs",
}


class JobError(MixfleetError):
    """The job ended without a full answer.

    Args:
        message: What its worker, or the broker, said.
        job_id: The job, where it is known.
        code: The name on the wire, where it is not the class's own.
    """

    code = "job_error"

    def __init__(self, message: str, *, job_id: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id
        if code is not None:
            self.code = code


class JobRejectedError(JobError):
    """The job itself cannot run; the same job will be rejected again."""

    code = "rejected"


class InvalidRequestError(JobRejectedError):
    """A field of the job cannot be used."""

    code = "invalid_request"


class InvalidMessagesError(JobRejectedError):
    """The conversation does not fit the model's chat format."""

    code = "invalid_messages"


class PromptTooLongError(JobRejectedError):
    """The prompt and its answer do not fit the model's context."""

    code = "prompt_too_long"


class JobFailedError(JobError):
    """The job ran and failed."""

    code = "failed"


class DeadlineExceededError(JobFailedError):
    """The job's time was over before its answer was complete."""

    code = "deadline_exceeded"


class EngineFailedError(JobFailedError):
    """The engine raised on this job."""

    code = "engine_failed"


class WorkerLostError(JobFailedError):
    """The job's workers died, too often to try again."""

    code = "worker_lost"


class JobCancelledError(JobError):
    """Somebody cancelled the job."""

    code = "canceled"


class StreamTimeoutError(JobError):
    """Nothing came in the time allowed. The job may go on, and reading it again may too."""

    code = "stream_timeout"
    retryable = True

    def __init__(self, *, job_id: str, what: str, limit_s: float) -> None:
        super().__init__(f"job {job_id}: no {what} within {limit_s:g} s", job_id=job_id)
        self.what = what
        self.limit_s = limit_s


def _again(retry_after_s: float | None) -> str:
    return "" if retry_after_s is None else f"; try again in {retry_after_s:.0f} s"


def error_from_end(end: "JobEnd", *, job_id: str | None = None) -> JobError:
    """Return the error that says how a job ended without an answer.

    Args:
        end: Of a failed or cancelled job.
        job_id: Kept in the error.

    Returns:
        The class that ``end.code`` names; a code that this version does not know gives a
        :class:`JobFailedError` that carries it.
    """
    if end.state == "finished":
        raise ValueError("a finished job has no error")
    if end.state == "canceled":
        return JobCancelledError(end.message or "the job was cancelled", job_id=job_id)
    message = end.message or f"the job failed: {end.code or 'no reason given'}"
    for kind in (
        JobRejectedError,
        InvalidRequestError,
        InvalidMessagesError,
        PromptTooLongError,
        DeadlineExceededError,
        EngineFailedError,
        WorkerLostError,
    ):
        if kind.code == end.code:
            return kind(message, job_id=job_id)
    return JobFailedError(message, job_id=job_id, code=end.code)
