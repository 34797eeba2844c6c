"""A worker in a thread that answers with the question, one token per character."""

import threading
import time
from types import TracebackType
from typing import Self

from mixfleet_broker.channel import delivered_tokens
from mixfleet_broker.connection import connect
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    TokenChunk,
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import ClaimedJob
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import QueueRules
from mixfleet_broker.write_outcome import WriteOutcome
from support.queue_jobs import append_chunk

WAKE_UP_S = 0.02


class EchoWorker:
    """Serves ``model``, one job at a time, until the block is left.

    Args:
        url: Of Redis.
        model: Its name.
        lease_s: Of its claims.
        hold_after: Stop before the token after this one until :attr:`go` is set; None never.
        leave_after: Give the job back after this token, and stop.
    """

    def __init__(
        self,
        url: str,
        model: str = "tiny",
        *,
        worker_id: str = "echo",
        lease_s: float = 15.0,
        hold_after: int | None = None,
        leave_after: int | None = None,
    ) -> None:
        self._redis = connect(url)
        self._queue = JobQueue(self._redis, model, QueueRules(lease_s=lease_s))
        self._hold_after = hold_after
        self._leave_after = leave_after
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        record = WorkerRecord.of_this_process(
            worker_id=worker_id,
            model=model,
            max_batch_size=1,
            context_length=8192,
            started_at=time.time(),
        )
        self._worker_id = worker_id
        self._registration = Registration(self._redis, record, lease_s=lease_s)
        self.go = threading.Event()
        self.lost: list[str] = []
        """Jobs that were taken away while it wrote their answer."""
        self.jobs: list[ChatJob] = []
        """What it was asked."""

    def _run(self) -> None:
        while not self._stop.is_set():
            self._registration.beat(state="idle", in_flight=0)
            for claimed in self._queue.claim(self._worker_id, 1, new_job_id()):
                self._answer(claimed)
            self._stop.wait(WAKE_UP_S)

    def _answer(self, claimed: ClaimedJob) -> None:
        job = decode_job(claimed.payload)
        self.jobs.append(job)
        text = job.prompt or job.messages[-1].content
        begin = len(delivered_tokens(self._redis, job.job_id))
        for number, character in enumerate(text[begin:], begin + 1):
            if number - 1 == self._leave_after:
                self._queue.release([claimed.lease])
                self._stop.set()
                return
            if not self._may_write(number, claimed):
                self.lost.append(job.job_id)
                return
            chunk = TokenChunk(num_tokens=number, text=character, token_ids=(ord(character),))
            if append_chunk(self._queue, claimed.lease, chunk) is not WriteOutcome.DONE:
                self.lost.append(job.job_id)  # cancelled since the renewal
                return
        usage = Usage(prompt_tokens=len(job.messages), completion_tokens=len(text))
        self._queue.finish(
            claimed.lease, JobEnd(state="finished", finish_reason="stop", usage=usage)
        )

    def _may_write(self, number: int, claimed: ClaimedJob) -> bool:
        """Wait at the holding point; False once the job is not ours."""
        while True:
            if self._stop.is_set() or self._queue.renew(self._worker_id, [claimed.lease]):
                return False
            if number - 1 != self._hold_after or self.go.wait(WAKE_UP_S):
                return True

    def __enter__(self) -> Self:
        self._registration.beat(state="idle", in_flight=0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._registration.deregister()
        self._redis.close()
