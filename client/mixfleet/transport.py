"""How a client reaches the fleet: a small protocol, and its Redis form."""

from collections.abc import Sequence
from typing import Protocol, cast

from mixfleet_broker.attendance import attend
from mixfleet_broker.channel import read_events
from mixfleet_broker.connection import MAX_BLOCK_S, connect, find_redis_url
from mixfleet_broker.errors import UnknownJobError
from mixfleet_broker.inquiries import ask
from mixfleet_broker.inquiry_codec import Inquiry, InquiryAnswer
from mixfleet_broker.keys import (
    JOB,
)
from mixfleet_broker.messages import (
    ChatJob,
    JobEvent,
)
from mixfleet_broker.names import (
    check_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import JobInfo
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.registry import models, workers
from mixfleet_broker.settings import Settings
from mixfleet_broker.terms import JobTerms, QueueRules


class Transport(Protocol):
    """What a client needs of the fleet. All methods may be called from any thread.

    Every method raises BrokerUnavailableError when the broker cannot be reached.
    """

    def submit(self, job: ChatJob, terms: JobTerms) -> int:
        """Queue ``job`` and return how many are before it; the same job again changes nothing."""
        ...

    def attend(self, job_ids: Sequence[str]) -> None:
        """Say that somebody reads these jobs, which are to end with their readers."""
        ...

    def read(self, job_id: str, after: str, block_s: float) -> list[tuple[str, JobEvent]]:
        """Return the events after the id ``after``, waiting for one up to ``block_s`` or less."""
        ...

    def cancel(self, job_id: str, model: str, reason: str | None = None) -> None:
        """Stop a job wherever it is; harmless once it has ended."""
        ...

    def expire(self, job_id: str, model: str) -> None:
        """End a job whose deadline is over, should nobody have done it; else harmless."""
        ...

    def position(self, job_id: str, model: str) -> int | None:
        """Return how many jobs are before this one; None when it is not queued."""
        ...

    def status(self, job_id: str, model: str) -> JobInfo:
        """Return what is known of a job; raises UnknownJobError."""
        ...

    def model_of(self, job_id: str) -> str:
        """Return the model that a job is for; raises UnknownJobError."""
        ...

    def models(self) -> tuple[str, ...]:
        """Return the names of the models served now or lately."""
        ...

    def num_workers(self, model: str) -> int:
        """Return how many live workers serve ``model``."""
        ...

    def ask(self, model: str, inquiry: Inquiry, timeout_s: float) -> InquiryAnswer:
        """Return what any worker of ``model`` answers at once, see mixfleet_broker.inquiries."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


class RedisTransport:
    """Speaks to the fleet's Redis directly.

    Args:
        settings: Where Redis is, and the limits of the queue.

    Raises:
        BrokerUnavailableError: No Redis is set or running, or it does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._redis = connect(find_redis_url(settings))
        self._prefix = settings.key_prefix
        self._rules = QueueRules.from_settings(settings)

    def submit(self, job: ChatJob, terms: JobTerms) -> int:
        """See :meth:`Transport.submit`."""
        return self._queue(job.model).submit(job, terms)

    def attend(self, job_ids: Sequence[str]) -> None:
        """See :meth:`Transport.attend`."""
        attend(self._redis, job_ids, prefix=self._prefix)

    def read(self, job_id: str, after: str, block_s: float) -> list[tuple[str, JobEvent]]:
        """See :meth:`Transport.read`."""
        return read_events(
            self._redis, job_id, after, min(block_s, MAX_BLOCK_S), prefix=self._prefix
        )

    def cancel(self, job_id: str, model: str, reason: str | None = None) -> None:
        """See :meth:`Transport.cancel`."""
        self._queue(model).cancel(job_id, reason)

    def expire(self, job_id: str, model: str) -> None:
        """See :meth:`Transport.expire`."""
        self._queue(model).expire(job_id)

    def position(self, job_id: str, model: str) -> int | None:
        """See :meth:`Transport.position`."""
        return self._queue(model).position(job_id)

    def status(self, job_id: str, model: str) -> JobInfo:
        """See :meth:`Transport.status`."""
        return self._queue(model).info(job_id)

    def model_of(self, job_id: str) -> str:
        """See :meth:`Transport.model_of`."""
        with redis_errors():
            key = JOB(check_job_id(job_id), prefix=self._prefix)
            origin = cast("bytes | None", self._redis.hget(key, "origin"))
        if origin is None:
            raise UnknownJobError(job_id=job_id)
        return origin.decode()

    def models(self) -> tuple[str, ...]:
        """See :meth:`Transport.models`."""
        return tuple(models(self._redis, prefix=self._prefix))

    def num_workers(self, model: str) -> int:
        """See :meth:`Transport.num_workers`."""
        records = workers(self._redis, prefix=self._prefix)
        return sum(record.model == model for record in records)

    def ask(self, model: str, inquiry: Inquiry, timeout_s: float) -> InquiryAnswer:
        """See :meth:`Transport.ask`."""
        return ask(self._redis, model, inquiry, timeout_s, prefix=self._prefix)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._redis.close()

    def _queue(self, model: str) -> JobQueue:
        return JobQueue(self._redis, model, self._rules, prefix=self._prefix)
