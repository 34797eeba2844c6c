"""A worker without a thread: a test does by hand, step by step, what a worker does."""

import time
from types import TracebackType
from typing import Self

from mixfleet_broker.connection import connect
from mixfleet_broker.job_codec import decode_job
from mixfleet_broker.messages import AnswerPart, ChatJob, JobEnd, TokenChunk, Usage, new_job_id
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import ClaimedJob
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import append_chunk
from support.worker_process import until

LEASE_S = 60.0


class HandWorker:
    """Claims jobs of ``model`` and writes their answers when it is told to.

    Args:
        url: Of Redis.
        model: Its name.
    """

    def __init__(self, url: str, model: str = "tiny") -> None:
        self._redis = connect(url)
        self._queue = JobQueue(self._redis, model, QueueRules(lease_s=LEASE_S))
        record = WorkerRecord.of_this_process(
            worker_id="hand",
            model=model,
            max_batch_size=64,
            context_length=8192,
            started_at=time.time(),
        )
        self._registration = Registration(self._redis, record, lease_s=LEASE_S)
        self._num_tokens: dict[str, int] = {}

    def take(self) -> ClaimedJob:
        """Claim the next job, which must come soon."""
        found: list[ClaimedJob] = []

        def claimed() -> bool:
            found.extend(self._queue.claim("hand", 1, new_job_id()))
            return bool(found)

        until(claimed, "a job to claim")
        return found[0]

    def say(self, claimed: ClaimedJob, *texts: str, part: AnswerPart = "text") -> None:
        """Write one chunk, of one token, for each text."""
        for text in texts:
            number = self._num_tokens.get(claimed.lease.job_id, 0) + 1
            self._num_tokens[claimed.lease.job_id] = number
            chunk = TokenChunk(num_tokens=number, text=text, token_ids=(number,), part=part)
            append_chunk(self._queue, claimed.lease, chunk)

    def finish(self, claimed: ClaimedJob, end: JobEnd | None = None) -> None:
        """End a job; well, unless it is said otherwise."""
        num_tokens = self._num_tokens.get(claimed.lease.job_id, 0)
        usage = Usage(prompt_tokens=7, completion_tokens=num_tokens)
        done = JobEnd(state="finished", finish_reason="stop", usage=usage)
        self._queue.finish(claimed.lease, end or done)

    def cancel(self, claimed: ClaimedJob) -> None:
        """End a job as its client would."""
        self._queue.cancel(claimed.lease.job_id, "not wanted")

    def __enter__(self) -> Self:
        self._registration.beat(state="idle", in_flight=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._registration.deregister()
        self._redis.close()


def job_of(claimed: ClaimedJob) -> ChatJob:
    """Return what a claimed job asks for."""
    return decode_job(claimed.payload)
