"""Every error that mixfleet raises is answered, with a status and the numbers that it carries."""

from collections.abc import Iterator

import pytest

from mixfleet_broker import errors
from mixfleet_broker.errors import MixfleetError, error_from_end
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error, error_of_end
from mixfleet_broker.messages import JobEnd, Usage

STATUS: dict[str, int] = {
    "ConfigError": 500,
    "MissingExtraError": 500,
    "MessageError": 400,
    "BrokerUnavailableError": 503,
    "BrokerFullError": 503,
    "NotDurableError": 503,
    "QueueFullError": 503,
    "TenantQueueFullError": 429,
    "DeadlineUnreachableError": 503,
    "JobConflictError": 409,
    "NoWorkerError": 503,
    "InquiriesFullError": 503,
    "InquiryTimeoutError": 504,
    "UnknownJobError": 404,
    "UnknownWorkerError": 404,
    "UnknownModelError": 404,
    "UnknownKeyError": 500,
    "RateLimitedError": 429,
    "RequestOverLimitError": 429,
    "BrokerError": 500,
    "JobError": 500,
    "JobRejectedError": 400,
    "InvalidRequestError": 400,
    "InvalidMessagesError": 400,
    "PromptTooLongError": 400,
    "JobFailedError": 500,
    "DeadlineExceededError": 504,
    "EngineFailedError": 500,
    "WorkerLostError": 500,
    "JobCancelledError": 409,
    "StreamTimeoutError": 504,
    "MixfleetError": 500,
}
NUMBERS = {
    "depth": 9,
    "limit": 8,
    "unit": "jobs",
    "tenant": "t",
    "name": "requests",
    "load": 7,
    "eta_s": 1.5,
    "within_s": 1.0,
    "retry_after_s": None,
}


def classes(base: type[MixfleetError] = MixfleetError) -> Iterator[type[MixfleetError]]:
    yield base
    for kind in base.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from classes(kind)


def one_of(kind: type[MixfleetError]) -> MixfleetError:
    """Return an error of a class with all numbers, whatever its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("what went wrong",)
    for name, value in NUMBERS.items():
        if name != "name" or issubclass(kind, errors.RateLimitedError):
            setattr(error, name, value)
    return error


@pytest.mark.parametrize("kind", dict.fromkeys(classes()))
def test_each_class_of_errors_has_its_answer(kind: type[MixfleetError]) -> None:
    answer = as_api_error(one_of(kind))
    assert answer.status == STATUS[kind.__name__]
    assert answer.code
    body = answer.openai_body()["error"]
    assert body["message"] == "what went wrong"
    assert set(body) - {"details"} == {"message", "type", "param", "code"}
    # What can succeed later says when; what cannot says that too.
    assert ("retry-after" in answer.headers()) == answer.retryable
    assert ("x-should-retry" in answer.headers()) != answer.retryable


def test_the_numbers_of_a_full_queue_are_in_the_body() -> None:
    error = errors.QueueFullError(model="m", depth=5, limit=4, unit="tokens", retry_after_s=2.0004)
    answer = as_api_error(error)
    assert answer.openai_body()["error"]["details"] == {"unit": "tokens", "depth": 5, "limit": 4}
    headers = answer.headers()
    # Rounded up: who comes too early is refused again.
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2001")


@pytest.mark.parametrize(("given_s", "shown"), [(None, "1"), (0.001, "1"), (1e9, "120")])
def test_a_wait_is_never_zero_nor_longer_than_clients_obey(
    given_s: float | None, shown: str
) -> None:
    error = errors.QueueFullError(model="m", depth=5, limit=4, retry_after_s=given_s)
    assert as_api_error(error).headers()["retry-after"] == shown


def test_a_refusal_for_good_has_no_time_to_come_back() -> None:
    headers = ApiError(400, "no", retry_after_s=5.0).with_headers({"x-a": "b"}).headers()
    assert headers == {"x-a": "b", "x-should-retry": "false"}
    assert ApiError(401, "who?").headers()["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("code", ["worker_lost", "engine_failed", "prompt_too_long", "unheard_of"])
def test_the_end_of_a_failed_job_is_answered_as_its_error(code: str) -> None:
    end = JobEnd(state="failed", code=code, message="why")
    answer = error_of_end(end, "j1")
    assert answer is not None
    assert answer.status == as_api_error(error_from_end(end, job_id="j1")).status
    assert "why" in answer.message


def test_a_job_that_ended_well_is_no_error() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    assert error_of_end(JobEnd(state="finished", finish_reason="stop", usage=usage), "j1") is None
    cancelled = error_of_end(JobEnd(state="canceled", message="gone"), "j1")
    assert cancelled is not None
    assert cancelled.status == 409
