"""Files, batches and their results as OpenAI's clients read them."""

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeVar

from mixfleet_broker.batch_store import Batch, Result
from mixfleet_broker.file_store import StoredFile
from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.api_errors import ApiError

T = TypeVar("T")
Unfinished = Literal["cancelled", "expired"]

_UNFINISHED: Final[dict[Unfinished, str]] = {
    "cancelled": "the batch was cancelled before this request was answered",
    "expired": "the batch's completion window was over before this request was answered",
}
_TIMES: Final = (
    *("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),
)


def file_value(file: StoredFile) -> dict[str, Any]:
    """Return a file as it is now."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_value(batch: Batch) -> dict[str, Any]:
    """Return a batch as it is now. Its output file grows meanwhile."""
    used, answered = batch.prompt_tokens, batch.completion_tokens
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file if batch.failed else None,
        "created_at": batch.times["created"],
        "expires_at": batch.times["expires"],
        **{f"{status}_at": batch.times.get(status) for status in _TIMES},
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "usage": {
            "input_tokens": used,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used + answered,
        },
        "metadata": batch.metadata or None,
    }


def page_value(found: Sequence[tuple[str, dict[str, Any]]], after: str | None, limit: int) -> Any:
    """Return a page of a list.

    Args:
        found: All of them, by id, in the order of the list.
        after: The id after which the page begins.
        limit: Most of the page.

    Raises:
        ApiError: There is nothing with that id.
    """
    begin = 0
    if after is not None:
        ids = [one for one, _ in found]
        if after not in ids:
            raise ApiError(400, f"after: no {after[:80]!r}", code="invalid_value", param="after")
        begin = ids.index(after) + 1
    page = found[begin : begin + limit]
    return {
        "object": "list",
        "data": [value for _, value in page],
        "first_id": page[0][0] if page else None,
        "last_id": page[-1][0] if page else None,
        "has_more": begin + limit < len(found),
    }


def answered(batch_id: str, place: int, custom_id: str, body: dict[str, Any]) -> Result:
    """Return the result of a line that was answered."""
    usage = body["usage"]
    response = {"status_code": 200, "request_id": _request_id(batch_id, place), "body": body}
    return Result(
        place=place,
        is_error=False,
        line=_line(batch_id, place, custom_id, response, None),
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def refused(batch_id: str, place: int, custom_id: str | None, error: ApiError) -> Result:
    """Return the result of a line that a live route would have answered with an error."""
    response = {
        "status_code": error.status,
        "request_id": _request_id(batch_id, place),
        "body": error.openai_body(),
    }
    return Result(
        place=place, is_error=True, line=_line(batch_id, place, custom_id, response, None)
    )


def unfinished(batch_id: str, place: int, custom_id: str | None, why: Unfinished) -> Result:
    """Return the result of a line that nobody waits for any more."""
    error = {"code": f"batch_{why}", "message": _UNFINISHED[why]}
    return Result(place=place, is_error=True, line=_line(batch_id, place, custom_id, None, error))


def _request_id(batch_id: str, place: int) -> str:
    return f"req_{batch_id.removeprefix('batch_')}_{place + 1}"


def _line(batch_id: str, place: int, custom_id: str | None, response: Any, error: Any) -> bytes:
    value = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{place + 1}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return f"{sse.dumps(value)}\n".encode(errors="backslashreplace")
