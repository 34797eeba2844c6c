"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens`` over the queue.

The headers ``anthropic-version`` and ``anthropic-beta`` are taken without effect: there is one
version of what is served here, and whatever field a beta would bring is refused by its name.
"""

import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Answer, Happening, Waiting, collect_or_leave
from mixfleet_broker.gateway.anthropic_errors import PATH, anthropic_body
from mixfleet_broker.gateway.anthropic_events import PING, MessageEvents, whole_message
from mixfleet_broker.gateway.anthropic_schema import Conversation, MessagesBody
from mixfleet_broker.gateway.api_errors import ApiError, error_of_end
from mixfleet_broker.gateway.openai_shapes import waiting_comment
from mixfleet_broker.gateway.service import Service, job_ids
from mixfleet_broker.inquiry_codec import TokenizeChat
from mixfleet_broker.messages import JobEnd, SamplingSettings, TokenChunk, new_job_id

router = APIRouter(prefix=PATH, tags=["anthropic"])


@router.post("")
async def create_message(request: Request, body: MessagesBody) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    job = body.job(job_ids(request, caller, 1)[0], body.settings())
    answer = await service.begin(request, caller, [job], streams=body.stream)
    if body.stream:
        events = _stream(answer, body.model, request.scope.get("request_id", ""))
        return sse.EventStream(events, answer.headers, answer.leave)
    (choice,) = await collect_or_leave(answer, request.receive)
    # ASCII, as a model can write half of a surrogate pair into a call, which UTF-8 has not.
    content = json.dumps(whole_message(body.model, choice))
    return Response(content, media_type="application/json", headers=answer.headers)


@router.post("/count_tokens")
async def count_tokens(request: Request, response: Response, body: Conversation) -> dict[str, int]:
    """Return the size of the prompt that the same fields would make; a worker counts it."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    caller.check_model(body.model)
    await service.fleet.check_model(body.model)
    response.headers.update(await service.gate.charge_request(caller))
    job = body.job(new_job_id(), SamplingSettings())
    counted = await service.ask(body.model, TokenizeChat(job=job, detail="count"))
    return {"input_tokens": counted.num_tokens}


async def _stream(answer: Answer, model: str, request_id: str) -> AsyncIterator[bytes]:
    (job_id,) = answer.job_ids
    events = MessageEvents(model, job_id)
    try:
        async for batch in answer.happenings():
            piece = b"".join(_piece(events, job_id, happening) for happening in batch)
            if piece or not batch:
                yield piece or PING
    except ApiError as error:
        yield sse.data(anthropic_body(error, request_id), "error")
    finally:
        await answer.leave()


def _piece(events: MessageEvents, job_id: str, happening: Happening) -> bytes:
    what = happening.what
    if isinstance(what, Waiting):
        # The first event must have the size of the prompt, which nobody knows before a worker.
        return waiting_comment(what.info)
    if isinstance(what, JobEnd):
        failure = error_of_end(what, job_id)
        if failure is not None:
            raise failure
    return events.take(what) if isinstance(what, TokenChunk | JobEnd) else b""
