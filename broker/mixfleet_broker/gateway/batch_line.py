"""One line of a batch, through the same door as a live request."""

import asyncio
import logging
import random
from typing import Any, Final

from mixfleet_broker.batch_store import Batch, Result
from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.gateway.answer import Answer
from mixfleet_broker.gateway.api_errors import SERVER, ApiError
from mixfleet_broker.gateway.batch_requests import Line, LineError, LineRequest, read_request
from mixfleet_broker.gateway.batch_shapes import Unfinished, answered, refused, unfinished
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.messages import ChatJob
from mixfleet_broker.terms import JobTerms

logger = logging.getLogger(__name__)

_NO_CLUE_S: Final = 1.0
_MAX_WAIT_S: Final = 60.0
"""Between two attempts to queue a line: limits may be raised meanwhile."""
_TRIES: Final = 2
"""A job that is lost with its result, as it was too old, is run once more."""


class StoppedError(Exception):
    """The batch ends early, and the line was not queued."""


class LineRunner:
    """Runs the lines of one batch.

    Args:
        service: Where jobs go.
        batch: Whose lines they are.
        is_taken_over: Another gateway may have queued some of them.
    """

    def __init__(self, service: Service, batch: Batch, *, is_taken_over: bool) -> None:
        self._service = service
        self._batch = batch
        self._num_unsure = batch.in_flight if is_taken_over else 0
        self._open: set[Answer] = set()
        self._stop = asyncio.Event()
        self._in_turn = asyncio.Lock()
        self.why: Unfinished | None = None
        """Set once the batch ends early."""

    async def result(self, line: Line) -> Result | None:
        """Return what came of a line; None if the batch ended before it was queued."""
        custom_id: str | None = None
        place, batch_id = line.place, self._batch.batch_id
        try:
            request = self.read(line)
            custom_id = request.custom_id
            return answered(batch_id, place, custom_id, await self._body(request))
        except StoppedError:
            return None
        except LineError as error:
            return refused(batch_id, place, error.custom_id, error.error)
        except ApiError as error:
            if self.why is not None and error.code == "canceled":
                return unfinished(batch_id, place, custom_id, self.why)
            return refused(batch_id, place, custom_id, error)
        except Exception:
            logger.exception("line_failed batch_id=%s line=%d", batch_id, place + 1)
            text = "an error of the gateway, see its log"
            return refused(
                batch_id, place, custom_id, ApiError(500, text, kind=SERVER, code="internal")
            )

    def read(self, line: Line) -> LineRequest:
        """Return what a line asks for; raises LineError."""
        limit = self._service.settings.max_body_bytes
        return read_request(line, limit, self._batch.endpoint, self._batch.batch_id)

    async def end_early(self, why: Unfinished) -> None:
        """Queue no more lines, and end the jobs of those that are queued."""
        self.why = why
        self._stop.set()
        for answer in list(self._open):
            await answer.cancel(f"its batch is {why}")

    async def cancel_jobs(self, line: Line) -> None:
        """End the jobs of a line that another gateway may have queued."""
        try:
            jobs = self.read(line).jobs
            for job in jobs:
                await self._service.fleet.cancel(job.job_id, job.model, "its batch has ended")
        except LineError:
            pass  # it never had any
        except MixfleetError as error:
            logger.warning(
                "line_not_cancelled batch_id=%s line=%d error=%s",
                self._batch.batch_id,
                line.place + 1,
                error,
            )

    async def _body(self, request: LineRequest) -> dict[str, Any]:
        for left in range(_TRIES - 1, -1, -1):
            answer = await self._begun(request)
            self._open.add(answer)
            try:
                if self._stop.is_set():
                    await answer.cancel(f"its batch is {self.why}")
                return request.whole(await answer.collect())
            except ApiError as error:
                if error.code != "unknown_job" or not left:
                    raise
            finally:
                self._open.discard(answer)
                await answer.leave()
        raise AssertionError("the last try returns or raises")

    async def _begun(self, request: LineRequest) -> Answer:
        """Queue a line's jobs. Whatever refuses them for now is waited out, one line at a time.

        Raises:
            ApiError: They can never be queued.
            StoppedError: The batch ends early.
        """
        self._check_going()
        caller = await self._caller()
        is_charged = await self._is_known(request.jobs)
        try:
            return await self._queued(request, caller, is_charged=is_charged)
        except ApiError as error:
            wait_s = _wait_s(error)
        async with self._in_turn:
            while True:
                await self._pause(wait_s)
                try:
                    caller = await self._caller()
                    return await self._queued(request, caller, is_charged=is_charged)
                except ApiError as error:
                    wait_s = _wait_s(error)

    async def _queued(self, request: LineRequest, caller: Caller, *, is_charged: bool) -> Answer:
        terms = JobTerms(tenant=caller.tenant, priority="batch")
        return await self._service.queue(
            caller, request.jobs, terms, "continue", is_charged=is_charged
        )

    async def _caller(self) -> Caller:
        # Each time anew: a key may be revoked, or get other limits, while its batch runs.
        return await self._service.gate.payer(self._batch.tenant, self._batch.key_id)

    async def _is_known(self, jobs: list[ChatJob]) -> bool:
        """Whether the gateway that drove the batch before has queued these jobs."""
        if self._num_unsure <= 0:
            return False
        self._num_unsure -= 1
        try:
            for job in jobs:
                await self._service.fleet.info(job.job_id, job.model)
        except MixfleetError:
            return False
        return True

    async def _pause(self, wait_s: float) -> None:
        try:
            # Not all at the same moment, where several batches wait for the same queue.
            await asyncio.wait_for(self._stop.wait(), wait_s * random.uniform(1.0, 1.25))
        except TimeoutError:
            return
        raise StoppedError

    def _check_going(self) -> None:
        if self._stop.is_set():
            raise StoppedError


def _wait_s(error: ApiError) -> float:
    """Return when to try again; raises the error where that is of no use."""
    if not error.retryable:
        raise error
    return min(error.retry_after_s or _NO_CLUE_S, _MAX_WAIT_S)
