"""OpenAI's ``/v1/responses`` over the queue: stored, in the background, resumable anywhere."""

import time
from contextlib import suppress
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Answer, or_leave
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.responses_items import InputItem, read_items, stored_items
from mixfleet_broker.gateway.responses_reading import (
    Followers,
    check_has_events,
    find_own,
    keep_left,
    read_to_end,
    response_now,
    stream_of_answer,
    stream_of_record,
)
from mixfleet_broker.gateway.responses_schema import ResponseBody
from mixfleet_broker.gateway.service import Service, job_ids
from mixfleet_broker.messages import ChatJob
from mixfleet_broker.responses_store import StoredResponse, create_response, delete_response

router = APIRouter(prefix="/v1/responses", tags=["openai"])

MAX_CHAIN: Final = 256
"""Responses that one may go on from, each from the one before."""
MAX_PAGE: Final = 100


@router.post("")
async def create(request: Request, body: ResponseBody) -> Response:
    """Answer, whole or as a stream of events, or in the background."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    body.check()
    before = await _items_before(service, caller, body.previous_response_id)
    job = body.job(job_ids(request, caller, 1)[0], before)
    record = StoredResponse(
        job_id=job.job_id,
        tenant=caller.tenant,
        created_at=int(time.time()),
        request=body.repeated(),
        items=stored_items(body.input, job.job_id),
    )
    record, answer = await _begin(request, caller, body, record, job)
    if body.background:
        followers: Followers = request.app.state.followers
        followers.follow(service, record, answer)
        if body.stream:
            return sse.EventStream(stream_of_record(service, record), answer.headers)
        return JSONResponse(await response_now(service, record), headers=answer.headers)
    if body.stream:
        return sse.EventStream(
            stream_of_answer(service, record, answer), answer.headers, answer.leave
        )
    try:
        reading = await or_leave(answer, read_to_end(service, record, answer), request.receive)
    except ApiError:
        await keep_left(service, record)
        raise
    reading.check_answered()
    return JSONResponse(reading.response(), headers=answer.headers)


@router.get("/{asked}")
async def retrieve(
    request: Request,
    asked: str,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Return a response as it is now, or its events after one."""
    service, record = await _own(request, asked)
    if not stream:
        return JSONResponse(await response_now(service, record))
    await check_has_events(service, record)
    after = -1 if starting_after is None else starting_after
    return sse.EventStream(stream_of_record(service, record, after))


@router.post("/{asked}/cancel")
async def cancel(request: Request, asked: str) -> Response:
    """End a response's job wherever it is; one that has ended stays as it is."""
    service, record = await _own(request, asked)
    if record.final is None:
        await service.fleet.cancel(record.job_id, record.model, "its client cancelled it")
    return JSONResponse(await response_now(service, record))


@router.delete("/{asked}")
async def delete(request: Request, asked: str) -> Response:
    """Forget a response; a job that nobody can ask for any more is cancelled."""
    service, record = await _own(request, asked)
    if record.final is None:
        await service.fleet.cancel(record.job_id, record.model, "its response was deleted")
    result_ttl = service.fleet.rules.result_ttl
    await service.fleet.with_redis(delete_response, record.job_id, result_ttl)
    return JSONResponse({"id": asked, "object": "response", "deleted": True})


@router.get("/{asked}/input_items")
async def input_items(
    request: Request,
    asked: str,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the request's own input, the latest first unless asked otherwise."""
    _, record = await _own(request, asked)
    items = record.items if order == "asc" else record.items[::-1]
    begin = 0
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            text = f"after: no item {after[:160]!r} in {asked}"
            raise ApiError(400, text, code="invalid_value", param="after")
        begin = places[0] + 1
    page = items[begin : begin + limit]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": begin + limit < len(items),
        }
    )


async def _begin(
    request: Request, caller: Caller, body: ResponseBody, record: StoredResponse, job: ChatJob
) -> tuple[StoredResponse, Answer]:
    """Write the record and queue the job, in this order; a refused one leaves no record."""
    service: Service = request.app.state.service
    is_new = False
    if body.is_stored:
        ttl_s = service.settings.response_ttl_s
        record, is_new = await service.fleet.with_redis(create_response, record, ttl_s)
    try:
        answer = await service.begin(
            request,
            caller,
            [job],
            streams=bool(body.stream) and not body.background,
            priority=body.priority(),
            on_disconnect="continue" if body.background else None,
            keep_s=service.settings.response_ttl_s if body.is_stored else None,
        )
    except ApiError:
        if is_new:
            await _forget(service, record)
        raise
    return record, answer


async def _forget(service: Service, record: StoredResponse) -> None:
    # Nobody knows its id, and it expires.
    with suppress(BrokerError):
        await service.fleet.with_redis(
            delete_response, record.job_id, service.fleet.rules.result_ttl
        )


async def _own(request: Request, asked: str) -> tuple[Service, StoredResponse]:
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    return service, await find_own(service, caller, asked)


async def _items_before(service: Service, caller: Caller, asked: str | None) -> list[InputItem]:
    """Return input and output of the responses that a request goes on from, the oldest first.

    Raises:
        ApiError: One of them is not there, or has no answer; or they are too many.
    """
    values: list[dict[str, Any]] = []
    for _ in range(MAX_CHAIN):
        if asked is None:
            return read_items(values)
        record = await _previous(service, caller, asked)
        response = await response_now(service, record)
        if response["status"] not in ("completed", "incomplete"):
            raise _not_to_go_on_from(
                f"the response {asked} has no answer to go on from, it is {response['status']}",
                "previous_response_not_completed",
            )
        values[:0] = [*record.items, *response["output"]]
        asked = record.request["previous_response_id"]
    raise _not_to_go_on_from(
        f"more than {MAX_CHAIN} responses go on from each other: send the conversation as input",
        "previous_responses_too_many",
    )


async def _previous(service: Service, caller: Caller, asked: str) -> StoredResponse:
    try:
        return await find_own(service, caller, asked)
    except ApiError as error:
        raise ApiError(
            404, error.message, code="previous_response_not_found", param="previous_response_id"
        ) from None


def _not_to_go_on_from(text: str, code: str) -> ApiError:
    return ApiError(400, text, code=code, param="previous_response_id")
