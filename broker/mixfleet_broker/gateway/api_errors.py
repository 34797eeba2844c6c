"""What a request that cannot be served is answered with: one error, dressed by each dialect.

Every error of mixfleet has an HTTP status here. The numbers that it carries (depth, limit, prompt
and context length) travel in the body beside the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from mixfleet_broker import errors
from mixfleet_broker.errors import MixfleetError, error_from_end
from mixfleet_broker.messages import JobEnd

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
OVERLOADED: Final = "overloaded_error"

MAX_RETRY_AFTER_S: Final = 120.0
"""The longest that OpenAI's client obeys."""


class ApiError(Exception):
    """A request is answered with an error.

    Args:
        status: Of HTTP.
        message: For the user; names the field and the fix.
        kind: OpenAI's ``type``.
        code: Stable name; also OpenAI's ``code``.
        param: The field of the body, where one is to blame.
        details: Numbers for programs.
        retry_after_s: When the same request can succeed; None: that is not known.
        retryable: Whether the same request can succeed later without being changed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s
        self.retryable = retryable
        self._more_headers: dict[str, str] = {}

    def with_headers(self, headers: Mapping[str, str]) -> Self:
        """Return this error, with more headers for its answer."""
        self._more_headers.update(headers)
        return self

    def headers(self) -> dict[str, str]:
        """Return what tells clients when to come back, or that it is of no use."""
        headers = dict(self._more_headers)
        if not self.retryable:
            headers["x-should-retry"] = "false"
        if self.retryable and self.retry_after_s is not None:
            seconds = min(self.retry_after_s, MAX_RETRY_AFTER_S)
            # Whole seconds rounded up: whoever obeys must not come too early.
            headers["retry-after"] = str(int(-(-seconds // 1)))
            headers["retry-after-ms"] = str(int(-(-seconds * 1000 // 1)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def openai_body(self) -> dict[str, Any]:
        """Return the body as OpenAI's clients read it."""
        body: dict[str, Any] = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        if self.details:
            body["details"] = self.details
        return {"error": body}


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one class of errors is answered."""

    status: int
    kind: str
    retryable: bool = False
    code: str | None = None
    """Where the outside knows the error by another name than our own."""
    numbers: tuple[str, ...] = field(default=())
    """Attributes of the error for the body."""


_QUEUE: Final = ("unit", "depth", "limit")

# The first class that fits decides, so the narrow ones stand first.
_ANSWERS: Final[tuple[tuple[type[MixfleetError], _Answer], ...]] = (
    (errors.PromptTooLongError, _Answer(400, INVALID, code="context_length_exceeded")),
    (errors.JobRejectedError, _Answer(400, INVALID)),
    (errors.MessageError, _Answer(400, INVALID)),
    (errors.UnknownModelError, _Answer(404, INVALID, code="model_not_found")),
    (errors.UnknownJobError, _Answer(404, INVALID)),
    (errors.UnknownWorkerError, _Answer(404, INVALID)),
    (errors.JobConflictError, _Answer(409, INVALID)),
    (errors.JobCancelledError, _Answer(409, INVALID)),
    (
        errors.RequestOverLimitError,
        _Answer(429, "rate_limit_error", numbers=("name", "limit", "load")),
    ),
    (
        errors.RateLimitedError,
        _Answer(429, "rate_limit_error", retryable=True, numbers=("name", "limit", "load")),
    ),
    (
        errors.TenantQueueFullError,
        _Answer(429, "rate_limit_error", retryable=True, numbers=(*_QUEUE, "tenant")),
    ),
    (errors.QueueFullError, _Answer(503, OVERLOADED, retryable=True, numbers=_QUEUE)),
    (
        errors.DeadlineUnreachableError,
        _Answer(503, OVERLOADED, numbers=("eta_s", "within_s")),
    ),
    (errors.NoWorkerError, _Answer(503, OVERLOADED, retryable=True)),
    (errors.InquiriesFullError, _Answer(503, OVERLOADED, retryable=True)),
    (errors.InquiryTimeoutError, _Answer(504, SERVER, retryable=True)),
    (errors.BrokerUnavailableError, _Answer(503, OVERLOADED, retryable=True)),
    (errors.BrokerFullError, _Answer(503, OVERLOADED, retryable=True)),
    (errors.NotDurableError, _Answer(503, OVERLOADED, retryable=True)),
    (errors.DeadlineExceededError, _Answer(504, SERVER)),
    (errors.StreamTimeoutError, _Answer(504, SERVER)),
    (errors.JobError, _Answer(500, SERVER, retryable=True)),
    (errors.MixfleetError, _Answer(500, SERVER)),
)
_NO_CLUE_S: Final = 1.0
"""When to come back where nobody knows better."""


def as_api_error(error: MixfleetError) -> ApiError:
    """Return how an error of ours is answered."""
    answer = next(answer for kind, answer in _ANSWERS if isinstance(error, kind))
    retry_after_s = getattr(error, "retry_after_s", None)
    return ApiError(
        answer.status,
        str(error),
        kind=answer.kind,
        code=answer.code or error.code,
        details={name: getattr(error, name) for name in answer.numbers},
        retry_after_s=_NO_CLUE_S if retry_after_s is None else retry_after_s,
        retryable=answer.retryable,
    )


def error_of_end(end: JobEnd, job_id: str) -> ApiError | None:
    """Return how a job that ended without an answer is answered; None if it is complete."""
    if end.state == "finished":
        return None
    return as_api_error(error_from_end(end, job_id=job_id))


def error_of_values(errors: Sequence[Any]) -> ApiError:
    """Return how a body with values of a wrong form is answered: what pydantic found in it."""
    first = errors[0]
    param = ".".join(map(str, first["loc"])) or None
    text = first["msg"]
    if first["type"] == "extra_forbidden":
        text = "this parameter is not known here"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = f"{param}: " if param else ""
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    return ApiError(400, f"{where}{text}{more}", code=code, param=param)
