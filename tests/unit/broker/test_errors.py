import re

import pytest

from mixfleet_broker import errors
from mixfleet_broker.errors import (
    EngineFailedError,
    InvalidMessagesError,
    InvalidRequestError,
    JobCancelledError,
    JobError,
    JobFailedError,
    JobRejectedError,
    MissingExtraError,
    MixfleetError,
    PromptTooLongError,
    QueueFullError,
    StreamTimeoutError,
    TenantQueueFullError,
    WorkerLostError,
    error_from_end,
)
from mixfleet_broker.messages import (
    JobEnd,
)


def classes() -> dict[str, type[MixfleetError]]:
    return {
        name: item
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, MixfleetError)
    }


def drawn_tree() -> dict[str, str]:
    """Each class of the drawing in the docstring, with its parent."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)(\w+Error)\b", line)
        if found is None:
            continue
        depth, name = len(found[1]), found[2]
        path = [(d, n) for d, n in path if d < depth]
        if path:
            parents[name] = path[-1][1]
        path.append((depth, name))
    return parents


def test_the_tree_is_as_drawn() -> None:
    built = {name: item.__base__.__name__ for name, item in classes().items() if item.__base__}
    del built["MixfleetError"]
    assert built == drawn_tree()


def test_every_error_of_a_job_or_the_broker_has_a_code_of_its_own() -> None:
    # A message that is not of the schema is, on the wire, a request that is invalid.
    codes = [item.code for name, item in classes().items() if name != "MessageError"]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("rejected", JobRejectedError),
        ("invalid_request", InvalidRequestError),
        ("invalid_messages", InvalidMessagesError),
        ("prompt_too_long", PromptTooLongError),
        ("engine_failed", EngineFailedError),
        ("worker_lost", WorkerLostError),
        ("failed", JobFailedError),
    ],
)
def test_the_code_of_a_failed_end_names_the_error(code: str, kind: type[JobError]) -> None:
    error = error_from_end(JobEnd(state="failed", code=code, message="why"), job_id="job1")
    assert type(error) is kind
    assert (str(error), error.code, error.job_id) == ("why", code, "job1")


def test_a_code_from_a_newer_version_is_a_failure_that_keeps_it() -> None:
    error = error_from_end(JobEnd(state="failed", code="meteorite"))
    assert type(error) is JobFailedError
    assert error.code == "meteorite"
    assert "meteorite" in str(error)


def test_a_cancelled_end_is_a_cancelled_error() -> None:
    error = error_from_end(JobEnd(state="canceled"), job_id="job1")
    assert type(error) is JobCancelledError
    assert error.code == "canceled"


def test_a_finished_end_is_no_error() -> None:
    with pytest.raises(ValueError, match="finished"):
        error_from_end(JobEnd(state="finished", finish_reason="stop"))


def test_what_may_be_tried_again_says_so() -> None:
    retryable = {name for name, item in classes().items() if item.retryable}
    assert retryable == {
        "BrokerUnavailableError",
        "BrokerFullError",
        "InquiriesFullError",
        "InquiryTimeoutError",
        "NoWorkerError",
        "NotDurableError",
        "QueueFullError",
        "RateLimitedError",
        "StreamTimeoutError",
        "TenantQueueFullError",
    }


def test_errors_carry_their_numbers() -> None:
    full = QueueFullError(model="tiny", depth=10, limit=10)
    assert (full.depth, full.limit) == (10, 10)
    assert str(full) == "the queue of tiny is full: 10 jobs wait, the limit is 10"
    share = TenantQueueFullError(
        model="tiny", tenant="t", depth=7, limit=5, unit="tokens", retry_after_s=2.0
    )
    assert (share.tenant, share.unit, share.depth, share.limit) == ("t", "tokens", 7, 5)
    assert str(share) == (
        "7 tokens of t wait in the queue of tiny, the limit is 5; try again in 2 s"
    )
    late = StreamTimeoutError(job_id="job1", what="token", limit_s=2.5)
    assert str(late) == "job job1: no token within 2.5 s"
    assert (late.job_id, late.limit_s) == ("job1", 2.5)


def test_a_missing_extra_says_how_to_install_it() -> None:
    error = MissingExtraError(what="a worker", extra="worker")
    assert "pip install 'mixfleet[worker]'" in str(error)
