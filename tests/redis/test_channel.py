"""Reading and writing a job's channel."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.channel import (
    MAX_EVENTS_PER_READ,
    delivered_tokens,
    ended,
    read_events,
)
from mixfleet_broker.errors import BrokerUnavailableError, MessageError
from mixfleet_broker.event_codec import TOKENS, encode_chunk
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.messages import (
    TokenChunk,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.write_outcome import WriteOutcome
from support.queue_jobs import (
    DONE,
    MODEL,
    append_chunk,
    chat_job,
    chunk,
    claim_one,
    submit_and_claim,
)


@pytest.fixture(params=[2, 3])
def reader(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Redis]:
    """A client in each of Redis's two protocols."""
    with Redis.from_url(redis_url, protocol=request.param) as client:
        yield client


def test_a_reader_gets_everything_in_order_from_any_point(reader: Redis) -> None:
    queue = JobQueue(reader, MODEL)
    lease = submit_and_claim(queue).lease
    for n in range(1, 6):
        append_chunk(queue, lease, chunk(n, n))
    queue.finish(lease, DONE)
    events = read_events(reader, lease.job_id)
    assert [event for _, event in events][1:] == [*(chunk(n, n) for n in range(1, 6)), DONE]
    for i, (event_id, _) in enumerate(events):
        assert read_events(reader, lease.job_id, after=event_id) == events[i + 1 :]
    assert read_events(reader, lease.job_id) == events  # reading takes nothing away


def test_a_long_answer_is_read_in_parts(reader: Redis) -> None:
    queue = JobQueue(reader, MODEL)
    lease = submit_and_claim(queue).lease
    for n in range(1, MAX_EVENTS_PER_READ + 10):
        append_chunk(queue, lease, chunk(n, n))
    first = read_events(reader, lease.job_id)
    assert len(first) == MAX_EVENTS_PER_READ
    rest = read_events(reader, lease.job_id, after=first[-1][0])
    assert [event for _, event in rest] == [chunk(n, n) for n in range(512, 522)]


def test_a_reader_waits_for_a_job_that_nobody_has_taken(reader: Redis) -> None:
    queue = JobQueue(reader, MODEL)
    job = chat_job()
    queue.submit(job)
    assert read_events(reader, job.job_id) == []
    assert read_events(reader, job.job_id, block_s=0.02) == []
    events = []
    thread = threading.Thread(
        target=lambda: events.extend(read_events(reader, job.job_id, block_s=5.0))
    )
    thread.start()
    lease = claim_one(queue).lease
    thread.join(timeout=5.0)
    assert [event_id for event_id, _ in events] == [f"{lease.run}-0"]


@pytest.mark.parametrize("after", ["", "$", "5", "-", "1-2-3", "1-x", "9" * 16 + "-0"])
def test_a_point_that_is_none_is_refused(redis: Redis, after: str) -> None:
    with pytest.raises(MessageError, match="must be an event id"):
        read_events(redis, "job1", after=after)


def test_a_retried_chunk_is_said_once(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    for one in (chunk(1, 11), chunk(1, 11), chunk(2, 12), chunk(1, 11)):
        assert append_chunk(queue, lease, one) is WriteOutcome.DONE
    assert delivered_tokens(redis, lease.job_id) == (11, 12)


def test_nothing_is_appended_where_there_is_no_channel(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    redis.delete(CHANNEL(lease.job_id))
    assert append_chunk(queue, lease, chunk(1, 11)) is WriteOutcome.LOST
    assert not redis.exists(CHANNEL(lease.job_id))


def test_an_answer_with_a_hole_is_not_taken_for_whole(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    append_chunk(queue, lease, chunk(1, 11))
    planted: dict[Any, Any] = {"k": TOKENS, "d": encode_chunk(chunk(3, 13))}
    redis.xadd(CHANNEL(lease.job_id), planted, id=f"{lease.run}-3")
    with pytest.raises(MessageError, match="1 tokens after 1 make 3"):
        delivered_tokens(redis, lease.job_id)


def test_a_channel_without_an_end_has_not_ended(redis: Redis) -> None:
    assert ended(redis, "nobody") is None
    assert delivered_tokens(redis, "nobody") == ()
    lease = submit_and_claim(JobQueue(redis, MODEL)).lease
    assert ended(redis, lease.job_id) is None


@pytest.mark.parametrize(
    "fields", [{"k": "t"}, {"d": "x"}, {"k": "t", "d": "x"}, {"k": "q", "d": "\x80"}, {"a": "b"}]
)
def test_a_planted_event_is_a_message_error(redis: Redis, fields: dict[str, str]) -> None:
    planted: dict[Any, Any] = {**fields}
    redis.xadd(CHANNEL("job1"), planted, id="5-1")
    with pytest.raises(MessageError):
        read_events(redis, "job1")


def test_all_of_unicode_passes(redis: Redis) -> None:
    queue = JobQueue(redis, MODEL)
    lease = submit_and_claim(queue).lease
    said = TokenChunk(num_tokens=2, text="né\u4e2d\U0001f680\x00", token_ids=(1, 2))
    append_chunk(queue, lease, said)
    assert read_events(redis, lease.job_id)[-1][1] == said


def test_a_reader_without_a_server_hears_so(no_redis: Redis) -> None:
    for call in (read_events, delivered_tokens, ended):
        with pytest.raises(BrokerUnavailableError):
            call(no_redis, "job1")
