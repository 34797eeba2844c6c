"""How long a command waits for a Redis that is away, and what it will not wait for."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Self, TypeVar

from redis.backoff import EqualJitterBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.redis_errors import NotReadyError
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.tls import tls_refusal

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_BASE_S: Final = 0.02
_BACKOFF_CAP_S: Final = 2.0
_FAILURES_BEFORE_WARNING: Final = 6
"""About a second of trying: a restart of Redis on the same machine goes unmentioned."""
_FAILURES_BETWEEN_WARNINGS: Final = 20
HOW_TO_GET_ONE: Final = "start one with `mixfleet up`, or name another with --redis URL"


class PatientRetry(Retry):
    """Repeats a command until Redis answers or patience ends, backing off with jitter.

    The time counts from the first failure, so a command may block before it. redis-py nests
    retries (a command reconnects, a new connection checks its health): the outermost does all
    the waiting, and a failure inside goes straight to it, so that time and pauses are counted
    once. The end is an error that redis-py does not know.
    """

    def __init__(
        self, url: str, *, patience_s: float | None, stop: threading.Event | None = None
    ) -> None:
        backoff = EqualJitterBackoff(cap=_BACKOFF_CAP_S, base=_BACKOFF_BASE_S)
        super().__init__(backoff, -1, (RedisConnectionError, RedisTimeoutError, TimeoutError))
        self._safe_url = safe_redis_url(url)
        self._patience_s = patience_s
        self._stop = stop or threading.Event()
        self._thread = threading.local()

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
            BrokerUnavailableError: Patience is at its end, the stop event is set, or there is
                nothing to wait for: a wrong password or certificate.
        """
        is_outermost = not getattr(self._thread, "is_inside", False)
        failures, first_failure = 0, 0.0
        while True:
            self._thread.is_inside = True
            try:
                result = do()
            except self._supported_errors as error:
                if is_retryable and not is_retryable(error):
                    raise
                failures += 1
                if failures == 1:
                    first_failure = time.monotonic()
                self._tell(fail, error, failures if with_failure_count else None)
                if not is_outermost:
                    raise
                self._pause(error, failures, time.monotonic() - first_failure)
            else:
                if failures >= _FAILURES_BEFORE_WARNING:
                    logger.info("redis_is_back url=%s failures=%d", self._safe_url, failures)
                return result
            finally:
                self._thread.is_inside = not is_outermost

    def _tell(self, fail: Callable[..., object], error: Exception, failures: int | None) -> None:
        # redis-py before version 5.1 raises what it is told; whether to raise is decided here.
        with suppress(*self._supported_errors):
            fail(error) if failures is None else fail(error, failures)

    def _pause(self, error: Exception, failures: int, waited_s: float) -> None:
        """Sleep before the next try, or raise because there is to be none."""
        refusal = refused_for_good(error)
        if refusal is not None:
            raise BrokerUnavailableError(f"Redis at {self._safe_url}: {refusal}") from error
        if self._stop.is_set():
            raise self._unavailable(error) from error
        pause_s = self._backoff.compute(failures)
        if self._patience_s is not None:
            if waited_s >= self._patience_s:
                raise self._unavailable(error) from error
            pause_s = min(pause_s, self._patience_s - waited_s)
        if failures % _FAILURES_BETWEEN_WARNINGS == _FAILURES_BEFORE_WARNING:
            logger.warning(
                "redis_unavailable url=%s waited_s=%.1f error=%s", self._safe_url, waited_s, error
            )
        self._stop.wait(pause_s)

    def _unavailable(self, error: Exception) -> BrokerUnavailableError:
        if isinstance(error, NotReadyError | BusyLoadingError):
            return BrokerUnavailableError(
                f"Redis at {self._safe_url} answers, but cannot serve now: {error}"
            )
        return BrokerUnavailableError(
            f"no Redis answers at {self._safe_url} ({error}): {HOW_TO_GET_ONE}"
        )


def refused_for_good(error: BaseException) -> str | None:
    """Return why no further try can help, in words; None if one may."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return f"it refuses the user name or password: {error}"
    return tls_refusal(error)
