"""API keys for tests."""

from typing import Any

from redis import Redis

from mixfleet_broker.key_records import KeyRecord, Limits
from mixfleet_broker.keys import JOB

SECRET = "mf-" + "x" * 43
"""Of the right form, and of no key."""


def key_record(**limits: int) -> KeyRecord:
    """A key as it is read, with some limits."""
    terms = Limits(**limits)
    return KeyRecord(key_id="k_test", name="test", tenant="t", created_at=0.0, limits=terms)


def put_job(redis: Redis, job_id: str, status: str) -> None:
    """Let a job be in Redis, as far as limits look at it."""
    redis.hset(JOB(job_id), "status", status)


def everything(redis: Redis) -> str:
    """All names and values on a server, as text in which a secret can be searched."""
    found: list[Any] = []
    readers: dict[bytes, Any] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"set": redis.smembers,
        b"zset": lambda name: redis.zrange(name, 0, -1),
        b"list": lambda name: redis.lrange(name, 0, -1),
        b"stream": redis.xrange,
    }
    for name in redis.scan_iter():
        kind: Any = redis.type(name)
        found.append((name, readers[kind](name)))
    return repr(found)
