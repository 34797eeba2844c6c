"""Connections to Redis that live through restarts: patient for workers, quick to fail for clients.

All our writes may be repeated safely (scripts are idempotent, stream ids are explicit), so a
command whose reply was lost is simply sent again.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self, TypeVar

from redis import Redis
from redis.backoff import EqualJitterBackoff
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from mixfleet_broker.embedded import running_url
from mixfleet_broker.errors import BrokerUnavailableError, ConfigError
from mixfleet_broker.redis_url import checked_redis_url, safe_redis_url
from mixfleet_broker.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S: Final = 2.0
"""How long a client waits for a Redis that does not answer."""
MAX_BLOCK_S: Final = 5.0
"""Longest BLOCK of one command, unless :func:`connect` is told otherwise."""

_REPLY_S: Final = 5.0
"""Longest wait for a reply beyond what the command may block; less with less patience."""
_LEAST_REPLY_S: Final = 0.5
_CONNECT_S: Final = 2.0
_HEALTH_CHECK_S: Final = 15
_BACKOFF_BASE_S: Final = 0.02
_BACKOFF_CAP_S: Final = 2.0
_FAILURES_BEFORE_WARNING: Final = 6
"""About a second of trying: a restart of Redis on the same machine goes unmentioned."""
_FAILURES_BETWEEN_WARNINGS: Final = 20
_HOW_TO_GET_ONE: Final = "start one with `mixfleet up`, or name another with --redis URL"


class PatientRetry(Retry):
    """Repeats a command until Redis answers or patience ends, backing off with jitter.

    The time counts from the first failure, so a command may block before it. redis-py nests
    retries (a command reconnects, a new connection checks its health); the end is therefore an
    error that redis-py does not retry, and the innermost one ends them all.
    """

    def __init__(
        self, url: str, *, patience_s: float | None, stop: threading.Event | None = None
    ) -> None:
        backoff = EqualJitterBackoff(cap=_BACKOFF_CAP_S, base=_BACKOFF_BASE_S)
        super().__init__(backoff, -1, (RedisConnectionError, RedisTimeoutError, TimeoutError))
        self._safe_url = safe_redis_url(url)
        self._patience_s = patience_s
        self._stop = stop or threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # redis-py copies it for each connection; all of them must hear the one stop event.
        return self

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., object],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        """Return ``do()``; after each failure call ``fail`` (which disconnects) and try again.

        Raises:
            BrokerUnavailableError: Patience is at its end, the stop event is set, or Redis
                refuses the credentials.
        """
        failures, first_failure = 0, 0.0
        while True:
            try:
                result = do()
            except self._supported_errors as error:
                if is_retryable and not is_retryable(error):
                    raise
                failures += 1
                if failures == 1:
                    first_failure = time.monotonic()
                fail(error, failures) if with_failure_count else fail(error)
                self._pause(error, failures, time.monotonic() - first_failure)
            else:
                if failures >= _FAILURES_BEFORE_WARNING:
                    logger.info("redis_is_back url=%s failures=%d", self._safe_url, failures)
                return result

    def _pause(self, error: Exception, failures: int, waited_s: float) -> None:
        """Sleep before the next try, or raise because there is to be none."""
        if isinstance(error, AuthenticationError | AuthorizationError):
            raise BrokerUnavailableError(
                f"Redis at {self._safe_url} refuses the user name or password: {error}"
            ) from error
        if self._stop.is_set():
            raise self._unavailable(error) from error
        pause_s = self._backoff.compute(failures)
        if self._patience_s is not None:
            if waited_s >= self._patience_s:
                raise self._unavailable(error) from error
            pause_s = min(pause_s, self._patience_s - waited_s)
        if failures % _FAILURES_BETWEEN_WARNINGS == _FAILURES_BEFORE_WARNING:
            logger.warning(
                "redis_unavailable url=%s waited_s=%.1f error=%r", self._safe_url, waited_s, error
            )
        self._stop.wait(pause_s)

    def _unavailable(self, error: Exception) -> BrokerUnavailableError:
        return BrokerUnavailableError(
            f"no Redis answers at {self._safe_url} ({error}): {_HOW_TO_GET_ONE}"
        )


def connect(
    url: str,
    *,
    patience_s: float | None = PATIENCE_S,
    max_block_s: float = MAX_BLOCK_S,
    stop: threading.Event | None = None,
) -> Redis:
    """Return a client of the Redis at ``url`` that has answered once; replies are bytes.

    It may be used from several threads. Close it with ``close()`` or as a context manager.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``; its query may override what is set here.
        patience_s: How long each command waits for a Redis that is away, from the first
            failure; None waits for ever, as a worker does.
        max_block_s: Longest BLOCK of any command of this client. A connection that is silent for
            a little longer is taken for dead, so a smaller value finds a dead network sooner.
        stop: Once set, nothing waits any more: a command that fails raises at once.

    Raises:
        ConfigError: ``url`` is none of these.
        BrokerUnavailableError: Redis did not answer in time or refused the credentials. The
            client's commands raise it too, for the same reasons.
    """
    try:
        checked = checked_redis_url(url)
    except ValueError as error:
        raise ConfigError(f"redis={safe_redis_url(url)}: {error}") from None
    reply_s = _REPLY_S if patience_s is None else min(_REPLY_S, max(patience_s, _LEAST_REPLY_S))
    options: dict[str, Any] = {
        "retry": PatientRetry(checked, patience_s=patience_s, stop=stop),
        "socket_timeout": max_block_s + reply_s,
        "socket_connect_timeout": _CONNECT_S,
        "health_check_interval": _HEALTH_CHECK_S,
        "decode_responses": False,
        # Replies have the same shape with every redis-py from 5 to 8.
        "protocol": 2,
    }
    if not checked.startswith("unix://"):
        options["socket_keepalive"] = True
    # A server that hangs is found here without waiting for as long as a command may block.
    with Redis.from_url(checked, **options | {"socket_timeout": reply_s}) as first:
        first.ping()
    return Redis.from_url(checked, **options)


def find_redis_url(settings: Settings) -> str:
    """Return the URL of the Redis to use: as set, else the one that `mixfleet up` runs.

    Raises:
        BrokerUnavailableError: None is set and none runs for this data directory.
    """
    url = settings.redis or running_url(settings.data_dir)
    if url is None:
        raise BrokerUnavailableError(
            f"no Redis is set and none runs for {settings.data_dir}: {_HOW_TO_GET_ONE}"
        )
    return url
