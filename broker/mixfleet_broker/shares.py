"""How large a tenant's share of the fleet is, beside others': 1 unless an operator said so."""

import math
from typing import Final, cast

from redis import Redis

from mixfleet_broker.errors import MessageError
from mixfleet_broker.keys import (
    WEIGHTS,
)
from mixfleet_broker.names import (
    check_tenant,
)
from mixfleet_broker.redis_errors import redis_errors

MIN_SHARE: Final = 0.001
MAX_SHARE: Final = 1000.0


def set_share(redis: Redis, tenant: str, share: float, *, prefix: str = "") -> None:
    """Give a tenant a share; jobs that wait already keep their places.

    Raises:
        MessageError: The share is not from ``MIN_SHARE`` to ``MAX_SHARE``.
    """
    if not (math.isfinite(share) and MIN_SHARE <= share <= MAX_SHARE):
        raise MessageError(f"share={share:g}: must be from {MIN_SHARE:g} to {MAX_SHARE:g}")
    with redis_errors():
        if share == 1.0:
            redis.hdel(WEIGHTS(prefix=prefix), check_tenant(tenant))
        else:
            redis.hset(WEIGHTS(prefix=prefix), check_tenant(tenant), str(share))


def shares(redis: Redis, *, prefix: str = "") -> dict[str, float]:
    """Return the shares that are not 1, by tenant."""
    with redis_errors():
        found = cast("dict[bytes, bytes]", redis.hgetall(WEIGHTS(prefix=prefix)))
    return {name.decode(): float(value) for name, value in sorted(found.items())}
