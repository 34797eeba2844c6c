"""The worker's session with a real Redis, and the fake of it, which must behave alike."""

from collections.abc import Iterator
from typing import Protocol

import pytest
from redis import Redis

from mixfleet_broker.channel import delivered_tokens
from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.job_codec import (
    decode_job as decode,
)
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    new_job_id,
)
from mixfleet_broker.queue import ClaimedJob, JobQueue, Lease
from mixfleet_broker.registry import Registration, WorkerRecord, workers
from mixfleet_broker.terms import QueueRules
from mixfleet_broker.write_outcome import Behind, WriteOutcome
from mixfleet_worker.handoff import EndWrite, JobTimes
from mixfleet_worker.session import Activity, QueueSession, Session
from support.fake_session import FakeBroker, chunk_write
from support.worker_jobs import MODEL, a_payload
from support.worker_process import until

LEASE_S = 15.0


class Broker(Protocol):
    """What both sides of the comparison offer a test."""

    def push(self, job_id: str) -> None: ...

    def session(self, worker_id: str = ...) -> Session: ...

    def tokens(self, job_id: str) -> tuple[int, ...]: ...

    def cancel(self, job_id: str) -> object: ...


class RealBroker:
    """The queue in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._queue = JobQueue(redis, MODEL, QueueRules(lease_s=LEASE_S))

    def push(self, job_id: str) -> None:
        self._queue.submit(decode(a_payload(job_id)))

    def session(self, worker_id: str = "w1") -> Session:
        record = WorkerRecord.of_this_process(
            worker_id=worker_id, model=MODEL, max_batch_size=4, context_length=64, started_at=0.0
        )
        registration = Registration(self._redis, record, lease_s=LEASE_S)
        return QueueSession(queue=self._queue, registration=registration)

    def tokens(self, job_id: str) -> tuple[int, ...]:
        return delivered_tokens(self._redis, job_id)

    def cancel(self, job_id: str) -> object:
        return self._queue.cancel(job_id)


class PretendedBroker(FakeBroker):
    def tokens(self, job_id: str) -> tuple[int, ...]:
        return self.jobs[job_id].token_ids


@pytest.fixture(params=["real", "fake"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "fake":
        yield PretendedBroker()
    else:
        yield RealBroker(request.getfixturevalue("redis"))


def claim_one(broker: Broker, session: Session) -> ClaimedJob:
    broker.push(new_job_id())
    (job,) = session.claim(1, new_job_id(), idle=True)
    return job


def an_end(lease: Lease, num_tokens: int) -> EndWrite:
    return EndWrite(
        lease=lease,
        end=JobEnd(state="finished", finish_reason="stop"),
        chunk=TokenChunk(num_tokens=num_tokens, text="x", token_ids=(num_tokens,)),
        times=JobTimes(claimed_at=0.0, ended_at=1.0),
    )


def test_a_repeated_claim_gives_the_same_jobs(broker: Broker) -> None:
    session = broker.session()
    for _ in range(3):
        broker.push(new_job_id())
    token = new_job_id()
    jobs = session.claim(2, token, idle=True)
    assert len(jobs) == 2
    assert session.claim(2, token, idle=True) == jobs
    assert len(session.claim(2, new_job_id(), idle=True)) == 1


def test_a_flush_writes_and_counts_who_waits(broker: Broker) -> None:
    session = broker.session()
    lease = claim_one(broker, session).lease
    broker.push(new_job_id())
    flushed = session.flush([chunk_write(lease, 1)])
    assert flushed.outcomes == (WriteOutcome.DONE,)
    assert flushed.num_queued == 1
    assert broker.tokens(lease.job_id) == (1,)
    assert session.flush([]).num_queued == 1


def test_a_repeated_chunk_is_done(broker: Broker) -> None:
    session = broker.session()
    lease = claim_one(broker, session).lease
    session.flush([chunk_write(lease, 1)])
    assert session.flush([chunk_write(lease, 1)]).outcomes == (WriteOutcome.DONE,)
    assert broker.tokens(lease.job_id) == (1,)


def test_what_does_not_follow_is_behind_and_the_lease_is_still_ours(broker: Broker) -> None:
    session = broker.session()
    lease, other = (claim_one(broker, session).lease for _ in range(2))
    session.flush([chunk_write(lease, 1)])
    assert session.flush([chunk_write(lease, 3), an_end(other, 2)]).outcomes == (
        Behind(1),
        Behind(0),
    )
    assert session.renew([lease, other]) == set()
    assert (broker.tokens(lease.job_id), broker.tokens(other.job_id)) == ((1,), ())


def test_a_repeated_end_is_done(broker: Broker) -> None:
    session = broker.session()
    lease = claim_one(broker, session).lease
    for _ in range(2):
        assert session.flush([an_end(lease, 1)]).outcomes == (WriteOutcome.DONE,)
    assert session.renew([lease]) == {lease.job_id}


def test_a_cancelled_job_takes_neither_chunk_nor_end(broker: Broker) -> None:
    session = broker.session()
    lease = claim_one(broker, session).lease
    broker.cancel(lease.job_id)
    assert session.flush([chunk_write(lease, 1)]).outcomes == (WriteOutcome.LOST,)
    assert session.flush([an_end(lease, 1)]).outcomes == (WriteOutcome.LOST,)
    assert session.renew([lease]) == {lease.job_id}
    assert broker.tokens(lease.job_id) == ()


def test_a_released_job_goes_on_elsewhere_after_its_tokens(broker: Broker) -> None:
    first, second = broker.session("w1"), broker.session("w2")
    lease = claim_one(broker, first).lease
    first.flush([chunk_write(lease, 1)])
    first.flush([chunk_write(lease, 2)])
    assert first.release([lease]) == 1
    assert first.release([lease]) == 0
    (job,) = second.claim(5, new_job_id(), idle=True)
    assert (job.num_delivered, job.attempt, job.num_losses) == (2, 2, 0)
    assert second.delivered_tokens(lease.job_id) == (1, 2)
    assert job.lease.run > lease.run
    assert first.flush([chunk_write(lease, 3)]).outcomes == (WriteOutcome.LOST,)
    assert second.flush([chunk_write(job.lease, 3)]).outcomes == (WriteOutcome.DONE,)
    assert broker.tokens(lease.job_id) == (1, 2, 3)


def test_the_bell_rings_while_jobs_wait(broker: Broker) -> None:
    session = broker.session()
    broker.push(new_job_id())
    assert session.wait_for_jobs(1.0) is not None


def test_the_bell_is_silent_without_jobs(broker: Broker) -> None:
    assert broker.session().wait_for_jobs(0.05) is None


def test_the_public_record_comes_changes_and_goes(redis: Redis) -> None:
    session = RealBroker(redis).session("w7")

    def shown() -> list[tuple[str, str, int]]:
        return [(record.worker_id, record.state, record.in_flight) for record in workers(redis)]

    session.beat(Activity(in_flight=0, draining=False))
    assert shown() == [("w7", "idle", 0)]
    session.beat(Activity(in_flight=3, draining=False))
    assert shown() == [("w7", "busy", 3)]
    session.beat(Activity(in_flight=1, draining=True))
    assert shown() == [("w7", "draining", 1)]
    session.sign_off()
    assert shown() == []


def test_the_jobs_of_a_dead_worker_are_reaped(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL, QueueRules(lease_s=0.001))
    queue.submit(decode(a_payload(new_job_id())))
    queue.claim("dead", 1, new_job_id())
    session = RealBroker(redis).session()

    def is_back() -> bool:
        session.reap()
        return queue.depth() == 1

    until(is_back, "the job is back in the queue")


def test_the_fake_can_be_down() -> None:
    broker = FakeBroker()
    broker.is_down = True
    with pytest.raises(BrokerUnavailableError):
        broker.session().renew([])
