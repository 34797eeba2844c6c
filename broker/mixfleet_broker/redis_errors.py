"""redis-py's errors in our words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mixfleet_broker.errors import BrokerError, BrokerFullError, BrokerUnavailableError

_PASSING: Final = frozenset(
    {
        "LOADING",  # it reads its data after a start
        "MASTERDOWN",  # a replica that has lost its primary
        "READONLY",  # a replica, perhaps the primary of a moment ago
        "NOREPLICAS",  # fewer replicas are connected than min-replicas-to-write
        "UNBLOCKED",  # it became a replica while a command was blocked
        "BUSY",  # a script has been running for seconds
    }
)
"""Replies of a server that cannot serve now and may soon, itself or another in its place."""


class NotReadyError(RedisConnectionError):
    """The server answers, but cannot serve now: waited for like one that does not answer."""


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn what redis-py raises inside the block into a :class:`BrokerError`.

    Raises:
        BrokerUnavailableError: No Redis answers.
        BrokerFullError: Redis is out of memory.
        BrokerError: Redis answered with another error, such as a key of a wrong type.
    """
    try:
        yield
    except RedisError as error:
        raise_ours(error)


def raise_ours(error: Exception) -> NoReturn:
    """Raise our error for one of redis-py's, which a pipeline may also return as a value."""
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        raise BrokerUnavailableError(f"no Redis answers: {error}") from error
    if is_out_of_memory(error):
        raise BrokerFullError(f"Redis is out of memory: {error}") from error
    raise BrokerError(f"Redis refuses: {error}") from error


def is_out_of_memory(error: object) -> bool:
    """Whether a reply says that the server's ``maxmemory`` is reached."""
    # By the text: redis-py before 5.1 has no class for it, and later ones take "OOM" off the text.
    # Inside a script the text of the refused command is wrapped in another error.
    is_refusal = isinstance(error, ResponseError)
    return is_refusal and any(sign in str(error) for sign in ("OOM ", "> 'maxmemory'"))


def is_passing(error: ResponseError) -> bool:
    """Whether a reply says that the server cannot serve now, and may soon."""
    if isinstance(error, MasterDownError | ReadOnlyError):
        return True
    text = str(error)
    # A server before version 7 wraps the reply to a command of a script in another error.
    return text.partition(" ")[0] in _PASSING or any(f" -{code} " in text for code in _PASSING)
