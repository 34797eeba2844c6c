"""The queue of one model: every change of a job's state, each one atomic script.

States are rq's: queued, started, then finished, failed or canceled. A started job is held under
a :class:`Lease`, which ends unless it is renewed; whoever finds it ended may put the job back.
Every call may be repeated after a lost reply. The only clock is Redis's.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final, get_args

from redis import Redis
from redis.client import Pipeline

from mixfleet_broker.errors import (
    JobConflictError,
    MessageError,
    QueueFullError,
    UnknownJobError,
    WorkerLostError,
)
from mixfleet_broker.event_codec import encode_end, encode_run_start
from mixfleet_broker.finishing import exc_string, finish_args, finish_outcome
from mixfleet_broker.keys import (
    BELL,
    JOB,
    LEASES,
    QUEUE,
    READY,
    check_job_id,
    check_model_name,
    check_worker_id,
)
from mixfleet_broker.lua import Argument, ScriptName, Scripts
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobState,
    TokenChunk,
    encode_job,
    encode_stock_job,
)
from mixfleet_broker.records import CancelOutcome as CancelOutcome
from mixfleet_broker.records import ClaimedJob as ClaimedJob
from mixfleet_broker.records import JobInfo as JobInfo
from mixfleet_broker.records import Lease as Lease
from mixfleet_broker.records import Reaped as Reaped
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.rq_compat import DESCRIPTION, REFUSING_CALL

MAX_CLAIM: Final = 1024
"""Jobs in one claim."""
FAILURE_TTL_S: Final = 86_400
"""How long a failed job is kept for its operator."""
DEFAULT_TENANT: Final = "default"
DEFAULT_CLASS: Final = 1
"""Jobs of class 0 go first, of class 2 last."""


class JobQueue:
    """The queue of one model. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        model: Name of the model and of the queue.
        queue_limit: Jobs that may wait.
        lease_s: How long a claim or a renewal holds.
        result_ttl_s: How long a finished job and any answer are kept.
        max_losses: A job whose workers died so often has failed.

    Raises:
        MessageError: ``model`` cannot name a queue.
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(
        self,
        redis: Redis,
        model: str,
        *,
        queue_limit: int = 10_000,
        lease_s: float = 15.0,
        result_ttl_s: float = 900.0,
        max_losses: int = 3,
    ) -> None:
        self.model = check_model_name(model)
        self.redis = redis
        self.scripts = Scripts(redis)
        self._queue_limit = queue_limit
        self._lease_ms = round(lease_s * 1000)
        self._result_ttl_s = max(1, round(result_ttl_s))
        self._max_losses = max_losses
        self._canceled = encode_end(JobEnd(state="canceled"))

    # For clients

    def submit(self, job: ChatJob) -> int:
        """Queue ``job`` and return how many jobs are before it.

        The same job again, by id and content, changes nothing and returns its position now, 0
        once it does not wait any more.

        Raises:
            MessageError: The job cannot be sent, or is for another model.
            QueueFullError: The queue is at its limit.
            JobConflictError: The id is taken by a job with another content.
            BrokerFullError: Redis is out of memory.
        """
        if job.model != self.model:
            raise MessageError(f"job for model {job.model!r} on the queue of {self.model!r}")
        payload = encode_job(job)
        outcome, number = self._run(
            "submit",
            job.job_id,
            payload,
            sha256(payload).hexdigest(),
            self._queue_limit,
            DEFAULT_TENANT,
            DEFAULT_CLASS,
            REFUSING_CALL,
            DESCRIPTION,
            self._result_ttl_s,
            FAILURE_TTL_S,
        )
        if outcome == b"full":
            raise QueueFullError(model=self.model, depth=number, limit=self._queue_limit)
        if outcome == b"conflict":
            raise JobConflictError(job_id=job.job_id)
        return int(number)

    def cancel(self, job_id: str) -> CancelOutcome:
        """End a job wherever it is; its worker hears of it at its next write or renewal."""
        status = self._run("cancel", check_job_id(job_id), self._canceled)
        if status is None:
            return CancelOutcome.UNKNOWN
        if status in (b"queued", b"started"):
            return CancelOutcome.CANCELED
        return CancelOutcome.ALREADY_ENDED

    def depth(self) -> int:
        """Return how many jobs wait."""
        with redis_errors():
            return int(self.redis.llen(QUEUE(self.model)))

    def num_started(self) -> int:
        """Return how many jobs are held by workers."""
        with redis_errors():
            return int(self.redis.zcard(LEASES(self.model)))

    def position(self, job_id: str) -> int | None:
        """Return how many jobs are before this one; None when it does not wait."""
        with redis_errors():
            rank: Any = self.redis.zrank(READY(self.model), check_job_id(job_id))
        return None if rank is None else int(rank)

    def info(self, job_id: str) -> JobInfo:
        """Return what is known of a job.

        Raises:
            UnknownJobError: There is no such job, or it has expired.
            MessageError: rq's tools brought it into a state that is none of ours.
        """
        with redis_errors(), self.redis.pipeline(transaction=False) as pipeline:
            names = ("status", "worker_name", "mf_attempt", "mf_losses")
            pipeline.hmget(JOB(check_job_id(job_id)), names)
            pipeline.zrank(READY(self.model), job_id)
            (status, worker_id, attempt, losses), rank = pipeline.execute()
        if status is None:
            raise UnknownJobError(job_id=job_id)
        state = _job_state(job_id, status.decode())
        return JobInfo(
            job_id=job_id,
            state=state,
            position=rank if state == "queued" else None,
            worker_id=worker_id.decode() if worker_id else None,
            attempt=int(attempt or 0),
            num_losses=int(losses or 0),
        )

    # For workers

    def claim(self, worker_id: str, max_jobs: int, claim_token: str) -> list[ClaimedJob]:
        """Lease up to ``max_jobs`` jobs, first in the order first.

        Args:
            worker_id: Who will run them.
            max_jobs: At most ``MAX_CLAIM``; 0 or less claims nothing.
            claim_token: New for each claim, and the same when a claim is repeated because its
                reply was lost: then it gives the jobs of the first call and no others.
        """
        check_worker_id(worker_id)
        check_job_id(claim_token)  # the same characters, and above all no colon
        if max_jobs <= 0:
            return []
        replies = self._run(
            "claim",
            worker_id,
            min(max_jobs, MAX_CLAIM),
            self._lease_ms,
            claim_token,
            encode_run_start(worker_id),
            self._canceled,
            DEFAULT_CLASS,
        )
        return [self._claimed_job(reply) for reply in replies]

    def renew(self, worker_id: str, leases: Sequence[Lease]) -> set[str]:
        """Extend leases; return the ids of the jobs that are lost.

        A job is lost when it was cancelled, when its lease had ended and somebody reaped it, or
        when it has already ended. Nothing can be written to it under this lease any more.
        """
        if not leases:
            return set()
        pairs = _pairs(leases)
        lost = self._run("renew", worker_id, self._lease_ms, self._canceled, *pairs)
        return {job_id.decode() for job_id in lost}

    def finish(self, lease: Lease, end: JobEnd, chunk: TokenChunk | None = None) -> bool:
        """End a job, with the last piece of its answer, in one step.

        Args:
            lease: Of the run that ends it.
            end: Finished or failed; to cancel a job use :meth:`cancel`.
            chunk: The last piece, if there is one that was not appended. It may hold text
                without tokens: what was held back as a possible stop string.

        Returns:
            True when it is done, also by an earlier call of this run; False when the job is not
            the caller's any more, or its channel lacks tokens that should come before the chunk.
            Then nothing was changed.
        """
        return finish_outcome(self._run("finish", *self._finish_args(lease, end, chunk)))

    def finish_on(
        self, pipeline: Pipeline, lease: Lease, end: JobEnd, chunk: TokenChunk | None = None
    ) -> None:
        """Put :meth:`finish` on a pipeline; read its reply with :func:`finish_outcome`.

        The reply is a ``NoScriptError`` when the server has lost its scripts; then call
        :meth:`finish`. :class:`mixfleet_broker.flush.Flush` does all that.
        """
        args = self._finish_args(lease, end, chunk)
        self.scripts.queue_on(pipeline, "finish", self.model, *args)

    def release(self, leases: Sequence[Lease]) -> int:
        """Hand jobs back to their place in the queue, no blame; return how many were still ours."""
        if not leases:
            return 0
        requeued, _ = self._reap("released", 0, _pairs(leases))
        return len(requeued)

    def reap(self, limit: int = 100) -> Reaped:
        """Take jobs from workers whose leases have ended; anybody may, and somebody must.

        A job goes back to its place in the queue, or has failed with ``worker_lost`` when this
        was its last permitted loss.

        Args:
            limit: Leases looked at in one call.
        """
        requeued, failed = self._reap("lost", limit, [])
        return Reaped(
            requeued=tuple(job_id.decode() for job_id in requeued),
            failed=tuple(job_id.decode() for job_id in failed),
        )

    def wait_for_jobs(self, timeout_s: float) -> bool:
        """Wait until the bell rings; whether it did within ``timeout_s`` seconds.

        rq producers do not ring it, so wait a second at most and then look.
        """
        # To Redis 0 is for ever, and so is a millisecond to an old one.
        timeout_s = max(timeout_s, 0.01)
        with redis_errors():
            return self.redis.blpop([BELL(self.model)], timeout=timeout_s) is not None

    def _run(self, name: ScriptName, *args: Argument) -> Any:
        with redis_errors():
            return self.scripts.run(name, self.model, *args)

    def _reap(self, mode: str, limit: int, pairs: Sequence[str]) -> list[list[bytes]]:
        message = f"{self._max_losses} workers that ran it died"
        end = JobEnd(state="failed", code=WorkerLostError.code, message=message)
        replies: list[list[bytes]] = self._run(
            "reap",
            mode,
            limit,
            self._max_losses,
            encode_end(end),
            exc_string(end),
            self._canceled,
            self._result_ttl_s,
            FAILURE_TTL_S,
            *pairs,
        )
        return replies

    def _finish_args(
        self, lease: Lease, end: JobEnd, chunk: TokenChunk | None
    ) -> tuple[Argument, ...]:
        return finish_args(
            lease, end, chunk, result_ttl_s=self._result_ttl_s, failure_ttl_s=FAILURE_TTL_S
        )

    def _claimed_job(self, reply: list[Any]) -> ClaimedJob:
        job_id, token, run, num_delivered, attempt, num_losses, is_stock, payload = reply
        lease = Lease(job_id=job_id.decode(), token=token.decode(), run=int(run))
        if is_stock:
            payload = _wrapped(lease.job_id, self.model, payload)
        return ClaimedJob(
            lease=lease,
            payload=payload,
            num_delivered=num_delivered,
            attempt=attempt,
            num_losses=num_losses,
        )


def _job_state(job_id: str, status: str) -> JobState:
    for known in get_args(JobState):
        if status == known:
            state: JobState = known
            return state
    raise MessageError(f"job {job_id} has the status {status[:40]!r}, which mixfleet does not use")


def _pairs(leases: Sequence[Lease]) -> list[str]:
    return [part for lease in leases for part in (lease.job_id, lease.token)]


def _wrapped(job_id: str, model: str, data: bytes) -> bytes:
    try:
        return encode_stock_job(job_id, model, data)
    except MessageError:
        return data  # too large; decode_job says so, to this job's reader alone
