"""Errors as Anthropic's clients read them."""

from typing import Any, Final

from mixfleet_broker.gateway.api_errors import ApiError

PATH: Final = "/v1/messages"
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's clients."""
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the body, which is also the data of the event that ends a stream."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    body: dict[str, Any] = {"type": _TYPES.get(error.status, other), "message": error.message}
    if error.details:
        body["details"] = error.details
    return {"type": "error", "error": body, "request_id": request_id}
