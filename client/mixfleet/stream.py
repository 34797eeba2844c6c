"""The answer to one job: its text as it comes, from any point, any number of times."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mixfleet.attendance import Attendance
from mixfleet.events import EventReader, Patience
from mixfleet.transport import Transport
from mixfleet_broker.errors import MessageError, MixfleetError, error_from_end
from mixfleet_broker.messages import (
    FinishReason,
    JobEnd,
    JobEvent,
    Requeued,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    ToolCall,
    Usage,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.tool_call_text import ToolCallParser

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResult:
    """A whole answer."""

    job_id: str
    model: str
    text: str
    """The answer; of a stream attached in mid-answer, the part after that point."""
    finish_reason: FinishReason
    usage: Usage
    worker_ids: tuple[str, ...]
    """The workers that ran the job, in order; more than one when one was lost or drained."""
    ttft_s: float | None
    """Submit to first token; None when this stream did not see both."""
    total_s: float | None
    """Submit to end; None when this stream did not see both."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that the model makes after its text."""
    tool_calls_problem: str | None = None
    """Why there may be more calls than those; None where all were read."""
    stop_string: str | None = None
    """The one that ended the answer, which is no part of ``text``; None if none did."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, for ``logprobs=``, see :attr:`ChatStream.logprobs`."""


class ChatStream:
    """One job's answer while it is being written.

    Iterate for the pieces of text, call :meth:`result` for the whole answer, or both: an
    iteration goes on where the last one stopped. As a context manager it cancels the job when
    the block is left before the end, unless :meth:`detach` was called::

        with client.chat("Tell a story") as stream:
            for text in stream:
                print(text, end="", flush=True)

    One thread reads a stream; :meth:`cancel`, :meth:`detach`, :meth:`position` and :meth:`status`
    may be called from any.
    """

    def __init__(
        self,
        transport: Transport,
        job_id: str,
        *,
        model: str,
        patience: Patience,
        after: str | None = None,
        is_owner: bool = True,
        clock: Callable[[], float] = time.monotonic,
        started_at: float | None = None,
        attendance: Attendance | None = None,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._attendance = attendance
        self._reader = EventReader(
            transport,
            job_id,
            model=model,
            after=after,
            patience=patience,
            clock=clock,
            started_at=started_at,
        )
        self._cancels_on_exit = is_owner
        self._times_count = is_owner
        self._pieces: list[str] = []
        self._tool_calls: ToolCallParser | None = None
        self._logprobs: list[TokenLogprob] = []
        self._num_prompt_tokens: int | None = None
        self._worker_ids: list[str] = []
        # Unknown in mid-answer until the first event tells.
        self._num_tokens: int | None = 0 if after is None else None
        self._first_token_at: float | None = None
        self._ended_at: float | None = None
        self._end: JobEnd | None = None
        self.job_id = job_id
        self.model = model

    @property
    def text(self) -> str:
        """The answer so far, as far as this stream was read; tool calls are no part of it."""
        return "".join(self._pieces)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the model calls, as far as their calls are whole."""
        return () if self._tool_calls is None else self._tool_calls.parsed().calls

    @property
    def tool_calls_problem(self) -> str | None:
        """Why there may be more calls than :attr:`tool_calls`; None where all were read.

        Such as that the answer ended at its longest length, or that the model wrote no list.
        """
        return None if self._tool_calls is None else self._tool_calls.parsed().problem

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """How likely each token was, as far as this stream was read; for ``logprobs=`` only.

        One per token, in order, those included that show no text: a token that ends the answer,
        and those of its stop string.
        """
        return tuple(self._logprobs)

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None until a run's first piece of the answer was read."""
        return self._num_prompt_tokens

    @property
    def last_event_id(self) -> str | None:
        """Where :meth:`Client.attach` would go on after what was read here."""
        return self._reader.last_event_id

    @property
    def end(self) -> JobEnd | None:
        """How the job ended; None while it has not, as far as this stream was read."""
        return self._end

    def next_event(self, timeout_s: float | None = None) -> JobEvent | None:
        """Wait for the next event of the job.

        Args:
            timeout_s: Longest wait; None waits as long as the stream's own timeouts allow.

        Returns:
            The event; None after the end, or when ``timeout_s`` passed without one.

        Raises:
            StreamTimeoutError: The stream's own time is over; the job goes on.
            BrokerUnavailableError: Redis was away for too long; the job goes on.
            UnknownJobError: The job, or what it had to say, is no longer kept.
        """
        if self._end is not None:
            return None
        event = self._reader.next_event(timeout_s)
        if event is not None:
            self._note(event)
        return event

    def events(self) -> Iterator[JobEvent]:
        """Iterate over all that happens to the job up to its :class:`JobEnd`, whatever that is."""
        while (event := self.next_event()) is not None:
            yield event

    def __iter__(self) -> Iterator[str]:
        """Iterate over the pieces of text as they come.

        Raises:
            JobError: The job did not end with an answer; ``.text`` holds what had come.
        """
        for event in self.events():
            if isinstance(event, TokenChunk) and event.part == "text" and event.text:
                yield event.text
        self._raise_if_failed()

    def result(self) -> ChatResult:
        """Wait for the end and return the whole answer.

        Raises:
            JobError: The job did not end with an answer; ``.text`` holds what had come.
            StreamTimeoutError: The stream's own time is over; the job goes on.
        """
        for _ in self:
            pass
        end = self._end
        if end is None or end.finish_reason is None or end.usage is None:
            raise MessageError(f"job {self.job_id} finished without a reason or usage: {end}")
        return ChatResult(
            job_id=self.job_id,
            model=self.model,
            text=self.text,
            finish_reason=end.finish_reason,
            usage=end.usage,
            worker_ids=tuple(self._worker_ids),
            ttft_s=self._since_submit(self._first_token_at),
            total_s=self._since_submit(self._ended_at),
            tool_calls=self.tool_calls,
            tool_calls_problem=self.tool_calls_problem,
            stop_string=end.stop_string,
            logprobs=self.logprobs,
        )

    def cancel(self, reason: str | None = None) -> None:
        """Stop the job wherever it is; harmless once it has ended.

        Args:
            reason: What whoever reads its answer is told.
        """
        self._transport.cancel(self.job_id, self.model, reason)

    def detach(self) -> str:
        """Let the job go on when the block is left; return its id, to attach again.

        Raises:
            MessageError: The job was sent to end with its reader.
        """
        if self._attendance is not None:
            raise MessageError(
                f"job {self.job_id} ends with its reader: send it with on_disconnect='continue'"
            )
        self._cancels_on_exit = False
        return self.job_id

    def position(self) -> int | None:
        """Return how many jobs are before this one in the queue; None once it is not queued."""
        return self._transport.position(self.job_id, self.model)

    def status(self) -> JobInfo:
        """Return where the job stands: its place, the tokens before it, when it may start.

        Raises:
            UnknownJobError: The job is no longer kept.
        """
        return self._transport.status(self.job_id, self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._attendance is not None:
            self._attendance.leave(self.job_id)
        if self._end is not None or not self._cancels_on_exit:
            return
        try:
            self.cancel()
        except MixfleetError as failure:
            # Leaving must not hide the reason for leaving; the job's own limits end it.
            logger.warning("cancel failed job_id=%s: %s", self.job_id, failure)

    def _note(self, event: JobEvent) -> None:
        if isinstance(event, RunStarted):
            self._worker_ids.append(event.worker_id)
            self._expect(event.num_tokens, "a new run")
        elif isinstance(event, Requeued):
            self._expect(event.num_tokens, "what follows a lost run")
        elif isinstance(event, TokenChunk):
            self._expect(event.num_tokens - len(event.token_ids), "the next chunk")
            self._num_tokens = event.num_tokens
            if self._first_token_at is None:
                self._first_token_at = self._clock()
            self._take_text(event)
            self._logprobs.extend(event.logprobs)
            if event.num_prompt_tokens is not None:
                self._num_prompt_tokens = event.num_prompt_tokens
        else:
            self._end = event
            self._ended_at = self._clock()
            if self._attendance is not None:
                self._attendance.leave(self.job_id)

    def _take_text(self, chunk: TokenChunk) -> None:
        if chunk.part == "text":
            self._pieces.append(chunk.text)
            return
        if self._tool_calls is None:
            self._tool_calls = ToolCallParser(self.job_id)
        self._tool_calls.push(chunk.text)

    def _expect(self, num_tokens: int, what: str) -> None:
        """Check that nothing was lost or said twice: ``what`` begins where the text ends."""
        if self._num_tokens is None:
            self._num_tokens = num_tokens
        if num_tokens != self._num_tokens:
            raise MessageError(
                f"job {self.job_id}: {what} begins after token {num_tokens}, "
                f"but {self._num_tokens} were read"
            )

    def _raise_if_failed(self) -> None:
        if self._end is not None and self._end.state != "finished":
            raise error_from_end(self._end, job_id=self.job_id)

    def _since_submit(self, moment: float | None) -> float | None:
        if moment is None or not self._times_count:
            return None
        return moment - self._reader.started_at
