"""Random sequences of calls against a slow and obvious model of the queue."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from mixfleet_broker.channel import delivered_tokens, read_events
from mixfleet_broker.errors import QueueFullError, TenantQueueFullError
from mixfleet_broker.flush import Flush
from mixfleet_broker.keys import (
    AGEING,
    CANCELED,
    DEADLINES,
    FAILED,
    FINISHED,
    JOB,
    LEASES,
    LOADS,
    QUARANTINE,
    QUEUE,
    READY,
    SUSPECTS,
    WAITING,
    WEIGHTS,
    WIP,
)
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    Usage,
)
from mixfleet_broker.queue import CancelOutcome, ClaimedJob, JobQueue, Lease
from mixfleet_broker.terms import PRIORITIES, JobTerms, QueueRules
from mixfleet_broker.write_outcome import WriteOutcome
from support.plain_queue import COST, PlainQueue
from support.plain_queue import WEIGHTS as SHARES
from support.queue_jobs import MODEL, chat_job, texts

MAX_LOSSES = 2
LIMIT = 6
TENANT_LIMIT = 4
DONE = JobEnd(
    state="finished",
    finish_reason="length",
    usage=Usage(prompt_tokens=1, completion_tokens=10),
)
"""As was expected, so that every job costs the same."""
TENANTS = st.sampled_from(sorted(SHARES))
WORKERS = st.sampled_from(["w1", "w2"])


class QueueMachine(RuleBasedStateMachine):
    """Two workers, each of which may be a zombie, two tenants, and operators."""

    leases: Bundle[Lease] = Bundle("leases")
    redis: Redis

    @initialize()
    def start(self) -> None:
        self.redis.flushall()
        self.redis.hset(WEIGHTS(), mapping={name: str(share) for name, share in SHARES.items()})
        rules = QueueRules(
            queue_limit=LIMIT, tenant_queue_limit=TENANT_LIMIT, max_losses=MAX_LOSSES
        )
        self.queue = JobQueue(self.redis, MODEL, rules)
        self.plain = PlainQueue(MAX_LOSSES)
        self.num_claims = 0
        self.next_token = 0

    def token(self) -> int:
        self.next_token += 1
        return self.next_token

    @rule(tenant=TENANTS, priority=st.sampled_from(PRIORITIES), has_deadline=st.booleans())
    def submit(self, tenant: str, priority: Any, has_deadline: bool) -> None:
        job = chat_job(max_tokens=10)
        within = 1000.0 if has_deadline else None
        terms = JobTerms(tenant=tenant, priority=priority, start_within_s=within)
        if self.plain.num_waiting() >= LIMIT:
            with pytest.raises(QueueFullError):
                self.queue.submit(job, terms)
            return
        if self.plain.num_waiting(tenant) >= TENANT_LIMIT:
            with pytest.raises(TenantQueueFullError):
                self.queue.submit(job, terms)
            return
        self.plain.submit(job.job_id, tenant, terms.job_class)
        self.plain.jobs[job.job_id].expires_while_queued = has_deadline
        expected = self.plain.ready().index(job.job_id)
        assert self.queue.submit(job, terms) == expected
        assert self.queue.submit(job, terms) == expected

    @rule(
        target=leases,
        worker_id=WORKERS,
        max_jobs=st.integers(1, 3),
        repeats=st.integers(1, 2),
        idle=st.booleans(),
    )
    def claim(self, worker_id: str, max_jobs: int, repeats: int, idle: bool) -> Any:
        expected = self.plain.claim(worker_id, max_jobs, idle=idle)
        self.num_claims += 1
        claimed: list[ClaimedJob] = []
        token = f"c{self.num_claims}"
        # A claim that gave nothing is not remembered: it may give what came since.
        for _ in range(repeats if expected else 1):
            claimed = self.queue.claim(worker_id, max_jobs, token, idle=idle)
            assert [c.lease.job_id for c in claimed] == expected
        for c in claimed:
            job = self.plain.jobs[c.lease.job_id]
            found = (c.num_delivered, c.num_losses, c.attempt, c.alone)
            assert found == (len(job.tokens), job.losses, job.attempts, job.is_suspect)
            job.lease, job.last_run = c.lease, c.lease.run
        return multiple(*(c.lease for c in claimed))

    @rule(lease=leases, num_new=st.integers(1, 2), ends=st.booleans(), repeats=st.integers(1, 2))
    def write(self, lease: Lease, num_new: int, ends: bool, repeats: int) -> None:
        """A step's write by a run that may have lost its job, sent once or twice."""
        job = self.plain.jobs[lease.job_id]
        new = [self.token() for _ in range(num_new)]
        chunk = TokenChunk(
            num_tokens=len(job.tokens) + num_new, text="x" * num_new, token_ids=tuple(new)
        )
        flush = Flush(self.queue)
        if ends:
            flush.finish(lease, DONE, chunk)
        else:
            flush.append(lease, chunk)
        live = self.plain.holds(lease)
        for _ in range(repeats):
            [outcome] = flush.send().outcomes
            if ends:
                # Also when this run had ended the job before: the end is not said again.
                assert (outcome is WriteOutcome.DONE) == (job.lease == lease)
            else:
                assert outcome is (WriteOutcome.DONE if live else WriteOutcome.LOST)
        if live:
            job.tokens += new
            if ends:
                job.state = "finished"

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        lost = set() if self.plain.holds(lease) else {lease.job_id}
        assert self.queue.renew("w1", [lease]) == lost

    @rule(lease=leases, isolates=st.booleans())
    def hand_back(self, lease: Lease, isolates: bool) -> None:
        mine = self.plain.holds(lease)
        hand_back = self.queue.isolate if isolates else self.queue.release
        assert hand_back([lease]) == int(mine)
        if mine:
            self.plain.put_back(lease.job_id, suspect=isolates)
            self.apart()

    @rule(lease=leases)
    def lose(self, lease: Lease) -> None:
        """The worker of a run dies, and somebody reaps."""
        mine = self.plain.holds(lease)
        member = f"{lease.job_id}:{lease.token}"
        assert self.redis.zadd(LEASES(MODEL), {member: 1}, xx=True, ch=True) == int(mine)
        reaped = self.queue.reap()
        if not mine:
            assert not reaped.requeued + reaped.failed
            return
        self.plain.lose(lease.job_id)
        has_failed = self.plain.jobs[lease.job_id].state == "failed"
        assert (reaped.failed if has_failed else reaped.requeued) == (lease.job_id,)
        self.apart()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.plain.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.plain.jobs)))
        job = self.plain.jobs[job_id]
        live = job.state in ("queued", "started")
        expected = CancelOutcome.CANCELED if live else CancelOutcome.ALREADY_ENDED
        assert self.queue.cancel(job_id) is expected
        if live:
            job.state, job.lease = "canceled", None

    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        failed = sorted(i for i, job in self.plain.jobs.items() if job.state == "failed")
        if failed:
            job_id = data.draw(st.sampled_from(failed))
            assert self.queue.requeue(job_id)
            assert not self.queue.requeue(job_id)
            self.plain.requeue(job_id)

    @rule(data=st.data())
    def grow_old(self, data: st.DataObject) -> None:
        """A job has waited for long."""
        lower = sorted(texts(self.redis.zrange(AGEING(MODEL), 0, -1)))
        if lower:
            job_id = data.draw(st.sampled_from(lower))
            self.redis.zadd(AGEING(MODEL), {job_id: 1})
            self.queue.reap()
            self.plain.move_up(job_id)

    @rule(data=st.data())
    def run_out_of_time(self, data: st.DataObject) -> None:
        """A job that was to start by now has not."""
        due = sorted(texts(self.redis.zrange(DEADLINES(MODEL), 0, -1)))
        if due:
            job_id = data.draw(st.sampled_from(due))
            self.redis.zadd(DEADLINES(MODEL), {job_id: 1})
            assert self.queue.reap().expired == (job_id,)
            job = self.plain.jobs[job_id]
            job.state, job.lease = "failed", None

    @rule()
    def quarantine_ends(self) -> None:
        self.redis.delete(QUARANTINE(MODEL))
        self.plain.quarantine = None

    def apart(self) -> None:
        """Let no two jobs become suspects in the same millisecond: their order would be by id."""
        for place, job_id in enumerate(self.plain.suspects()):
            self.redis.zadd(SUSPECTS(MODEL), {job_id: place}, xx=True)

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        if not hasattr(self, "plain"):
            return
        jobs = self.plain.jobs
        ready, suspects = self.plain.ready(), self.plain.suspects()
        assert self.members(READY(MODEL)) == ready
        assert self.members(SUSPECTS(MODEL)) == suspects
        mirror = texts(self.redis.lrange(QUEUE(MODEL), 0, -1))
        assert sorted(mirror) == sorted(ready + suspects)
        held = {f"{i}:{j.lease.token}" for i, j in jobs.items() if j.state == "started" and j.lease}
        assert set(self.members(LEASES(MODEL))) == held
        assert set(self.members(WIP(MODEL))) == held
        for registry, state in ((FINISHED, "finished"), (FAILED, "failed"), (CANCELED, "canceled")):
            ended = {job_id for job_id, job in jobs.items() if job.state == state}
            assert set(self.members(registry(MODEL))) == ended
        for job_id, job in jobs.items():
            assert texts(self.redis.hmget(JOB(job_id), "status")) == [job.state]

    @invariant()
    def what_is_counted_as_waiting_is_what_waits(self) -> None:
        if not hasattr(self, "plain"):
            return
        waiting = {i: job for i, job in self.plain.jobs.items() if job.state == "queued"}
        assert set(texts(self.redis.hkeys(WAITING(MODEL)))) == set(waiting)
        loads: Any = self.redis.hgetall(LOADS(MODEL))
        expected = {"tokens": len(waiting) * COST, "answers": len(waiting) * 10}
        for tenant in SHARES:
            count = sum(job.tenant == tenant for job in waiting.values())
            expected |= {f"jobs:{tenant}": count, f"tokens:{tenant}": count * COST}
        found = {name.decode(): float(value) for name, value in loads.items()}
        assert found == {name: value for name, value in expected.items() if value}
        due = {i for i, job in waiting.items() if job.expires_while_queued and not job.attempts}
        assert set(self.members(DEADLINES(MODEL))) == due

    @invariant()
    def every_channel_holds_each_token_once_and_at_most_one_end(self) -> None:
        if not hasattr(self, "plain"):
            return
        for job_id, job in self.plain.jobs.items():
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
@pytest.mark.timeout(300)
def test_any_sequence_of_calls_keeps_the_promises(redis: Redis) -> None:
    machine = type("Machine", (QueueMachine,), {"redis": redis})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # a failure is short enough, and shrinking takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
