"""A broker in memory, as strict as the real one, and sessions of workers with it.

Leases, run epochs and the fence of a job's channel are kept as the scripts keep them, so that a
test sees the very refusals that Redis would give. A test can take it down, or let replies be lost
after the call had its effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.flush import FlushResult
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.orders import Order
from mixfleet_broker.queue import ClaimedJob, Lease
from mixfleet_broker.write_outcome import Behind, WriteOutcome
from mixfleet_worker.handoff import ChunkWrite, EndWrite, Write
from mixfleet_worker.session import Activity


@dataclass(slots=True, kw_only=True)
class FakeJob:
    """One job in the broker and all that its reader has got."""

    payload: bytes
    lease: Lease | None = None
    attempt: int = 0
    num_losses: int = 0
    last_id: tuple[int, int] = (0, 0)
    chunks: list[TokenChunk] = field(default_factory=list)
    ends: list[JobEnd] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for chunk in self.chunks for token_id in chunk.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.chunks[-1].num_tokens if self.chunks else 0


class FakeBroker:
    """The queue of one model."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.queued: list[str] = []
        self.is_down = False
        self.calls: list[str] = []
        self.lost_replies: list[str] = []
        """Calls that have their effect and then raise, by name; each counts once."""
        self.activities: list[Activity] = []
        self.idle_claims: list[bool] = []
        """Of each claim, whether the worker said that it was idle."""
        self.reaping_claims: list[bool] = []
        """Of each claim, whether it was to take jobs of ended leases too."""
        self.isolated: list[str] = []
        self.alone: set[str] = set()
        """Jobs that are to run alone."""
        self.order: Order | None = None
        self.words: list[str] = []
        """For the worker: what the next flush or wait brings."""
        self.signed_off: list[str] = []
        self._last_run = 0
        self._claims: dict[str, list[ClaimedJob]] = {}

    def push(self, job_id: str, payload: bytes = b"") -> None:
        """Queue a job."""
        self.jobs[job_id] = FakeJob(payload=payload)
        self.queued.append(job_id)

    def reap_job(self, job_id: str) -> None:
        """End the lease of a job, as if its worker had been silent."""
        job = self.jobs[job_id]
        job.lease, job.num_losses = None, job.num_losses + 1
        self.queued.append(job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel a job that runs."""
        job = self.jobs[job_id]
        job.lease = None
        job.last_id = (job.last_id[0] + 1, 0)
        job.ends.append(JobEnd(state="canceled"))

    def session(self, worker_id: str = "w1") -> "FakeSession":
        """Return a worker's connection."""
        return FakeSession(self, worker_id)

    def begin(self, call: str) -> None:
        """Note a call, which fails while the broker is down."""
        self.calls.append(call)
        if self.is_down:
            raise BrokerUnavailableError("down")

    def end(self, call: str) -> None:
        """Lose the reply of a call, if that was asked for."""
        if call in self.lost_replies:
            self.lost_replies.remove(call)
            raise BrokerUnavailableError("reply lost")

    def claim(self, max_jobs: int, claim_token: str) -> list[ClaimedJob]:
        if claim_token not in self._claims:
            taken, self.queued = self.queued[:max_jobs], self.queued[max_jobs:]
            self._claims[claim_token] = [self._lease(job_id) for job_id in taken]
        return self._claims[claim_token]

    def _lease(self, job_id: str) -> ClaimedJob:
        job = self.jobs[job_id]
        self._last_run += 1
        job.lease = Lease(job_id=job_id, token=f"t{self._last_run}", run=self._last_run)
        job.attempt += 1
        job.last_id = (self._last_run, job.num_tokens)
        return ClaimedJob(
            lease=job.lease,
            payload=job.payload,
            num_delivered=job.num_tokens,
            attempt=job.attempt,
            num_losses=job.num_losses,
            alone=job_id in self.alone,
        )

    def write(self, write: Write) -> WriteOutcome | Behind:
        job = self.jobs[write.lease.job_id]
        if isinstance(write, ChunkWrite):
            return self._append(job, write.lease, write.chunk)
        if job.lease != write.lease:
            is_repetition = job.ends == [write.end]
            return WriteOutcome.DONE if is_repetition else WriteOutcome.LOST
        if write.chunk is not None:
            outcome = self._append(job, write.lease, write.chunk)
            if outcome is not WriteOutcome.DONE:
                return outcome
        job.ends.append(write.end)
        job.lease, job.last_id = None, (job.last_id[0] + 1, 0)
        return WriteOutcome.DONE

    def forget_after(self, job_id: str, num_tokens: int) -> None:
        """Lose the last writes of a job, as a server that was killed may."""
        job = self.jobs[job_id]
        job.chunks = [chunk for chunk in job.chunks if chunk.num_tokens <= num_tokens]
        job.last_id = (job.last_id[0], num_tokens)

    def _append(self, job: FakeJob, lease: Lease, chunk: TokenChunk) -> WriteOutcome | Behind:
        run, num_tokens = job.last_id
        if run != lease.run:
            return WriteOutcome.LOST
        if num_tokens >= chunk.num_tokens and chunk.token_ids:
            return WriteOutcome.DONE
        if num_tokens != chunk.num_tokens - len(chunk.token_ids):
            return Behind(num_tokens)
        job.last_id = (run, chunk.num_tokens)
        job.chunks.append(chunk)
        return WriteOutcome.DONE


class FakeSession:
    """Implements `mixfleet_worker.session.Session`."""

    def __init__(self, broker: FakeBroker, worker_id: str) -> None:
        self._broker = broker
        self._worker_id = worker_id

    def claim(
        self, max_jobs: int, claim_token: str, *, idle: bool, reaps: bool = True
    ) -> list[ClaimedJob]:
        self._broker.begin("claim")
        self._broker.idle_claims.append(idle)
        self._broker.reaping_claims.append(reaps)
        jobs = self._broker.claim(max_jobs, claim_token)
        self._broker.end("claim")
        return [replace(job) for job in jobs]

    def delivered_tokens(self, job_id: str) -> tuple[int, ...]:
        self._broker.begin("delivered_tokens")
        self._broker.end("delivered_tokens")
        return self._broker.jobs[job_id].token_ids

    def flush(self, writes: Sequence[Write]) -> FlushResult:
        self._broker.begin("flush")
        outcomes = tuple(self._broker.write(write) for write in writes)
        self._broker.end("flush")
        words, self._broker.words = tuple(self._broker.words), []
        return FlushResult(outcomes=outcomes, num_queued=len(self._broker.queued), words=words)

    def renew(self, leases: Sequence[Lease]) -> set[str]:
        self._broker.begin("renew")
        jobs = self._broker.jobs
        return {lease.job_id for lease in leases if jobs[lease.job_id].lease != lease}

    def release(self, leases: Sequence[Lease]) -> int:
        self._broker.begin("release")
        ours = [lease for lease in leases if self._broker.jobs[lease.job_id].lease == lease]
        for lease in ours:
            self._broker.jobs[lease.job_id].lease = None
            self._broker.queued.append(lease.job_id)
        return len(ours)

    def isolate(self, leases: Sequence[Lease]) -> int:
        self._broker.begin("isolate")
        self._broker.isolated += [lease.job_id for lease in leases]
        return self.release(leases)

    def reap(self) -> None:
        self._broker.begin("reap")

    def beat(self, activity: Activity) -> Order | None:
        self._broker.begin("beat")
        self._broker.activities.append(activity)
        return self._broker.order

    def order(self) -> Order | None:
        self._broker.begin("order")
        return self._broker.order

    def sign_off(self) -> None:
        self._broker.begin("sign_off")
        self._broker.signed_off.append(self._worker_id)

    def wait_for_jobs(self, timeout_s: float) -> str | None:
        self._broker.begin("wait_for_jobs")
        assert timeout_s > 0
        if self._broker.words:
            return self._broker.words.pop(0)
        return "" if self._broker.queued else None

    def wait_for_word(self, timeout_s: float) -> str | None:
        self._broker.begin("wait_for_word")
        assert timeout_s > 0
        return self._broker.words.pop(0) if self._broker.words else None


def chunk_write(lease: Lease, num_tokens: int, text: str = "x") -> ChunkWrite:
    """Return the write of one token."""
    chunk = TokenChunk(num_tokens=num_tokens, text=text, token_ids=(num_tokens,))
    return ChunkWrite(lease=lease, chunk=chunk)


__all__ = ["EndWrite", "FakeBroker", "FakeJob", "FakeSession", "chunk_write"]
