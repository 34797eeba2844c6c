"""Random sequences of calls against a slow and obvious model of the queue."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from mixfleet_broker.channel import delivered_tokens, read_events
from mixfleet_broker.errors import QueueFullError
from mixfleet_broker.flush import Flush, WriteOutcome
from mixfleet_broker.keys import (
    CANCELED,
    FAILED,
    FINISHED,
    JOB,
    LEASES,
    QUEUE,
    READY,
    WIP,
)
from mixfleet_broker.messages import JobEnd, TokenChunk
from mixfleet_broker.queue import CancelOutcome, ClaimedJob, JobQueue, Lease
from support.queue_jobs import DONE, MODEL, chat_job, texts

MAX_LOSSES = 2
LIMIT = 6


@dataclass
class ModelJob:
    """What a job is, said plainly."""

    state: str = "queued"
    lease: Lease | None = None
    last_run: int = 0
    losses: int = 0
    tokens: list[int] = field(default_factory=list)


class QueueMachine(RuleBasedStateMachine):
    """Two workers, one of which may be a zombie, and clients."""

    leases: Bundle[Lease] = Bundle("leases")
    redis: Redis

    @initialize()
    def start(self) -> None:
        self.redis.flushall()
        self.queue = JobQueue(self.redis, MODEL, queue_limit=LIMIT, max_losses=MAX_LOSSES)
        self.jobs: dict[str, ModelJob] = {}
        self.order: list[str] = []
        """All jobs ever, in the order of their places."""
        self.num_claims = 0
        self.next_token = 0

    def waiting(self) -> list[str]:
        return [job_id for job_id in self.order if self.jobs[job_id].state == "queued"]

    def holds(self, lease: Lease) -> bool:
        return self.jobs[lease.job_id].lease == lease

    def token(self) -> int:
        self.next_token += 1
        return self.next_token

    @rule()
    def submit(self) -> None:
        job = chat_job()
        if len(self.waiting()) >= LIMIT:
            with pytest.raises(QueueFullError):
                self.queue.submit(job)
            return
        assert self.queue.submit(job) == len(self.waiting())
        self.jobs[job.job_id] = ModelJob()
        self.order.append(job.job_id)
        assert self.queue.submit(job) == len(self.waiting()) - 1

    @rule(target=leases, max_jobs=st.integers(1, 3), repeats=st.integers(1, 2))
    def claim(self, max_jobs: int, repeats: int) -> Any:
        expected = self.waiting()[:max_jobs]
        self.num_claims += 1
        claimed: list[ClaimedJob] = []
        for _ in range(repeats):
            claimed = self.queue.claim("w1", max_jobs, f"c{self.num_claims}")
            assert [c.lease.job_id for c in claimed] == expected
        for c in claimed:
            job = self.jobs[c.lease.job_id]
            assert (c.num_delivered, c.num_losses) == (len(job.tokens), job.losses)
            job.state, job.lease, job.last_run = "started", c.lease, c.lease.run
        return multiple(*(c.lease for c in claimed))

    @rule(lease=leases, num_new=st.integers(1, 2), ends=st.booleans(), repeats=st.integers(1, 2))
    def write(self, lease: Lease, num_new: int, ends: bool, repeats: int) -> None:
        """A step's write by a run that may have lost its job, sent once or twice."""
        job = self.jobs[lease.job_id]
        new = [self.token() for _ in range(num_new)]
        chunk = TokenChunk(
            num_tokens=len(job.tokens) + num_new, text="x" * num_new, token_ids=tuple(new)
        )
        flush = Flush(self.queue)
        if ends:
            flush.finish(lease, DONE, chunk)
        else:
            flush.append(lease, chunk)
        live = self.holds(lease) and job.state == "started"
        # Until the next run begins, a chunk of the last one still goes on where it stopped.
        arrives = live or (job.state == "queued" and job.last_run == lease.run and not ends)
        for attempt in range(repeats):
            [outcome] = flush.send().outcomes
            if ends:
                # Also when this run had ended the job before: the end is not said again.
                assert (outcome is WriteOutcome.DONE) == self.holds(lease)
            else:
                done = arrives and attempt == 0
                assert outcome is (WriteOutcome.DONE if done else WriteOutcome.REFUSED)
        if arrives:
            job.tokens += new
        if live and ends:
            job.state = "finished"

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        job = self.jobs[lease.job_id]
        mine = self.holds(lease) and job.state == "started"
        assert self.queue.renew("w1", [lease]) == (set() if mine else {lease.job_id})

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        mine = self.holds(lease) and self.jobs[lease.job_id].state == "started"
        assert self.queue.release([lease]) == int(mine)
        if mine:
            self.jobs[lease.job_id].state = "queued"
            self.jobs[lease.job_id].lease = None

    @rule(lease=leases)
    def lose(self, lease: Lease) -> None:
        """The worker of a run dies, and somebody reaps."""
        job = self.jobs[lease.job_id]
        mine = self.holds(lease) and job.state == "started"
        member = f"{lease.job_id}:{lease.token}"
        assert self.redis.zadd(LEASES(MODEL), {member: 1}, xx=True, ch=True) == int(mine)
        reaped = self.queue.reap()
        if not mine:
            assert not reaped.requeued + reaped.failed
            return
        job.losses, job.lease = job.losses + 1, None
        job.state = "failed" if job.losses >= MAX_LOSSES else "queued"
        outcome = reaped.failed if job.state == "failed" else reaped.requeued
        assert outcome == (lease.job_id,)

    @rule(lease=consumes(leases))
    def cancel_started(self, lease: Lease) -> None:
        self.cancel(lease.job_id)

    @rule(place=st.integers(0, LIMIT - 1))
    def cancel_queued(self, place: int) -> None:
        waiting = self.waiting()
        if place < len(waiting):
            self.cancel(waiting[place])

    def cancel(self, job_id: str) -> None:
        job = self.jobs[job_id]
        live = job.state in ("queued", "started")
        expected = CancelOutcome.CANCELED if live else CancelOutcome.ALREADY_ENDED
        assert self.queue.cancel(job_id) is expected
        if live:
            job.state, job.lease = "canceled", None

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        if not hasattr(self, "jobs"):
            return
        assert self.members(READY(MODEL)) == self.waiting()
        mirror = texts(self.redis.lrange(QUEUE(MODEL), 0, -1))
        assert sorted(mirror) == sorted(self.waiting())
        held = {
            f"{i}:{j.lease.token}" for i, j in self.jobs.items() if j.state == "started" and j.lease
        }
        assert set(self.members(LEASES(MODEL))) == held
        assert set(self.members(WIP(MODEL))) == held
        for registry, state in ((FINISHED, "finished"), (FAILED, "failed"), (CANCELED, "canceled")):
            ended = {job_id for job_id, job in self.jobs.items() if job.state == state}
            assert set(self.members(registry(MODEL))) == ended
        for job_id, job in self.jobs.items():
            assert texts(self.redis.hmget(JOB(job_id), "status")) == [job.state]

    @invariant()
    def every_channel_holds_each_token_once_and_at_most_one_end(self) -> None:
        for job_id, job in getattr(self, "jobs", {}).items():
            events = read_events(self.redis, job_id)
            assert delivered_tokens(self.redis, job_id) == tuple(job.tokens)
            ids = [tuple(map(int, event_id.split("-"))) for event_id, _ in events]
            assert ids == sorted(set(ids))
            ends = [event for _, event in events if isinstance(event, JobEnd)]
            if job.state in ("queued", "started"):
                assert ends == []
            else:
                assert [end.state for end in ends] == [job.state]
                assert events[-1][1] == ends[0]

    def members(self, key: str) -> list[str]:
        return texts(self.redis.zrange(key, 0, -1))


@pytest.mark.slow
def test_any_sequence_of_calls_keeps_the_promises(redis: Redis) -> None:
    machine = type("Machine", (QueueMachine,), {"redis": redis})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # a failure is short enough, and shrinking takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
