"""AIME's HTTP interface over the queue: submit, wait or poll, for its clients as they are.

A job's progress is read from its channel at each poll, so any gateway can be asked, and a result
can be read again until it expires.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.requests import Request

from mixfleet_broker.channel import all_events
from mixfleet_broker.gateway.aime_endpoints import Endpoint, endpoint_of_model
from mixfleet_broker.gateway.aime_inputs import (
    chat_job,
    read_inputs,
    read_text,
    waits_for_result,
)
from mixfleet_broker.gateway.aime_shapes import (
    Text,
    details_body,
    done_body,
    progress_body,
    result_body,
)
from mixfleet_broker.gateway.answer import Answer, collect_or_leave
from mixfleet_broker.gateway.api_errors import ApiError, error_of_end
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.service import Service, job_ids
from mixfleet_broker.gateway.watch import JobObserver, WatchedJob
from mixfleet_broker.jobs import JobRow
from mixfleet_broker.key_cache import KeyCache
from mixfleet_broker.key_secrets import new_secret
from mixfleet_broker.key_sessions import KeySessions
from mixfleet_broker.messages import TERMINAL_STATES, JobEnd

logger = logging.getLogger(__name__)

MAX_FIRST_TOKENS: Final = 10_000
Parameters = Mapping[str, Any]
Body = dict[str, Any]


class FirstTokens(JobObserver):
    """Notes when the first tokens of the latest jobs of this gateway came.

    Nothing depends on it: a result that another gateway tells of lacks this one number.
    """

    def __init__(self) -> None:
        self._ttft_s: OrderedDict[str, float] = OrderedDict()

    def ended(self, job: WatchedJob) -> None:
        """Note when its first token came, if any did."""
        if job.first_token_at is None:
            return
        self._ttft_s[job.job_id] = job.first_token_at - job.submitted_at
        if len(self._ttft_s) > MAX_FIRST_TOKENS:
            self._ttft_s.popitem(last=False)

    def of(self, job_id: str) -> float | None:
        """Return the seconds from submit to first token; None where they are not known."""
        return self._ttft_s.get(job_id)


class Aime:
    """What AIME's routes do. Made and used in one event loop.

    Args:
        service: The gateway's parts.
        described: The endpoints of files; None: one for each model.

    Raises:
        ApiError: From every method, for the client.
        MixfleetError: Likewise.
    """

    def __init__(self, service: Service, described: Sequence[Endpoint] | None) -> None:
        self._service = service
        self._fleet = service.fleet
        self._described = described
        self._sessions = KeySessions(service.fleet.redis, prefix=service.fleet.prefix)
        self._cache = KeyCache(self._sessions.find)
        self._first_tokens = FirstTokens()
        service.watch.observers.append(self._first_tokens)
        self._following: set[asyncio.Task[None]] = set()

    async def endpoints(self) -> list[Endpoint]:
        """Return all endpoints."""
        if self._described is not None:
            return list(self._described)
        return [endpoint_of_model(model) for model in await self._fleet.models()]

    async def find(self, name: str) -> Endpoint | None:
        """Return the endpoint with this name; None where there is none."""
        return next((one for one in await self.endpoints() if one.name == name), None)

    async def submit(
        self, request: Request, endpoint: Endpoint, given: Parameters, *, as_text: bool
    ) -> Body:
        """Queue a job and return its id, or wait and return its result.

        While it waits its connection may be silent for as long as it takes; the client's going
        away cancels the job. A job that is polled is its own: it goes on without readers.
        """
        caller = await self._caller(request, given)
        waits = waits_for_result(given)
        values = read_inputs(endpoint, given, as_text=as_text)
        if given.get("max_gen_tokens") is None:
            values["max_gen_tokens"] = await self._fitting(endpoint, values.get("max_gen_tokens"))
        [job_id] = job_ids(request, caller, 1)
        jobs = [chat_job(endpoint, values, job_id)]
        if waits:
            answer = await self._service.begin(request, caller, jobs)
            await collect_or_leave(answer, request.receive)
            row, text = await self._read(endpoint, caller, job_id)
            return await self._result(endpoint, row, text)
        answer = await self._service.begin(request, caller, jobs, on_disconnect="continue")
        self._follow(answer)
        return {"success": True, "job_id": job_id, "ep_version": endpoint.version}

    async def progress(self, request: Request, endpoint: Endpoint, given: Parameters) -> Body:
        """Return how far a job is, with all of its text so far; its result once it is complete."""
        caller = await self._caller(request, given)
        job_id = read_text(given, "job_id")
        if job_id is None:
            raise ApiError(
                400, "job_id: is missing", code="missing_required_parameter", param="job_id"
            )
        row, text = await self._read(endpoint, caller, job_id)
        end = text.end
        if end is None and row.state in TERMINAL_STATES:
            end = _end_of(row)
        if end is None:
            info = await self._fleet.info(job_id, row.model)
            return progress_body(endpoint, row, info, text)
        failure = error_of_end(end, job_id)
        if failure is not None:
            state = "canceled" if end.state == "canceled" else "lapsed"
            failure.details |= {"job_id": job_id, "job_state": state}
            raise failure
        return done_body(endpoint, job_id, await self._result(endpoint, row, text))

    async def login(self, request: Request, endpoint: Endpoint, given: Parameters) -> Body:
        """Return a session's key, which stands for the API key for a day."""
        secret = read_text(given, "key")
        caller = await self._caller(request, {"key": secret})
        caller.check_model(endpoint.model)
        if caller.record is None or secret is None:
            session = new_secret()  # nothing is asked of it: this gateway needs no keys
        else:
            session = await self._fleet.call(self._sessions.open, secret)
        return {
            "success": True,
            "ep_version": endpoint.version,
            "client_session_auth_key": session,
        }

    async def validate_key(self, request: Request, given: Parameters) -> Body:
        """Say that a key is good; a bad one is an error."""
        await self._caller(request, given)
        return {"success": True, "error": None}

    async def names(self, request: Request, given: Parameters) -> Body:
        """Return the names of all endpoints; of those that a key may use, if one is shown."""
        found = await self.endpoints()
        if read_text(given, "key") is not None:
            caller = await self._caller(request, given)
            found = [one for one in found if _may_use(caller, one)]
        return {"success": True, "endpoints": [one.name for one in found]}

    async def details(self, request: Request, endpoint: Endpoint, given: Parameters) -> Body:
        """Return what an endpoint takes and who serves it.

        AIME's clients ask for it without a key, so whoever has none is not told workers' names.
        """
        try:
            await self._caller(request, given)
            is_named = True
        except ApiError:
            is_named = False
        model = endpoint.model
        statuses = await self._fleet.statuses()
        return details_body(
            endpoint,
            [worker for worker in await self._fleet.workers() if worker.model == model],
            num_queued=sum(one.num_queued for one in statuses if one.model == model),
            queue_limit=self._fleet.rules.queue_limit,
            is_named=is_named,
        )

    async def close(self) -> None:
        """Follow no more jobs; they go on."""
        tasks = list(self._following)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _caller(self, request: Request, given: Parameters) -> Caller:
        gate = self._service.gate
        key, session = read_text(given, "key"), read_text(given, "client_session_auth_key")
        if key is None and session is not None and await gate.needs_key():
            record = await self._fleet.call(self._cache.find, session)
            if record is None:
                raise ApiError(
                    401,
                    "this client_session_auth_key is not valid: log in again",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
            return gate.caller_of(record)
        return await gate.caller(request, secret=key)

    async def _fitting(self, endpoint: Endpoint, most: int | None) -> int | None:
        """Return the longest answer of who set none: the default, in a small model half of it."""
        context_length = await self._fleet.context_length(endpoint.model)
        if most is None or context_length is None:
            return most
        return min(most, max(1, context_length // 2))

    async def _read(self, endpoint: Endpoint, caller: Caller, job_id: str) -> tuple[JobRow, Text]:
        """Return what is kept of a job of the caller's."""
        row = await self._fleet.find(job_id)
        caller.check_owner(row.tenant, job_id)
        if row.model != endpoint.model:
            raise ApiError(404, f"no job {job_id} of {endpoint.name}", code="unknown_job")
        events = await self._fleet.with_redis(all_events, job_id)
        text = Text.of(event for _, event in events)
        if text.end is not None and row.state not in TERMINAL_STATES:
            row = await self._fleet.find(job_id)  # it ended between the two looks
        return row, text

    async def _result(self, endpoint: Endpoint, row: JobRow, text: Text) -> Body:
        return result_body(
            endpoint,
            row,
            text,
            context_length=await self._fleet.context_length(endpoint.model),
            ttft_s=self._first_tokens.of(row.job_id),
        )

    def _follow(self, answer: Answer) -> None:
        """Hear a job to its end, so that its key gets back what it did not use."""
        task = asyncio.create_task(_hear(answer))
        self._following.add(task)
        task.add_done_callback(self._following.discard)


async def _hear(answer: Answer) -> None:
    try:
        async for _ in answer.happenings():
            pass
    except ApiError as error:
        logger.warning("job_not_followed job_id=%s error=%s", answer.job_ids[0], error)
    finally:
        await answer.leave()


def _may_use(caller: Caller, endpoint: Endpoint) -> bool:
    return caller.record is None or caller.record.may_use_model(endpoint.model)


def _end_of(row: JobRow) -> JobEnd:
    """Return how a job ended whose channel has gone before it."""
    if row.state == "canceled":
        return JobEnd(state="canceled", message=row.message or None)
    if row.state == "failed":
        return JobEnd(state="failed", code=row.reason or None, message=row.message or None)
    raise ApiError(404, f"no job {row.job_id}: its result has expired", code="unknown_job")
