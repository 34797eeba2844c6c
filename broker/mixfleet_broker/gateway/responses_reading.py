"""Reading responses: as they are now, as they come, and to their end though nobody listens."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from mixfleet_broker.channel import FIRST, read_events
from mixfleet_broker.errors import BrokerError, MessageError, MixfleetError, UnknownJobError
from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import LOOK_S, SILENCE_S, Answer, Happening, Waiting
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.openai_shapes import waiting_comment
from mixfleet_broker.gateway.responses_events import (
    PREFIX,
    ResponseEvents,
    event_bytes,
    response_id,
)
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.names import check_job_id
from mixfleet_broker.responses_store import StoredResponse, end_response, find_response

logger = logging.getLogger(__name__)


async def find_own(service: Service, caller: Caller, asked: str) -> StoredResponse:
    """Return a stored response of the caller.

    Raises:
        ApiError: 404 if there is none, or it is somebody else's.
    """
    nowhere = ApiError(
        404,
        f"no response {asked[:160]!r}: it never existed, was not stored, or is too old",
        code="response_not_found",
        param="response_id",
    )
    if not asked.startswith(PREFIX):
        raise nowhere
    try:
        job_id = check_job_id(asked.removeprefix(PREFIX))
    except MessageError:
        raise nowhere from None
    record = await service.fleet.with_redis(find_response, job_id)
    if record is None:
        raise nowhere
    try:
        caller.check_owner(record.tenant, job_id)
    except ApiError:
        raise nowhere from None
    return record


async def read_so_far(service: Service, record: StoredResponse) -> ResponseEvents:
    """Return a reading of all that is in the channel now.

    Raises:
        UnknownJobError: There is neither a channel nor a job.
    """
    reading = ResponseEvents(record)
    reading.begin()
    after = FIRST
    while events := await service.fleet.with_redis(read_events, record.job_id, after):
        after = events[-1][0]
        for _, event in events:
            reading.take(event)
    if after == FIRST:
        await service.fleet.info(record.job_id, record.model)
    return reading


async def check_has_events(service: Service, record: StoredResponse) -> None:
    """Raise if the channel that a stream is read from is gone, though the record is kept.

    Raises:
        ApiError: 410.
    """
    if await service.fleet.with_redis(read_events, record.job_id):
        return
    with suppress(UnknownJobError):
        if record.final is None:
            await service.fleet.info(record.job_id, record.model)
            return  # it waits for its first run
    raise ApiError(
        410,
        f"the events of {response_id(record.job_id)} are gone: retrieve it without stream",
        code="stream_expired",
        param="stream",
    )


async def response_now(service: Service, record: StoredResponse) -> dict[str, Any]:
    """Return a response as it is now."""
    if record.final is not None:
        return record.final
    try:
        reading = await read_so_far(service, record)
    except UnknownJobError:
        return ResponseEvents(record).lost()
    if reading.has_ended:
        await keep_end(service, record, reading)
    return reading.response()


async def keep_end(service: Service, record: StoredResponse, reading: ResponseEvents) -> None:
    """Write how a response ended; one that was not stored, or is deleted, stays away."""
    if not record.request["store"]:
        return
    ttls = (service.settings.response_ttl_s, service.fleet.rules.result_ttl)
    try:
        await service.fleet.with_redis(end_response, record, reading.response(), *ttls)
    except BrokerError as error:  # the channel still has it, for whoever asks in time
        logger.warning("response_not_kept job_id=%s error=%s", record.job_id, error)


async def keep_left(service: Service, record: StoredResponse) -> None:
    """Write how a response ended by its reader's going away, if that has ended it."""
    if record.request["store"]:
        with suppress(MixfleetError):  # then the channel says so, for a while
            await response_now(service, record)


async def stream_of_answer(
    service: Service, record: StoredResponse, answer: Answer
) -> AsyncIterator[bytes]:
    """Iterate over the events of a response whose reader its job may end with."""
    reading = ResponseEvents(record)
    try:
        yield event_bytes(reading.begin())
        async for batch in answer.happenings():
            pieces = b"".join(_piece(reading, happening) for happening in batch)
            if reading.has_ended:
                await keep_end(service, record, reading)
            yield pieces or sse.KEEP_ALIVE
    except ApiError as error:
        await answer.cancel("its events cannot be read")
        yield sse.data(error.openai_body(), "error")
    finally:
        await answer.leave()
        if not reading.has_ended:
            await keep_left(service, record)


async def stream_of_record(
    service: Service, record: StoredResponse, starting_after: int = -1
) -> AsyncIterator[bytes]:
    """Iterate over the events of any response after a number; the job does not care who reads.

    Args:
        service: The gateway.
        record: Of the response.
        starting_after: Number of the last event that the reader has; -1 for none.
    """
    reading = ResponseEvents(record)
    events = reading.begin()
    with service.fleet.follow({record.job_id: FIRST}) as subscription:
        try:
            yield event_bytes([e for e in events if e["sequence_number"] > starting_after])
            while not reading.has_ended:
                arrived = await subscription.next(_patience_s(service, reading))
                events = []
                for _, _, event in arrived:
                    if isinstance(event, MessageError):
                        raise as_api_error(event)
                    events += reading.take(event)
                if reading.has_ended:
                    await keep_end(service, record, reading)
                new = [e for e in events if e["sequence_number"] > starting_after]
                yield event_bytes(new) if new else await _silence(service, record, reading)
        except ApiError as error:
            yield sse.data(error.openai_body(), "error")


async def read_to_end(service: Service, record: StoredResponse, answer: Answer) -> ResponseEvents:
    """Return the reading of a whole answer, whatever its end is."""
    reading = ResponseEvents(record)
    reading.begin()
    async for batch in answer.happenings():
        for happening in batch:
            _piece(reading, happening)
    await keep_end(service, record, reading)
    return reading


class Followers:
    """Tasks that read the answers of responses in the background, to keep how they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, service: Service, record: StoredResponse, answer: Answer) -> None:
        """Read an answer to its end."""
        task = asyncio.create_task(_follow(read_to_end(service, record, answer), answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Let go of all; their jobs go on, and whoever asks for one reads its channel."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _follow(reading: Coroutine[Any, Any, ResponseEvents], answer: Answer) -> None:
    try:
        await reading
    except (MixfleetError, ApiError) as error:
        logger.warning("response_not_followed job_ids=%s error=%s", answer.job_ids, error)
    finally:
        await answer.leave()


def _piece(reading: ResponseEvents, happening: Happening) -> bytes:
    if isinstance(happening.what, Waiting):
        return waiting_comment(happening.what.info)
    return event_bytes(reading.take(happening.what))


def _patience_s(service: Service, reading: ResponseEvents) -> float:
    return min(SILENCE_S, service.settings.keep_alive_s) if reading.has_started else LOOK_S


async def _silence(service: Service, record: StoredResponse, reading: ResponseEvents) -> bytes:
    """Return what a stream says that has nothing to say; raises if its job is gone."""
    if reading.has_ended:
        return b""
    try:
        info = await service.fleet.info(record.job_id, record.model)
    except BrokerError as error:
        if error.retryable:
            return sse.KEEP_ALIVE  # Redis is away for a moment
        raise as_api_error(error) from error
    return sse.KEEP_ALIVE if reading.has_started else waiting_comment(info)
