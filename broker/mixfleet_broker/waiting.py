"""Waiting for the first element of some lists."""

from collections.abc import Sequence
from typing import cast

from redis import Redis

from mixfleet_broker.redis_errors import redis_errors

_SHORTEST_S = 0.01
"""To Redis 0 is for ever, and so is a millisecond to an old one."""


def wait_for_one(redis: Redis, keys: Sequence[str], timeout_s: float) -> tuple[bytes, bytes] | None:
    """Return list and element that came first, popped; None when nothing came in time."""
    with redis_errors():
        found = redis.blpop(list(keys), timeout=max(timeout_s, _SHORTEST_S))
    return None if found is None else cast("tuple[bytes, bytes]", tuple(found))
