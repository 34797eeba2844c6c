"""The queue, said plainly: slow, obvious, in memory. Tests compare the real one with it."""

from dataclasses import dataclass, field
from typing import Final

from mixfleet_broker.queue import Lease

WEIGHTS: Final = {"a": 1.0, "b": 2.0}
COST: Final = 11.0
"""Of every job: a prompt of one token and an answer of ten."""


@dataclass
class PlainJob:
    """What a job is."""

    tenant: str
    job_class: int
    tag: float
    """Its place inside its class."""
    state: str = "queued"
    lease: Lease | None = None
    last_run: int = 0
    losses: int = 0
    attempts: int = 0
    is_suspect: bool = False
    suspected: int = 0
    """Counts those that became suspects, to order them."""
    tokens: list[int] = field(default_factory=list)
    expires_while_queued: bool = False


class PlainQueue:
    """Jobs by id, and the rules by which they move.

    Args:
        max_losses: As in ``QueueRules``.
    """

    def __init__(self, max_losses: int) -> None:
        self.jobs: dict[str, PlainJob] = {}
        self._max_losses = max_losses
        self._virtual_time = dict.fromkeys(range(3), 0.0)
        self._owed: dict[tuple[int, str], float] = {}
        self._num_suspected = 0
        self.quarantine: str | None = None

    def ready(self) -> list[str]:
        """The jobs that wait in the order."""
        waiting = [(job.job_class, job.tag, job_id) for job_id, job in self._waiting()]
        return [job_id for _, _, job_id in sorted(waiting)]

    def suspects(self) -> list[str]:
        """The jobs that wait to be run alone, the first suspected first."""
        found = [
            (job.suspected, job_id)
            for job_id, job in self.jobs.items()
            if job.state == "queued" and job.is_suspect
        ]
        return [job_id for _, job_id in sorted(found)]

    def num_waiting(self, tenant: str | None = None) -> int:
        """How many jobs wait, of one tenant or of all."""
        return sum(
            job.state == "queued" and tenant in (None, job.tenant) for job in self.jobs.values()
        )

    def submit(self, job_id: str, tenant: str, job_class: int) -> None:
        """A new job."""
        tag = self._next_tag(tenant, job_class)
        self.jobs[job_id] = PlainJob(tenant=tenant, job_class=job_class, tag=tag)

    def claim(self, worker_id: str, max_jobs: int, *, idle: bool) -> list[str]:
        """The jobs that a worker gets, and whether they are to run alone is in the jobs."""
        given = self._suspect_for(worker_id, idle=idle)
        if given is None:
            given = self.ready()[:max_jobs]
            for job_id in given:
                job = self.jobs[job_id]
                now = self._virtual_time[job.job_class]
                self._virtual_time[job.job_class] = max(now, job.tag)
        for job_id in given:
            self.jobs[job_id].state = "started"
            self.jobs[job_id].attempts += 1
        if not self.ready():
            self._virtual_time = dict.fromkeys(range(3), 0.0)
            self._owed.clear()
        return given

    def _suspect_for(self, worker_id: str, *, idle: bool) -> list[str] | None:
        """What a worker gets while there are suspects; None where it minds them not."""
        suspects = self.suspects()
        if not suspects or not (idle or self.quarantine in (None, worker_id)):
            return None
        self.quarantine = worker_id
        return suspects[:1] if idle else []

    def holds(self, lease: Lease) -> bool:
        """Whether a run is the job's."""
        job = self.jobs[lease.job_id]
        return job.lease == lease and job.state == "started"

    def put_back(self, job_id: str, *, suspect: bool) -> None:
        """A started job waits again."""
        job = self.jobs[job_id]
        job.state, job.lease, job.is_suspect = "queued", None, suspect
        job.tag = min(job.tag, self._virtual_time[job.job_class])
        if suspect:
            self._num_suspected += 1
            job.suspected = self._num_suspected

    def lose(self, job_id: str) -> None:
        """The worker of a started job died."""
        job = self.jobs[job_id]
        job.losses += 1
        if job.losses >= self._max_losses:
            job.state, job.lease = "failed", None
        else:
            self.put_back(job_id, suspect=job.losses == self._max_losses - 1)

    def move_up(self, job_id: str) -> None:
        """A waiting job has waited for long."""
        job = self.jobs[job_id]
        job.job_class -= 1
        job.tag = self._next_tag(job.tenant, job.job_class)

    def requeue(self, job_id: str) -> None:
        """An operator lets a failed job run again from nothing."""
        job = self.jobs[job_id]
        job.tag = self._next_tag(job.tenant, job.job_class)
        job.state, job.losses, job.attempts, job.is_suspect = "queued", 0, 0, False
        job.tokens, job.expires_while_queued = [], False

    def _waiting(self) -> list[tuple[str, PlainJob]]:
        return [
            (job_id, job)
            for job_id, job in self.jobs.items()
            if job.state == "queued" and not job.is_suspect
        ]

    def _next_tag(self, tenant: str, job_class: int) -> float:
        tag = max(self._virtual_time[job_class], self._owed.get((job_class, tenant), 0.0))
        self._owed[job_class, tenant] = tag + COST / WEIGHTS[tenant]
        return tag
