"""How much must have happened to a job before its submit returns.

A reply of Redis says that the job is in its memory and, unless the disk is busy, in the operating
system's file of the append-only log. What a crash on a busy disk, a power cut or a failover may
still take is the last seconds. Who cannot bear that waits for the disk (Redis 7.2: WAITAOF) or for
a replica (WAIT).
"""

from typing import Any

from redis import Redis

from mixfleet_broker.errors import NotDurableError
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.terms import QueueRules


def confirm(redis: Redis, rules: QueueRules, job_id: str) -> None:
    """Wait until what was written so far is where ``rules.durability`` wants it.

    WAIT is for what the server had written at the last command of the same connection, and a pool
    may have given it another one than the submit's: hence the PING.

    Raises:
        NotDurableError: It is not there in time.
    """
    if rules.durability == "server":
        return
    wait_ms = round(rules.durability_s * 1000)
    with redis_errors(), redis.pipeline(transaction=False) as pipeline:
        pipeline.ping()
        if rules.durability == "fsync":
            pipeline.waitaof(1, 0, wait_ms)
        else:
            pipeline.wait(1, wait_ms)
        replies: list[Any] = pipeline.execute()
    confirmed = replies[1][0] if rules.durability == "fsync" else replies[1]
    if confirmed < 1:
        raise NotDurableError(
            job_id=job_id, durability=rules.durability, waited_s=rules.durability_s
        )
