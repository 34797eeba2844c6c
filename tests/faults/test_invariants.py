"""The checker finds what it is there to find: each promise is broken once by hand."""

from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker import keys
from mixfleet_broker.event_codec import encode_chunk, encode_end
from mixfleet_broker.keys import CHANNEL, JOB, KEYS, LEASES, LOADS, READY
from mixfleet_broker.messages import (
    JobEnd,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from support.invariants import EMPTY_AT_REST, FOR_EVER, Expected, kind_of, violations
from support.queue_jobs import DONE, MODEL, chat_job, chunk

TEXT = "7 8 "


@pytest.fixture
def job_id(redis: Redis) -> str:
    """A job that has finished as it should."""
    queue, job = JobQueue(redis, MODEL), chat_job()
    queue.submit(job)
    [claimed] = queue.claim("w1", 1, new_job_id())
    assert queue.finish(claimed.lease, DONE, chunk(2, 7, 8))
    queue.reap()
    return job.job_id


def add_event(redis: Redis, job_id: str, num_tokens: int, kind: str, body: bytes) -> None:
    fields: Any = {"k": kind, "d": body}
    redis.xadd(CHANNEL(job_id), fields, id=f"9999999999999-{num_tokens}")


def test_nothing_is_wrong_with_a_job_that_has_finished(redis: Redis, job_id: str) -> None:
    assert violations(redis, MODEL, {job_id: Expected(text=TEXT)}) == []


BREAKS: dict[str, tuple[Callable[[Redis, str], object], str]] = {
    "a lost job": (lambda r, i: r.delete(JOB(i)), "is gone"),
    "another state": (lambda r, i: r.hset(JOB(i), "status", "started"), "is started"),
    "two ends": (lambda r, i: add_event(r, i, 2, "e", encode_end(DONE)), "2 ends"),
    "no end": (lambda r, i: r.xtrim(CHANNEL(i), maxlen=0), "0 ends"),
    "something after the end": (
        lambda r, i: add_event(r, i, 3, "t", encode_chunk(chunk(3, 9))),
        "last of all TokenChunk",
    ),
    "a gap": (lambda r, i: add_event(r, i, 5, "t", encode_chunk(chunk(5, 9))), "5 tokens after 2"),
    "a repeat": (
        lambda r, i: add_event(r, i, 2, "t", encode_chunk(chunk(2, 8))),
        "2 tokens after 2",
    ),
    "another end": (
        lambda r, i: add_event(r, i, 2, "e", encode_end(JobEnd(state="canceled"))),
        "its end says canceled",
    ),
    "a lease": (lambda r, i: r.zadd(LEASES(MODEL), {f"{i}:t": 1}), "leases:tiny is not empty"),
    "a place in the order": (lambda r, i: r.zadd(READY(MODEL), {i: 1}), "ready:tiny is not empty"),
    "a sum": (lambda r, _: r.hset(LOADS(MODEL), "tokens", 3), "loads:tiny is not empty"),
    "the wrong registry": (
        lambda r, i: r.zadd(keys.FAILED(MODEL), {i: 9e9}),
        "failed: lists ['",
    ),
    "no registry": (lambda r, _: r.delete(keys.FINISHED(MODEL)), "finished: lists [], lacks ['"),
    "a job for ever": (lambda r, i: r.persist(JOB(i)), "has no time to live"),
    "a channel for ever": (lambda r, i: r.persist(CHANNEL(i)), "has no time to live"),
    "a key of nobody": (lambda r, _: r.set("mixfleet:what", 1), "is no key of ours"),
    "another job": (lambda r, _: r.hset(JOB("x"), "status", "queued"), "2 keys of the kind job"),
    "a reader": (lambda r, i: r.set(keys.READER(i), 1, ex=9), "1 keys of the kind reader"),
}


@pytest.mark.parametrize(("breaks", "line"), BREAKS.values(), ids=BREAKS)
def test_each_broken_promise_is_found(
    breaks: Callable[[Redis, str], object], line: str, redis: Redis, job_id: str
) -> None:
    breaks(redis, job_id)
    found = violations(redis, MODEL, {job_id: Expected(text=TEXT)})
    assert any(line in one for one in found), found


def test_another_answer_is_found(redis: Redis, job_id: str) -> None:
    [line] = violations(redis, MODEL, {job_id: Expected(text="9 ")})
    assert "its answer is '7 8 ', undisturbed it is '9 '" in line


def test_another_reason_is_found(redis: Redis) -> None:
    queue, job = JobQueue(redis, MODEL), chat_job()
    queue.submit(job)
    [claimed] = queue.claim("w1", 1, new_job_id())
    queue.finish(claimed.lease, JobEnd(state="failed", code="engine_failed", message="boom"))
    expected = Expected(text=TEXT, states=frozenset({"failed"}), code="worker_lost")
    [line] = violations(redis, MODEL, {job.job_id: expected})
    assert "failed with engine_failed, not with worker_lost: boom" in line


def test_every_kind_of_key_is_known_by_its_name() -> None:
    for key in KEYS:
        assert kind_of(key(*["a-name"] * key.num_fields)) is key
    assert kind_of("mixfleet:what") is None
    assert kind_of("{p}:rq:queues", prefix="{p}:") is keys.QUEUES


def test_what_may_stay_for_ever_is_what_the_table_of_keys_says() -> None:
    says_so = ("for ever", "a member", "as the operator", "until `mixfleet", "until its key")
    assert {key.name for key in FOR_EVER} == {
        key.name for key in KEYS if key.lifetime.startswith(says_so)
    }
    assert not set(FOR_EVER) & set(EMPTY_AT_REST)
