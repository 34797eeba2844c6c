"""OpenAI's ``/v1/batches``, and batches in one call: ``/v1/chat/completions/batch``."""

import re
from typing import Annotated, Final, Literal
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from mixfleet_broker.batch_store import Batch, BatchStore, NewBatch
from mixfleet_broker.file_store import FilesFull
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.batch_requests import CHAT, COMPLETIONS
from mixfleet_broker.gateway.batch_runner import BatchRunner
from mixfleet_broker.gateway.batch_shapes import batch_value, page_value
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.files import find_own as find_own_file
from mixfleet_broker.gateway.files import keep_file, no_room
from mixfleet_broker.gateway.openai_schema import Body
from mixfleet_broker.gateway.service import IDEMPOTENCY_KEY, Service, job_ids

router = APIRouter(prefix="/v1", tags=["openai"])

WINDOW: Final = "24h"
"""The only one that OpenAI has."""
_WINDOW: Final = re.compile(r"([1-9]\d{0,6})([smhd])")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_S: Final = 2_592_000


class ExpiresAfter(Body):
    """How long results are to be kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchBody(Body):
    """``POST /v1/batches``."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: str = WINDOW
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/batches")
async def create(request: Request, body: BatchBody) -> Response:
    """Run the requests of a file, in the background and behind all others."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    _window_s(body.completion_window)
    await find_own_file(service, caller, body.input_file_id)
    return JSONResponse(batch_value(await _opened(request, caller, body)))


@router.post("/chat/completions/batch")
async def create_of_chats(request: Request, completion_window: str = WINDOW) -> Response:
    """Run the chats of a body in OpenAI's batch form, one JSON object a line."""
    return await _create_at_once(request, CHAT, completion_window)


@router.post("/completions/batch")
async def create_of_completions(request: Request, completion_window: str = WINDOW) -> Response:
    """Run the completions of a body in OpenAI's batch form, one JSON object a line."""
    return await _create_at_once(request, COMPLETIONS, completion_window)


@router.get("/batches")
async def list_batches(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List the caller's batches, the latest first."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    batches = await service.fleet.call(_store(service).own, caller.tenant)
    found = [(batch.batch_id, batch_value(batch)) for batch in batches]
    return JSONResponse(page_value(found, after, limit))


@router.get("/batches/{asked}")
async def retrieve(request: Request, asked: str) -> Response:
    """Return a batch as it is now."""
    _, batch = await _own(request, asked)
    return JSONResponse(batch_value(batch))


@router.post("/batches/{asked}/cancel")
async def cancel(request: Request, asked: str) -> Response:
    """End a batch: what waits is not run, what runs is cancelled, what is done stays.

    One that has ended stays as it is.
    """
    service, batch = await _own(request, asked)
    await service.fleet.call(_store(service).move, batch.batch_id, "", "cancelling")
    return JSONResponse(batch_value(await _found(service, batch.batch_id)))


async def _create_at_once(request: Request, endpoint: str, window: str) -> Response:
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    _window_s(window)
    kept_s = service.settings.batch_ttl_s
    file = await keep_file(service, caller, request.stream(), "batch.jsonl", kept_s)
    body = BatchBody.model_validate(
        {"input_file_id": file.file_id, "endpoint": endpoint, "completion_window": window}
    )
    return JSONResponse(batch_value(await _opened(request, caller, body)))


async def _opened(request: Request, caller: Caller, body: BatchBody) -> Batch:
    service: Service = request.app.state.service
    settings, kept = service.settings, body.output_expires_after
    batch = NewBatch(
        batch_id=_batch_id(request, caller),
        tenant=caller.tenant,
        key_id=caller.record.key_id if caller.record is not None else "",
        endpoint=body.endpoint,
        input_file=body.input_file_id,
        window=body.completion_window,
        window_s=_window_s(body.completion_window),
        ttl_s=settings.batch_ttl_s if kept is None else kept.seconds,
        in_flight=settings.batch_in_flight,
        metadata=body.metadata or {},
    )
    outcome = await service.fleet.call(_store(service).open, batch)
    if isinstance(outcome, FilesFull):
        raise no_room(outcome)
    if outcome == "no_file":
        text = f"the file {body.input_file_id} was deleted, or has expired"
        raise ApiError(404, text, code="file_not_found", param="input_file_id")
    runner: BatchRunner = request.app.state.batches
    runner.wake()
    return await _found(service, batch.batch_id)


def _batch_id(request: Request, caller: Caller) -> str:
    """Return a new id, or that of the request's idempotency key."""
    if IDEMPOTENCY_KEY not in request.headers:
        return f"batch_{uuid4().hex}"
    return f"batch_{job_ids(request, caller, 1)[0]}"


def _window_s(window: str) -> float:
    """Return a window in seconds.

    Raises:
        ApiError: It is none.
    """
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
    if not 1 <= seconds <= _MAX_WINDOW_S:
        raise ApiError(
            400,
            f"completion_window: {window[:40]!r}, must be a time such as 24h, 90m or 7d, "
            "at most 30d",
            code="invalid_value",
            param="completion_window",
        )
    return seconds


async def _own(request: Request, asked: str) -> tuple[Service, Batch]:
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    batch = await service.fleet.call(_store(service).find, asked)
    if batch is None or not caller.owns(batch.tenant):
        raise _nowhere(asked)
    return service, batch


async def _found(service: Service, batch_id: str) -> Batch:
    batch = await service.fleet.call(_store(service).find, batch_id)
    if batch is None:
        raise _nowhere(batch_id)
    return batch


def _nowhere(asked: str) -> ApiError:
    text = f"no batch {asked[:80]!r}: it never existed, or is too old"
    return ApiError(404, text, code="batch_not_found", param="batch_id")


def _store(service: Service) -> BatchStore:
    return BatchStore(service.fleet.redis, prefix=service.fleet.prefix)
