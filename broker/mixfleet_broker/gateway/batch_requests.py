"""The lines of a batch's file: read piece by piece, checked as the live routes check their bodies.

However large a file is, there is one piece and one line of it in memory at a time.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.gateway.answer import Choice
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error, error_of_values
from mixfleet_broker.gateway.completion_schema import CompletionBody
from mixfleet_broker.gateway.openai_chat import ChatReply, chat_jobs
from mixfleet_broker.gateway.openai_completions import CompletionReply, completion_jobs
from mixfleet_broker.gateway.openai_schema import Body, ChatBody, unsupported
from mixfleet_broker.messages import ChatJob

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
PIECE_BYTES: Final = 64 << 10
"""Small, so that whoever reads a large file lets others have their turns."""
MAX_CUSTOM_ID: Final = 512


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank."""

    place: int
    """From 0, blank lines counted."""
    text: bytes
    """Without its end; empty if it is too long."""
    num_bytes: int


class RequestLine(Body):
    """A line as OpenAI's batches have it."""

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_CUSTOM_ID)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A good line: its jobs, and what makes an answer of their ends."""

    custom_id: str
    jobs: list[ChatJob]
    whole: Callable[[list[Choice]], dict[str, Any]]


class LineError(Exception):
    """A line cannot be served; the others can.

    Args:
        custom_id: Of the line, if it has one.
        error: As a live route would answer it.
    """

    def __init__(self, custom_id: str | None, error: ApiError) -> None:
        super().__init__(error.message)
        self.custom_id = custom_id
        self.error = error


async def read_lines(
    read: Callable[[int, int], Awaitable[bytes]], max_bytes: int
) -> AsyncIterator[Line]:
    """Iterate over the lines of a file that are not blank.

    Args:
        read: Returns so many bytes from a place on, none at the end.
        max_bytes: Of a line; the text of a longer one is not kept.
    """
    begin, place, num_bytes, held = 0, 0, 0, bytearray()
    while piece := await read(begin, PIECE_BYTES):
        begin += len(piece)
        parts = piece.split(b"\n")
        for index, part in enumerate(parts):
            num_bytes += len(part)
            if num_bytes <= max_bytes:
                held += part
            else:
                held.clear()
            if index == len(parts) - 1:
                break  # its end is in the next piece
            if num_bytes > max_bytes or held.strip():
                yield Line(place, bytes(held), num_bytes)
            place, num_bytes, held = place + 1, 0, bytearray()
    if num_bytes > max_bytes or held.strip():
        yield Line(place, bytes(held), num_bytes)


def read_value(line: Line, max_bytes: int) -> tuple[str | None, Any]:
    """Return a line's JSON, and its custom id if it has one of the right form.

    Raises:
        LineError: It is too long, or no JSON object.
    """
    if line.num_bytes > max_bytes:
        text = f"line {line.place + 1} has {line.num_bytes} bytes, the limit is {max_bytes}"
        details = {"limit": max_bytes}
        raise LineError(None, ApiError(413, text, code="body_too_large", details=details))
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise LineError(None, _invalid(line, f"is no JSON: {error}")) from None
    if not isinstance(value, dict):
        raise LineError(None, _invalid(line, "is no JSON object"))
    custom_id = value.get("custom_id")
    is_good = isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_CUSTOM_ID
    return (custom_id if is_good else None), value


def read_request(line: Line, max_bytes: int, endpoint: str, batch_id: str) -> LineRequest:
    """Return what a line asks for. Its jobs have the same ids whoever reads it.

    Raises:
        LineError: It cannot be served.
    """
    custom_id, value = read_value(line, max_bytes)
    try:
        request = RequestLine.model_validate(value)
        if request.url != endpoint:
            text = f"url: {request.url[:80]!r}, and the batch's endpoint is {endpoint}"
            raise ApiError(400, text, code="mismatched_endpoint", param="url")
        seed = f"{batch_id}\0{line.place}"
        make = _chat if endpoint == CHAT else _completion
        return make(request, seed)
    except ValidationError as error:
        raise LineError(custom_id, error_of_values(error.errors())) from None
    except ApiError as error:
        raise LineError(custom_id, error) from None
    except MixfleetError as error:
        raise LineError(custom_id, as_api_error(error)) from None


def _chat(request: RequestLine, seed: str) -> LineRequest:
    body = ChatBody.model_validate(request.body)
    _check_not_streamed(body.stream)
    jobs = chat_jobs(body, _job_ids(seed, body.n or 1))
    return LineRequest(request.custom_id, jobs, ChatReply(body, jobs).whole)


def _completion(request: RequestLine, seed: str) -> LineRequest:
    body = CompletionBody.model_validate(request.body)
    body.check()
    _check_not_streamed(body.stream)
    jobs = completion_jobs(body, _job_ids(seed, body.num_choices()))
    return LineRequest(request.custom_id, jobs, CompletionReply(body, jobs).whole)


def _check_not_streamed(stream: bool) -> None:
    if stream:
        raise unsupported("stream", "a line of a batch is answered whole; leave it out")


def _job_ids(seed: str, number: int) -> list[str]:
    # Nobody can guess them: a batch's id is random.
    return [sha256(f"{seed}\0{index}".encode()).hexdigest()[:32] for index in range(number)]


def _invalid(line: Line, text: str) -> ApiError:
    return ApiError(400, f"line {line.place + 1} {text}", code="invalid_json_line")
