"""The answer to one HTTP request: one job, or several for ``n`` choices, from submit to end.

Every dialect (OpenAI's, Anthropic's, AIME's) reads its answers through here, so that what happens
when a queue is full, a reader goes away, a worker dies or a job fails is decided once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from starlette.types import Receive

from mixfleet_broker.channel import FIRST
from mixfleet_broker.errors import BrokerError, MessageError, MixfleetError
from mixfleet_broker.gateway.api_errors import SERVER, ApiError, as_api_error, error_of_end
from mixfleet_broker.gateway.fleet import Fleet
from mixfleet_broker.gateway.hub import Arrival, Subscription
from mixfleet_broker.gateway.watch import JobWatch
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
    Requeued,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.terms import JobTerms, QueueRules

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S: Final = 1.0
"""How often a waiting job's place in the queue is looked up, while few of them wait."""
LOOKS_PER_S: Final = 200.0
"""Of all waiting jobs of a gateway together."""
SILENCE_S: Final = 15.0
"""A running job that says nothing for so long is looked up: Redis may have lost it."""

Disconnect = Literal["cancel", "continue"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job has not started yet."""

    info: JobInfo


@dataclass(frozen=True, slots=True)
class Happening:
    """What came of one of the jobs."""

    index: int
    """Of the choice."""
    what: JobEvent | Waiting
    event_id: str = ""


@dataclass(slots=True)
class Choice:
    """One whole answer, as far as it has come."""

    job_id: str
    text: list[str] = field(default_factory=list)
    tool_text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: JobEnd | None = None
    worker_id: str | None = None

    def take(self, event: JobEvent | Waiting) -> None:
        """Add what came."""
        if isinstance(event, TokenChunk):
            (self.text if event.part == "text" else self.tool_text).append(event.text)
            self.token_ids.extend(event.token_ids)
            self.logprobs.extend(event.logprobs)
        elif isinstance(event, RunStarted):
            self.worker_id = event.worker_id
        elif isinstance(event, JobEnd):
            self.end = event

    @property
    def usage(self) -> Usage:
        """Its counts; zeros while they are not known."""
        known = self.end.usage if self.end is not None else None
        return known or Usage(prompt_tokens=0, completion_tokens=len(self.token_ids))


class Answer:
    """The jobs of one request.

    Args:
        fleet: Where they run.
        jobs: One per choice.
        terms: Of all of them.
        rules: Limits of the queue for this caller.
        watch: Hears of everything, for metrics, the log and the caller's limits.
        key_id: Of the caller, for the log.
        on_disconnect: What becomes of the jobs when their reader goes away.
    """

    def __init__(
        self,
        fleet: Fleet,
        jobs: Sequence[ChatJob],
        terms: JobTerms,
        rules: QueueRules,
        watch: JobWatch,
        *,
        key_id: str = "",
        on_disconnect: Disconnect = "cancel",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.jobs = tuple(jobs)
        self._fleet = fleet
        self._terms = terms
        self._rules = rules
        self._watch = watch
        self._key_id = key_id
        self.headers = dict(headers or {})
        """For the HTTP response, whatever its dialect."""
        self._seen: list[Happening] = []
        self._on_disconnect = on_disconnect
        self._index = {job.job_id: i for i, job in enumerate(self.jobs)}
        self._open = dict.fromkeys(self._index)
        self._waits = set(self._index)
        self._subscription: Subscription | None = None
        self._is_left = False

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs, by choice."""
        return list(self._index)

    async def submit(self) -> None:
        """Queue all jobs, or none.

        Raises:
            ApiError: One is refused; those before it are cancelled.
        """
        self._subscription = self._fleet.follow(dict.fromkeys(self._index, FIRST))
        watched = [job for job in self.jobs if self._watch.submitting(job, self._key_id)]
        submitted: list[ChatJob] = []
        try:
            for job in self.jobs:
                await self._fleet.submit(job, self._terms, self._rules)
                submitted.append(job)
        except MixfleetError as error:
            self._subscription.close()
            for job in watched:
                self._watch.refused(job, error)
            await self._cancel([job.job_id for job in submitted], "another choice was refused")
            raise as_api_error(error) from error
        if self._terms.ends_with_reader:
            self._fleet.attend(self.job_ids)

    def resume(self, after: Mapping[str, str]) -> None:
        """Read jobs that were submitted before, here or by another gateway.

        Args:
            after: By job id, the event after which to go on.
        """
        self._subscription = self._fleet.follow(after)

    async def peek(self, patience_s: float) -> None:
        """Wait a moment for the first token, so that a job which cannot run is an HTTP error.

        What comes meanwhile is kept for :meth:`happenings`.

        Raises:
            ApiError: A job has failed already; the others are cancelled.
        """
        assert self._subscription is not None
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience_s
        try:
            while (left_s := deadline - clock()) > 0:
                batch = self._taken(await self._subscription.next(left_s))
                self._seen += batch
                if any(self._has_begun(happening) for happening in batch):
                    return
        except ApiError:
            await self.leave()
            raise

    def _has_begun(self, happening: Happening) -> bool:
        """Whether a choice has something to show; raises if it has failed instead."""
        if isinstance(happening.what, JobEnd):
            failure = error_of_end(happening.what, self.job_ids[happening.index])
            if failure is not None:
                raise failure
        return isinstance(happening.what, JobEnd | TokenChunk)

    async def happenings(self) -> AsyncIterator[list[Happening]]:
        """Iterate over what comes, in order, until all jobs have ended; empty lists in silence.

        Leaving it early is the reader's going away, see :meth:`leave`.

        Raises:
            ApiError: The broker says so, or a job is not there any more.
        """
        assert self._subscription is not None
        if self._seen:
            seen, self._seen = self._seen, []
            yield seen
        while self._open:
            arrived = await self._subscription.next(self._patience_s())
            yield self._taken(arrived) if arrived else await self._look()

    def _taken(self, arrived: Sequence[Arrival]) -> list[Happening]:
        batch = []
        for job_id, event_id, event in arrived:
            if isinstance(event, MessageError):
                # Not the request's fault, as the same error of a request would be.
                raise ApiError(500, str(event), kind=SERVER, code="invalid_event")
            self._note(job_id, event)
            batch.append(Happening(self._index[job_id], event, event_id))
        return batch

    async def collect(self) -> list[Choice]:
        """Return the whole answers, in the order of the choices.

        Raises:
            ApiError: A job failed or was cancelled; the others are cancelled too.
        """
        choices = [Choice(job_id) for job_id in self.job_ids]
        async for batch in self.happenings():
            for happening in batch:
                choice = choices[happening.index]
                choice.take(happening.what)
                if isinstance(happening.what, JobEnd):
                    failure = error_of_end(happening.what, choice.job_id)
                    if failure is not None:
                        await self.cancel("another choice of the request failed")
                        raise failure
        return choices

    async def leave(self) -> None:
        """Say that the reader is gone; idempotent, and harmless after the end."""
        if self._is_left:
            return
        self._is_left = True
        if self._subscription is not None:
            self._subscription.close()
        self._fleet.leave(self.job_ids)
        if self._open and self._on_disconnect == "cancel":
            await self.cancel("the client went away")
        for job_id in self._open:
            self._watch.left(job_id)

    async def cancel(self, reason: str) -> None:
        """End all jobs that have not ended."""
        await self._cancel(list(self._open), reason)

    async def _cancel(self, job_ids: Sequence[str], reason: str) -> None:
        for job_id in job_ids:
            try:
                await self._fleet.cancel(job_id, self.jobs[self._index[job_id]].model, reason)
            except BrokerError as error:
                logger.warning("job_not_cancelled job_id=%s error=%s", job_id, error)

    def _note(self, job_id: str, event: JobEvent) -> None:
        self._watch.saw(job_id, event)
        if isinstance(event, RunStarted | TokenChunk):
            self._waits.discard(job_id)
        elif isinstance(event, Requeued):
            self._waits.add(job_id)
        else:
            self._open.pop(job_id, None)
            self._waits.discard(job_id)

    def _patience_s(self) -> float:
        if not self._waits:
            return min(SILENCE_S, self._fleet.settings.keep_alive_s)
        return max(LOOK_S, self._watch.num_waiting() / LOOKS_PER_S)

    async def _look(self) -> list[Happening]:
        """Look up the jobs that are silent; raises when one is not there any more."""
        found = []
        for job_id in list(self._waits or self._open):
            index = self._index[job_id]
            try:
                info = await self._fleet.info(job_id, self.jobs[index].model)
            except BrokerError as error:
                if error.retryable:
                    continue  # Redis is away for a moment
                raise as_api_error(error) from error
            if job_id in self._waits:
                found.append(Happening(index, Waiting(info)))
        return found


async def collect_or_leave(answer: Answer, receive: Receive) -> list[Choice]:
    """Return the whole answers, as :func:`or_leave` does.

    Raises:
        ApiError: As :meth:`Answer.collect` and :func:`or_leave`.
    """
    return await or_leave(answer, answer.collect(), receive)


async def or_leave(answer: Answer, collect: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what ``collect`` makes of an answer, unless the client goes away before it is done.

    Raises:
        ApiError: As ``collect``; or 499, which nobody reads, once the client is gone. The jobs
            are left in any case.
    """
    collecting = asyncio.ensure_future(collect)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return collecting.result()
        raise ApiError(499, "the client went away", code="client_closed_request")
    finally:
        gone.cancel()
        collecting.cancel()
        await answer.leave()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
