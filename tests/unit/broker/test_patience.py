"""Patience with a Redis that is away. No server here."""

import copy
import logging
import ssl
import threading
import time
from collections.abc import Callable

import pytest
from redis.exceptions import AuthenticationError, BusyLoadingError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.patience import PatientRetry
from mixfleet_broker.redis_errors import NotReadyError

URL = "redis://:hunter2@queue.example:6379/0"


class Flaky:
    """Fails a number of times, then answers; counts the calls and the disconnects."""

    def __init__(self, num_failures: int, error: Exception | None = None) -> None:
        self.num_failures = num_failures
        self.error = error or RedisConnectionError("refused")
        self.num_calls = 0
        self.num_disconnects = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error
        return "PONG"

    def disconnect(self, error: Exception) -> None:
        assert error is self.error
        self.num_disconnects += 1


def retry(patience_s: float | None = 0.2, stop: threading.Event | None = None) -> PatientRetry:
    return PatientRetry(URL, patience_s=patience_s, stop=stop)


def elapsed_s(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_an_answer_is_returned_at_once() -> None:
    flaky = Flaky(0)
    assert retry().call_with_retry(flaky, flaky.disconnect) == "PONG"
    assert (flaky.num_calls, flaky.num_disconnects) == (1, 0)


@pytest.mark.parametrize(
    "error",
    [
        RedisConnectionError("refused"),
        RedisTimeoutError("silent"),
        TimeoutError("silent"),
        BusyLoadingError("loading"),
    ],
)
def test_a_failure_of_the_connection_is_repeated_after_a_disconnect(error: Exception) -> None:
    flaky = Flaky(2, error)
    assert retry().call_with_retry(flaky, flaky.disconnect) == "PONG"
    assert (flaky.num_calls, flaky.num_disconnects) == (3, 2)


def test_an_error_that_redis_answers_is_not_repeated() -> None:
    flaky = Flaky(1, ResponseError("WRONGTYPE"))
    with pytest.raises(ResponseError):
        retry().call_with_retry(flaky, flaky.disconnect)
    assert flaky.num_calls == 1


def test_an_error_that_the_caller_calls_final_is_not_repeated() -> None:
    flaky = Flaky(1)
    with pytest.raises(RedisConnectionError):
        retry().call_with_retry(flaky, flaky.disconnect, is_retryable=lambda _: False)
    assert flaky.num_calls == 1


def test_the_disconnect_hears_the_number_of_failures_when_redis_py_asks_for_it() -> None:
    counts: list[int] = []
    flaky = Flaky(3)

    def fail(error: Exception, failures: int) -> None:
        assert error is flaky.error
        counts.append(failures)

    retry().call_with_retry(flaky, fail, with_failure_count=True)
    assert counts == [1, 2, 3]


def test_patience_ends_in_an_error_that_names_the_server_and_the_fix_but_no_password() -> None:
    flaky = Flaky(1_000_000)
    with pytest.raises(BrokerUnavailableError) as caught:
        retry(patience_s=0.05).call_with_retry(flaky, flaky.disconnect)
    text = str(caught.value)
    assert "no Redis answers at redis://:***@queue.example:6379/0 (refused)" in text
    assert "mixfleet up" in text
    assert "--redis" in text
    assert "hunter2" not in text
    assert caught.value.retryable


def test_patience_lasts_as_long_as_it_was_set() -> None:
    def give_up() -> None:
        flaky = Flaky(1_000_000)
        with pytest.raises(BrokerUnavailableError):
            retry(patience_s=0.2).call_with_retry(flaky, flaky.disconnect)
        assert flaky.num_calls > 3

    assert 0.2 <= elapsed_s(give_up) < 0.9


def test_patience_counts_from_the_first_failure_not_from_a_long_block_before_it() -> None:
    calls: list[float] = []

    def blocked_for_long_then_cut() -> str:
        calls.append(time.monotonic())
        if len(calls) == 1:
            time.sleep(0.1)  # stands for XREAD BLOCK
            raise RedisConnectionError("cut")
        return "events"

    result = retry(patience_s=0.05).call_with_retry(blocked_for_long_then_cut, lambda _: None)
    assert result == "events"


def test_without_a_limit_it_waits_for_as_long_as_it_takes() -> None:
    flaky = Flaky(4)
    assert retry(patience_s=None).call_with_retry(flaky, flaky.disconnect) == "PONG"
    assert flaky.num_calls == 5


def test_a_stop_event_ends_a_wait_without_a_limit() -> None:
    stop = threading.Event()
    flaky = Flaky(1_000_000)

    def stop_at_the_third(error: Exception) -> None:
        flaky.disconnect(error)
        if flaky.num_calls == 3:
            stop.set()

    with pytest.raises(BrokerUnavailableError):
        retry(patience_s=None, stop=stop).call_with_retry(flaky, stop_at_the_third)
    assert flaky.num_calls == 3


def test_copies_for_other_connections_hear_the_same_stop_event() -> None:
    stop = threading.Event()
    original = retry(patience_s=None, stop=stop)
    duplicate = copy.deepcopy(original)
    stop.set()
    flaky = Flaky(1_000_000)
    with pytest.raises(BrokerUnavailableError):
        duplicate.call_with_retry(flaky, flaky.disconnect)
    assert flaky.num_calls == 1


def test_refused_credentials_are_an_error_at_once_however_patient() -> None:
    flaky = Flaky(1_000_000, AuthenticationError("WRONGPASS"))
    with pytest.raises(BrokerUnavailableError, match="refuses the user name or password"):
        retry(patience_s=None).call_with_retry(flaky, flaky.disconnect)
    assert flaky.num_calls == 1


def test_a_retry_inside_a_retry_leaves_all_waiting_to_the_outer_one() -> None:
    patient = retry(patience_s=0.2)
    inner = Flaky(1_000_000)
    outer = Flaky(0)

    def command() -> str:
        outer.num_calls += 1
        return patient.call_with_retry(inner, inner.disconnect)

    def give_up() -> None:
        with pytest.raises(BrokerUnavailableError):
            patient.call_with_retry(command, lambda _: None)

    assert 0.2 <= elapsed_s(give_up) < 0.9
    assert inner.num_calls == inner.num_disconnects == outer.num_calls > 1
    # And it is whole again for the next command of this thread.
    flaky = Flaky(1)
    assert patient.call_with_retry(flaky, flaky.disconnect) == "PONG"


def test_what_redis_py_raises_when_told_of_a_failure_does_not_end_the_waiting() -> None:
    flaky = Flaky(2)

    def raise_it(error: Exception) -> None:  # redis-py before 5.1
        raise error

    assert retry().call_with_retry(flaky, raise_it) == "PONG"


def test_pauses_grow_to_a_limit_and_no_two_clients_keep_step() -> None:
    first, second = (pauses_of(RecordingEvent()) for _ in range(2))
    assert first != second
    assert all(0.02 <= pause <= 2.0 for pause in first)
    assert min(first[8:]) >= 1.0 > max(first[:5])


def pauses_of(stop: "RecordingEvent") -> list[float]:
    flaky = Flaky(12)
    retry(patience_s=None, stop=stop).call_with_retry(flaky, flaky.disconnect)
    return stop.pauses


class RecordingEvent(threading.Event):
    """Never set; what it was to wait for is written down, not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        return False


def test_a_server_that_cannot_serve_now_is_waited_for_and_then_named_as_such() -> None:
    flaky = Flaky(2, NotReadyError("READONLY"))
    assert retry().call_with_retry(flaky, flaky.disconnect) == "PONG"
    flaky = Flaky(1_000_000, NotReadyError("You can't write against a read only replica."))
    with pytest.raises(BrokerUnavailableError, match="answers, but cannot serve now: You can't"):
        retry(patience_s=0.05).call_with_retry(flaky, flaky.disconnect)


def test_a_wrong_certificate_is_an_error_at_once_however_patient() -> None:
    flaky = Flaky(1_000_000, RedisConnectionError("handshake"))
    flaky.error.__context__ = ssl.SSLCertVerificationError(1, "certificate verify failed")
    flaky.error.__context__.verify_message = "self-signed certificate"
    with pytest.raises(BrokerUnavailableError, match=r"self-signed certificate.*ssl_ca_certs"):
        retry(patience_s=None).call_with_retry(flaky, flaky.disconnect)
    assert flaky.num_calls == 1


@pytest.mark.slow
def test_a_long_wait_is_logged_with_its_end_and_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flaky = Flaky(7)
    with caplog.at_level(logging.INFO):
        retry(patience_s=None).call_with_retry(flaky, flaky.disconnect)
    (away, back) = caplog.messages
    assert away.startswith("redis_unavailable url=redis://:***@queue.example:6379/0 waited_s=")
    assert back == "redis_is_back url=redis://:***@queue.example:6379/0 failures=7"
