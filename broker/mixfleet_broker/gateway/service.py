"""What all dialects share: from a checked request to jobs in the queue, on the caller's terms."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final, cast

from starlette.requests import Request

from mixfleet_broker.errors import (
    InquiriesFullError,
    InquiryTimeoutError,
    JobConflictError,
    MessageError,
    MixfleetError,
    NoWorkerError,
)
from mixfleet_broker.gateway.answer import Answer, Disconnect
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error
from mixfleet_broker.gateway.caller import Caller, Gatekeeper, rate_limit_headers
from mixfleet_broker.gateway.fleet import Fleet
from mixfleet_broker.gateway.watch import JobWatch
from mixfleet_broker.inquiry_codec import CheckJob, Inquiry, InquiryAnswer
from mixfleet_broker.job_codec import encode_job
from mixfleet_broker.limits import Admission
from mixfleet_broker.messages import ChatJob, new_job_id
from mixfleet_broker.settings import Settings
from mixfleet_broker.submitting import num_prompt_bytes
from mixfleet_broker.terms import PRIORITIES, JobTerms, Priority
from mixfleet_broker.traceparent import valid_traceparent

ON_DISCONNECT: Final = "x-mixfleet-on-disconnect"
PRIORITY: Final = "x-mixfleet-priority"
START_WITHIN: Final = "x-mixfleet-start-within-s"
FINISH_WITHIN: Final = "x-mixfleet-finish-within-s"
IDEMPOTENCY_KEY: Final = "idempotency-key"
MAX_IDEMPOTENCY_KEY: Final = 255
MAX_CHOICES: Final = 128
BYTES_PER_TOKEN: Final = 3
"""Fewer than text has on average: an estimate that is settled when the job has ended."""
_PEEK_S: Final = 0.1
_CHECK_S: Final = 2.0
_ANSWER_TOKENS: Final = 1024
"""Of an answer without a limit of its own, where no live worker says its context's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One gateway's parts; every route gets it from ``request.app.state.service``."""

    settings: Settings
    fleet: Fleet
    gate: Gatekeeper
    watch: JobWatch

    async def ask(self, model: str, inquiry: Inquiry, timeout_s: float = 10.0) -> InquiryAnswer:
        """Return what a worker of the model answers; raises what :func:`inquiries.ask` raises."""
        return await self.fleet.ask(model, inquiry, timeout_s)

    async def begin(
        self,
        request: Request,
        caller: Caller,
        jobs: Sequence[ChatJob],
        *,
        streams: bool = False,
        priority: Priority | None = None,
        on_disconnect: Disconnect | None = None,
        keep_s: float | None = None,
    ) -> Answer:
        """Queue the jobs of one request and return their answer, which has just begun.

        Args:
            request: Its headers may set priority, deadlines, and what its going away means.
            caller: Who pays.
            jobs: One for each choice, all of one model.
            streams: Wait a moment, so that a job refused by its worker is an HTTP error and not an
                error in a stream.
            priority: As the body says it; the header wins.
            on_disconnect: For a dialect with its own rule; else the header, then the setting.
            keep_s: Of :class:`JobTerms`, for an answer that is a stored response.

        Raises:
            ApiError: The request cannot be served; nothing is queued.
        """
        jobs = [replace(job, traceparent=_traceparent(request)) for job in jobs]
        try:
            terms = _terms(request, caller, priority)
            leaving = on_disconnect or _on_disconnect(request, self.settings)
        except MixfleetError as error:
            raise as_api_error(error) from error
        answer = await self.queue(caller, jobs, replace(terms, keep_s=keep_s), leaving)
        if streams:
            await answer.peek(_PEEK_S)
        return answer

    async def queue(
        self,
        caller: Caller,
        jobs: Sequence[ChatJob],
        terms: JobTerms,
        on_disconnect: Disconnect,
        *,
        is_charged: bool = False,
    ) -> Answer:
        """Do as :meth:`begin`, on terms that no request sets.

        Args:
            caller: Who pays.
            jobs: One for each choice, all of one model.
            terms: Of all of them.
            on_disconnect: What becomes of the jobs when their reader goes away.
            is_charged: Another gateway has submitted these jobs before; their caller owes no more.

        Raises:
            ApiError: The jobs cannot be served; none is queued.
        """
        model = jobs[0].model
        caller.check_model(model)
        try:
            await self.fleet.check_model(model)
            context_length = await self.fleet.context_length(model)
            each = _one_of_each_prompt(jobs)
            doubtful = [
                payload
                for job in each
                if _needs_check(job, payload := encode_job(job), context_length)
            ]
            if doubtful:
                await asyncio.gather(*(self._check(model, payload) for payload in doubtful))
        except MixfleetError as error:
            raise as_api_error(error) from error
        tokens = max(_most_tokens(job, context_length) for job in each)
        admission = await self._charge(caller, jobs, tokens, is_charged=is_charged)
        answer = Answer(
            self.fleet,
            jobs,
            replace(terms, ends_with_reader=on_disconnect == "cancel"),
            caller.rules(self.fleet.rules),
            self.watch,
            key_id=caller.name,
            on_disconnect=on_disconnect,
            headers={
                "x-job-id": ",".join(job.job_id for job in jobs),
                **(rate_limit_headers(admission.states) if admission is not None else {}),
            },
        )
        try:
            await answer.submit()
        except ApiError as error:
            # What is charged under this id is another job's, which goes on.
            if error.code != JobConflictError.code:
                await self.gate.refund(caller, admission)
            raise
        return answer

    async def _charge(
        self, caller: Caller, jobs: Sequence[ChatJob], tokens: int, *, is_charged: bool
    ) -> Admission | None:
        job_ids = [job.job_id for job in jobs]
        if is_charged:
            self.gate.expect(caller, job_ids)
            return None
        try:
            return await self.gate.charge(caller, job_ids, tokens)
        except ApiError as error:
            self.watch.turned_away(jobs[0].model, error.code or "limit")
            raise

    async def _check(self, model: str, payload: bytes) -> None:
        """Ask a worker if it would take a job; where none says so in time, the job's own will."""
        with suppress(NoWorkerError, InquiriesFullError, InquiryTimeoutError):
            await self.ask(model, CheckJob(payload=payload), _CHECK_S)


def job_ids(request: Request, caller: Caller, number: int) -> list[str]:
    """Return ids for the jobs of a request: new ones, or those of its idempotency key.

    Raises:
        ApiError: The idempotency key is too long.
    """
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return [new_job_id() for _ in range(number)]
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY:
        raise ApiError(
            400,
            f"{IDEMPOTENCY_KEY}: {len(key)} characters, must be from 1 to {MAX_IDEMPOTENCY_KEY}",
            code="invalid_idempotency_key",
            param=IDEMPOTENCY_KEY,
        )
    # Two callers with the same key must not meet, nor one guess the other's ids.
    owner = caller.name if caller.record is None else caller.record.key_id
    return [sha256(f"{owner}\0{key}\0{index}".encode()).hexdigest()[:32] for index in range(number)]


def _traceparent(request: Request) -> str | None:
    """Return the trace that the jobs belong to.

    None under an idempotency key: a retry is another span, and must be the same job.
    """
    if IDEMPOTENCY_KEY in request.headers:
        return None
    own: str | None = request.scope.get("traceparent")
    return own or valid_traceparent(request.headers.get("traceparent"))


def _terms(request: Request, caller: Caller, asked: Priority | None) -> JobTerms:
    """Return the terms that headers, body and key make together.

    Raises:
        ApiError: The key may not ask for this priority.
        MessageError: A header cannot be used.
    """
    given = request.headers.get(PRIORITY)
    if given is not None and given not in PRIORITIES:
        raise MessageError(f"{PRIORITY}={given[:20]!r}: must be one of {', '.join(PRIORITIES)}")
    own = caller.record.priority if caller.record is not None else "default"
    priority = given if given is not None else asked or own
    if caller.record is not None and not caller.record.may_use_priority(priority):
        raise ApiError(
            403,
            f"this key may not ask for the priority {priority!r}, its highest is {own!r}",
            kind="permission_error",
            code="priority_not_allowed",
        )
    terms = JobTerms(
        tenant=caller.tenant,
        priority=priority,
        start_within_s=_seconds(request, START_WITHIN),
        finish_within_s=_seconds(request, FINISH_WITHIN),
    )
    terms.check()
    return terms


def _seconds(request: Request, header: str) -> float | None:
    given = request.headers.get(header)
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise MessageError(f"{header}={given[:40]!r}: must be a number of seconds") from None


def _on_disconnect(request: Request, settings: Settings) -> Disconnect:
    given = request.headers.get(ON_DISCONNECT, settings.on_disconnect).lower()
    if given not in ("cancel", "continue"):
        raise MessageError(f"{ON_DISCONNECT}={given[:20]!r}: must be cancel or continue")
    return cast("Disconnect", given)


def _one_of_each_prompt(jobs: Sequence[ChatJob]) -> list[ChatJob]:
    """Return the jobs whose prompts differ: choices of one prompt fit or fail together."""
    return list({(job.messages, job.prompt, job.prompt_token_ids): job for job in jobs}.values())


def _needs_check(job: ChatJob, payload: bytes, context_length: int | None) -> bool:
    """Whether a worker must say beforehand if it would take the job.

    A text has no more tokens than bytes, so most requests fit for certain and are not asked about.
    Without a worker nobody can be asked: the job waits, and its worker will say.
    """
    if context_length is None:
        return False
    fits = len(payload) + (job.sampling.max_tokens or 1) <= context_length
    return not fits or bool(job.tools or job.output_format or job.sampling.logit_bias)


def _most_tokens(job: ChatJob, context_length: int | None) -> int:
    """Return what a job may use at most: its prompt, by its bytes, and its longest answer."""
    prompt = num_prompt_bytes(job) // BYTES_PER_TOKEN + 1
    if job.sampling.max_tokens is not None:
        return prompt + job.sampling.max_tokens
    return max(prompt, context_length) if context_length else prompt + _ANSWER_TOKENS
