"""The queue of one model: every change of a job's state, each one atomic script.

States are rq's: queued, started, then finished, failed or canceled. A started job is held under
a :class:`Lease`, which ends unless it is renewed; whoever finds it ended may put the job back.
Every call may be repeated after a lost reply. The only clock is Redis's.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

from redis import Redis
from redis.client import Pipeline

from mixfleet_broker.confirming import confirm
from mixfleet_broker.ends import read_ends
from mixfleet_broker.errors import (
    DeadlineExceededError,
    MessageError,
    UnknownJobError,
    WorkerLostError,
)
from mixfleet_broker.event_codec import encode_end, encode_run_start, with_bounded_message
from mixfleet_broker.finishing import finish_args
from mixfleet_broker.job_codec import (
    encode_stock_job,
)
from mixfleet_broker.keys import (
    BELL,
    CONTROL,
    LEASES,
    QUEUE,
    UNLISTED,
)
from mixfleet_broker.lua import Argument, ScriptName, Scripts
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.names import (
    check_job_id,
    check_model_name,
    check_worker_id,
)
from mixfleet_broker.records import CancelOutcome as CancelOutcome
from mixfleet_broker.records import ClaimedJob as ClaimedJob
from mixfleet_broker.records import JobInfo as JobInfo
from mixfleet_broker.records import Lease as Lease
from mixfleet_broker.records import Reaped as Reaped
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.standing import read_standing
from mixfleet_broker.submitting import submit_args, submit_outcome
from mixfleet_broker.terms import DEFAULT_TENANT, JobTerms, QueueRules
from mixfleet_broker.waiting import wait_for_one
from mixfleet_broker.write_outcome import WriteOutcome, write_outcome

MAX_CLAIM: Final = 1024
"""Jobs in one claim."""
STOCK_CLASS: Final = 1
STOCK_TOKENS: Final = 512
"""What a job of an rq producer is charged with until it has run."""


class JobQueue:
    """The queue of one model. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        model: Name of the model and of the queue.
        rules: How it is run.
        prefix: Before all keys, on a server that is shared with others.

    Raises:
        MessageError: ``model`` cannot name a queue.
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(
        self, redis: Redis, model: str, rules: QueueRules | None = None, *, prefix: str = ""
    ) -> None:
        self.model = check_model_name(model)
        self.redis = redis
        self.rules = rules or QueueRules()
        self.prefix = prefix
        self.scripts = Scripts(redis, prefix)

    # For clients

    def submit(self, job: ChatJob, terms: JobTerms | None = None) -> int:
        """Queue ``job`` and return how many jobs are before it.

        The same job again, by id and content, changes nothing and returns its position now, 0
        once it does not wait any more.

        Raises:
            MessageError: The job or its terms cannot be sent, or it is for another model.
            QueueFullError: The queue, or the tenant's share of it, is at its limit.
            DeadlineUnreachableError: It would start too late.
            JobConflictError: The id is taken by a job with another content.
            BrokerFullError: Redis is out of memory.
            NotDurableError: It is queued, and not yet where the rules want it to be.
        """
        if job.model != self.model:
            raise MessageError(f"job for model {job.model!r} on the queue of {self.model!r}")
        terms = terms or JobTerms()
        reply = self._run("submit", *submit_args(job, terms, self.rules))
        position = submit_outcome(reply, job, terms)
        confirm(self.redis, self.rules, job.job_id)
        return position

    def submit_on(self, pipeline: Pipeline, job: ChatJob, terms: JobTerms) -> None:
        """Put :meth:`submit` on a pipeline, see :mod:`mixfleet_broker.submitting_together`.

        Raises:
            MessageError: The job or its terms cannot be sent; nothing is on the pipeline.
        """
        self.scripts.queue_on(pipeline, "submit", self.model, *submit_args(job, terms, self.rules))

    def cancel(self, job_id: str, reason: str | None = None) -> CancelOutcome:
        """End a job wherever it is; its worker hears of it at its next step.

        Args:
            job_id: The job.
            reason: What its reader is told.
        """
        end = with_bounded_message(JobEnd(state="canceled", message=reason))
        status, ends = self._run("cancel", check_job_id(job_id), encode_end(end))
        read_ends(ends, model=self.model)
        if status is None:
            return CancelOutcome.UNKNOWN
        if status in (b"queued", b"started"):
            return CancelOutcome.CANCELED
        return CancelOutcome.ALREADY_ENDED

    def expire(self, job_id: str) -> bool:
        """End a job whose deadline is over; whether it was, and the job had not ended.

        Workers and gateways do it for all jobs (:meth:`reap`); this is for a client where none is.
        """
        ends = self._run(
            "expire", check_job_id(job_id), self.rules.result_ttl, self.rules.failure_ttl
        )
        return bool(read_ends(ends, model=self.model))

    def requeue(self, job_id: str) -> bool:
        """Let a failed job run again from nothing; False when it has not failed.

        Raises:
            UnknownJobError: There is no such job.
        """
        status = self._run("requeue", check_job_id(job_id))
        if status is None:
            raise UnknownJobError(job_id=job_id)
        return bool(status == b"failed")

    def depth(self) -> int:
        """Return how many jobs wait."""
        with redis_errors(), self.redis.pipeline(transaction=False) as pipeline:
            self.ask_depth(pipeline)
            listed, cancelled = pipeline.execute()
        return int(listed - cancelled)

    def ask_depth(self, pipeline: Pipeline) -> None:
        """Put two commands on a pipeline whose replies' difference is the depth."""
        pipeline.llen(QUEUE(self.model, prefix=self.prefix))
        pipeline.scard(UNLISTED(self.model, prefix=self.prefix))

    def num_started(self) -> int:
        """Return how many jobs are held by workers."""
        with redis_errors():
            return int(self.redis.zcard(LEASES(self.model, prefix=self.prefix)))

    def position(self, job_id: str) -> int | None:
        """Return how many jobs are before this one; None when it does not wait in the order."""
        try:
            return self.info(job_id).position
        except UnknownJobError:
            return None

    def info(self, job_id: str) -> JobInfo:
        """Return what is known of a job and of its way.

        Raises:
            UnknownJobError: There is no such job, or it has expired.
            MessageError: rq's tools brought it into a state that is none of ours.
        """
        reply = self._run("standing", check_job_id(job_id))
        if reply is None:
            raise UnknownJobError(job_id=job_id)
        return read_standing(job_id, reply)

    # For workers

    def claim(
        self,
        worker_id: str,
        max_jobs: int,
        claim_token: str,
        *,
        idle: bool = True,
        reaps: bool = True,
    ) -> list[ClaimedJob]:
        """Lease up to ``max_jobs`` jobs, first in the order first.

        Args:
            worker_id: Who will run them.
            max_jobs: At most ``MAX_CLAIM``; 0 or less claims nothing.
            claim_token: New for each claim, and the same when a claim is repeated because its
                reply was lost: then it gives the jobs of the first call and no others.
            idle: Whether the worker has no job now: only then it may get one to be run alone.
            reaps: Whether jobs of ended leases are among those that it may get, see :meth:`reap`.
        """
        check_worker_id(worker_id)
        check_job_id(claim_token)  # the same characters, and above all no colon
        if max_jobs <= 0:
            return []
        replies, ends = self._run(
            "claim",
            worker_id,
            min(max_jobs, MAX_CLAIM),
            self.rules.lease_ms,
            claim_token,
            encode_run_start(worker_id),
            int(idle),
            self.rules.max_losses,
            self.rules.result_ttl,
            self.rules.failure_ttl,
            self.rules.ageing_ms,
            STOCK_CLASS,
            DEFAULT_TENANT,
            STOCK_TOKENS,
            int(reaps),
        )
        read_ends(ends, model=self.model)
        return [self._claimed_job(reply) for reply in replies]

    def renew(self, worker_id: str, leases: Sequence[Lease]) -> set[str]:
        """Extend leases; return the ids of the jobs that are lost.

        A job is lost when it was cancelled, when its lease had ended and somebody reaped it, when
        its reader is gone and it is not to go on without, or when it has already ended. Nothing can
        be written to it under this lease any more.
        """
        if not leases:
            return set()
        lost, ends = self._run("renew", worker_id, self.rules.lease_ms, *_pairs(leases))
        read_ends(ends, model=self.model)
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
        reply = self._run("finish", *finish_args(lease, end, chunk, self.rules))
        return write_outcome(reply) is WriteOutcome.DONE

    def release(self, leases: Sequence[Lease]) -> int:
        """Hand jobs back to their place in the queue, no blame; return how many were still ours."""
        return self._hand_back("released", leases)

    def isolate(self, leases: Sequence[Lease]) -> int:
        """Hand jobs back to be run alone, one by one: the engine failed on one of them, no blame.

        Returns:
            How many were still ours.
        """
        return self._hand_back("isolated", leases)

    def reap(self, limit: int = 100) -> Reaped:
        """Do what anybody may do and somebody must: look after the jobs of the dead.

        A job whose lease is over goes back to its place in the queue, is put among those to be run
        alone, or has failed with ``worker_lost`` when this was its last permitted loss. A job whose
        deadline is over fails. One that has waited for long moves up. What is over is swept out.

        Args:
            limit: Jobs looked at in one call, of each kind.
        """
        requeued, replies = self._reap("lost", limit)
        ends = read_ends(replies, model=self.model)
        return Reaped(
            requeued=tuple(job_id.decode() for job_id in requeued),
            failed=tuple(end.job_id for end in ends if end.code == WorkerLostError.code),
            expired=tuple(end.job_id for end in ends if end.code == DeadlineExceededError.code),
        )

    def wait_for_jobs(self, timeout_s: float) -> bool:
        """Wait until the bell rings; whether it did within ``timeout_s`` seconds.

        rq producers do not ring it, so wait a second at most and then look.
        """
        bell = BELL(self.model, prefix=self.prefix)
        return wait_for_one(self.redis, [bell], timeout_s) is not None

    def wait_for_jobs_or_word(self, worker_id: str, timeout_s: float) -> str | None:
        """Wait until the bell rings or somebody has a word for the worker.

        Returns:
            The word, see orders.py; empty for the bell; None when nothing came.
        """
        control = CONTROL(worker_id, prefix=self.prefix)
        bell = BELL(self.model, prefix=self.prefix)
        found = wait_for_one(self.redis, [control, bell], timeout_s)
        if found is None:
            return None
        return found[1].decode() if found[0].decode() == control else ""

    def _run(self, name: ScriptName, *args: Argument) -> Any:
        with redis_errors():
            return self.scripts.run(name, self.model, *args)

    def _hand_back(self, mode: Literal["released", "isolated"], leases: Sequence[Lease]) -> int:
        if not leases:
            return 0
        requeued, replies = self._reap(mode, 0, _pairs(leases))
        read_ends(replies, model=self.model)
        return len(requeued)

    def _reap(self, mode: str, limit: int, pairs: Sequence[str] = ()) -> Any:
        return self._run(
            "reap",
            mode,
            limit,
            self.rules.max_losses,
            self.rules.result_ttl,
            self.rules.failure_ttl,
            self.rules.ageing_ms,
            *pairs,
        )

    def _claimed_job(self, reply: list[Any]) -> ClaimedJob:
        job_id, token, run, num_delivered, attempt, num_losses, is_stock, payload = reply[:8]
        alone, left_ms = reply[8:]
        lease = Lease(job_id=job_id.decode(), token=token.decode(), run=int(run))
        if is_stock:
            payload = _wrapped(lease.job_id, self.model, payload)
        return ClaimedJob(
            lease=lease,
            payload=payload,
            num_delivered=num_delivered,
            attempt=attempt,
            num_losses=num_losses,
            alone=bool(alone),
            time_left_s=None if left_ms < 0 else left_ms / 1000,
        )


def _pairs(leases: Sequence[Lease]) -> list[str]:
    return [part for lease in leases for part in (lease.job_id, lease.token)]


def _wrapped(job_id: str, model: str, data: bytes) -> bytes:
    try:
        return encode_stock_job(job_id, model, data)
    except MessageError:
        return data  # too large; decode_job says so, to this job's reader alone
