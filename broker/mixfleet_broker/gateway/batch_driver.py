"""One batch, driven from its first line to its end by one gateway.

The lines go through the same door as live requests, a bounded number at a time, and each result is
written the moment it is there, once, whoever else has driven the batch before; see docs/adr/0019.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Final, ParamSpec, TypeVar

from mixfleet_broker.batch_store import (
    Batch,
    BatchLease,
    BatchStore,
    Result,
    Status,
    is_done,
)
from mixfleet_broker.errors import BrokerError
from mixfleet_broker.file_store import FileStore
from mixfleet_broker.gateway.batch_check import FileCheck, check_file
from mixfleet_broker.gateway.batch_line import LineRunner
from mixfleet_broker.gateway.batch_requests import Line, LineError, read_lines, read_value
from mixfleet_broker.gateway.batch_shapes import Unfinished, unfinished
from mixfleet_broker.gateway.service import Service

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_AGAIN_S: Final = 1.0
"""When what Redis cannot do now is tried again."""
_SWEEP: Final = 200
"""Results that are written at once at the end of a batch that does not complete."""


class NotOursError(Exception):
    """Another gateway drives the batch, or it has ended."""


class InputGoneError(Exception):
    """The input file was deleted."""


class BatchDriver:
    """Drives one batch under a lease.

    Args:
        service: Where jobs go.
        batch: As it was when the lease was taken.
        token: Of the lease.
    """

    def __init__(self, service: Service, batch: Batch, token: str) -> None:
        fleet = service.fleet
        self._service = service
        self._batch = batch
        self._token = token
        self._store = BatchStore(fleet.redis, prefix=fleet.prefix)
        self._files = FileStore(fleet.redis, prefix=fleet.prefix)
        is_taken_over = batch.status != "validating"
        self._lines = LineRunner(service, batch, is_taken_over=is_taken_over)
        self._taking = asyncio.Lock()
        self._num_bytes: int | None = None

    async def heard(self, lease: BatchLease) -> None:
        """Take note of how the batch stands; called as often as the lease is renewed."""
        if lease.status == "cancelling":
            await self._end_early("cancelled")
        elif lease.left_s <= 0:
            await self._end_early("expired")

    async def run(self) -> None:
        """Drive the batch to its end.

        Raises:
            NotOursError: Somebody else does.
            BrokerError: Redis refuses for good.
        """
        if self._batch.status == "validating":
            found = await self._check()
            if found.errors:
                await self._move("failed", found)
                return
            await self._move("in_progress", found)
        if self._lines.why is None and self._batch.status != "cancelling":
            await self._run_lines()
        await self._finish()

    async def _check(self) -> FileCheck:
        settings = self._service.settings
        try:
            return await check_file(
                self._read,
                max_line_bytes=settings.max_body_bytes,
                max_lines=settings.batch_max_lines,
            )
        except InputGoneError:
            return self._without_input(FileCheck())

    def _without_input(self, found: FileCheck) -> FileCheck:
        text = f"the input file {self._batch.input_file} is not there any more"
        found.refuse("input_file_not_found", text, line=None, param="input_file_id")
        return found

    async def _run_lines(self) -> None:
        async with aclosing(self._left()) as left:
            lanes = [asyncio.create_task(self._lane(left)) for _ in range(self._batch.in_flight)]
            try:
                await asyncio.gather(*lanes)
            finally:
                for lane in lanes:
                    lane.cancel()
                await asyncio.gather(*lanes, return_exceptions=True)

    async def _lane(self, left: AsyncGenerator[Line, None]) -> None:
        """Run one line after another until none is left, or the batch ends early."""
        while self._lines.why is None:
            async with self._taking:
                line = await anext(left, None)
            if line is None:
                return
            result = await self._lines.result(line)
            if result is not None:
                # Once a line is marked, nobody looks at its jobs again.
                await self._service.gate.settled()
                await self._append([result])

    async def _finish(self) -> None:
        if self._lines.why is None:
            await self._move("finalizing")
        if self._lines.why is not None:
            await self._sweep(self._lines.why)
        elif await self._is_cut_short():
            return
        if await self._move(self._lines.why or "completed") == "cancelling":
            await self._move("cancelled")  # its owner said so in the last moment

    async def _is_cut_short(self) -> bool:
        """Fail the batch if lines of it could not be read any more; whether that is so."""
        batch = await self._patiently(self._store.find, self._batch.batch_id)
        if batch is None:
            raise NotOursError
        if batch.completed + batch.failed >= batch.total:
            return False
        await self._move("failed", self._without_input(FileCheck(total=batch.total)))
        return True

    async def _sweep(self, why: Unfinished) -> None:
        """Write that they will not be answered for all lines that are not done."""
        results, num_left = list[Result](), 0
        async with aclosing(self._left()) as left:
            async for line in left:
                # Who drove it before us had no more lines than these in flight, and these first.
                if num_left < self._batch.in_flight:
                    await self._lines.cancel_jobs(line)
                num_left += 1
                results.append(unfinished(self._batch.batch_id, line.place, _id_of(line), why))
                if len(results) == _SWEEP:
                    await self._append(results)
                    results = []
        await self._append(results)

    async def _left(self) -> AsyncGenerator[Line, None]:
        """Iterate over the lines that had no result when the iteration began.

        It ends early where the input file was deleted.
        """
        marks = await self._patiently(self._store.done, self._batch.batch_id)
        with suppress(InputGoneError):
            async for line in read_lines(self._read, self._service.settings.max_body_bytes):
                if not is_done(marks, line.place):
                    yield line

    async def _read(self, begin: int, num_bytes: int) -> bytes:
        input_file = self._batch.input_file
        if self._num_bytes is None:
            file = await self._patiently(self._files.find, input_file)
            self._num_bytes = file.num_bytes if file is not None else 1
        piece = await self._patiently(self._files.read, input_file, begin, num_bytes)
        if not piece and begin < self._num_bytes:
            raise InputGoneError  # half a line must not be taken for one
        return piece

    async def _append(self, results: list[Result]) -> None:
        if not results:
            return
        args = (self._batch.batch_id, self._token, results)
        if not await self._patiently(self._store.append, *args):
            raise NotOursError

    async def _move(self, status: Status, found: FileCheck | None = None) -> Status:
        """Bring the batch into a status, if it is not to be cancelled; return what it has then."""
        fields = found.fields() if found is not None else None
        args = (self._batch.batch_id, self._token, status, fields)
        now_is = await self._patiently(self._store.move, *args)
        if now_is is None:
            raise NotOursError
        logger.info("batch_moved batch_id=%s status=%s", self._batch.batch_id, now_is)
        if now_is == "cancelling":
            await self._end_early("cancelled")
        return now_is

    async def _end_early(self, why: Unfinished) -> None:
        # A cancelled batch never expires, and one that expires may still be cancelled.
        if self._lines.why is None or (why == "cancelled" and self._lines.why != why):
            await self._lines.end_early(why)

    async def _patiently(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(...)`` on a thread, once Redis is there and has room."""
        while True:
            try:
                return await self._service.fleet.call(function, *args, **kwargs)
            except BrokerError as error:
                if not error.retryable:
                    raise
                logger.warning("batch_waits batch_id=%s error=%s", self._batch.batch_id, error)
            await asyncio.sleep(_AGAIN_S)


def _id_of(line: Line) -> str | None:
    with suppress(LineError):
        return read_value(line, line.num_bytes)[0]
    return None
