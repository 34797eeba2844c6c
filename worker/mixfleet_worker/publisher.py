"""From the engine's tokens to what readers get: text, in order, and one end per job.

It holds the text filter of every answer in flight and returns values only: writes for the I/O
thread, and the ids of requests that the engine should forget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mixfleet_broker.errors import DeadlineExceededError, EngineFailedError
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    Usage,
)
from mixfleet_broker.queue import Lease
from mixfleet_engine.detokenizer import AnswerText
from mixfleet_engine.request import StepOutput
from mixfleet_worker.handoff import ChunkWrite, EndWrite, JobTimes, TakenJob, Write
from mixfleet_worker.intake import AdmittedJob, CompleteJob
from mixfleet_worker.token_logprobs import wire_logprobs


@dataclass(slots=True, kw_only=True)
class _Answer:
    """One answer in flight."""

    lease: Lease
    text: AnswerText
    num_prompt_tokens: int
    num_tokens: int
    claimed_at: float
    first_token_at: float | None = None
    has_begun: bool = False
    """A chunk of this run is out."""

    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_tokens)

    def times(self, now: float) -> JobTimes:
        return JobTimes(
            claimed_at=self.claimed_at, first_token_at=self.first_token_at, ended_at=now
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What one step gave."""

    writes: tuple[Write, ...]
    stopped: tuple[str, ...]
    """Requests that ended by a stop string, which the engine cannot see: abort them there."""


class Publisher:
    """The answers in flight, by job id."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}

    @property
    def num_open(self) -> int:
        """Answers in flight."""
        return len(self._answers)

    @property
    def leases(self) -> list[Lease]:
        """The leases of all answers in flight."""
        return [answer.lease for answer in self._answers.values()]

    def lease_of(self, job_id: str) -> Lease | None:
        """Return the lease under which the job is in flight here, if it is."""
        answer = self._answers.get(job_id)
        return None if answer is None else answer.lease

    def open(self, job: AdmittedJob) -> None:
        """Begin the answer of a job that the engine has taken."""
        self._answers[job.lease.job_id] = _Answer(
            lease=job.lease,
            text=job.text,
            num_prompt_tokens=len(job.request.prompt_token_ids),
            num_tokens=len(job.request.output_token_ids),
            claimed_at=job.claimed_at,
        )

    def drop(self, job_id: str) -> None:
        """Forget an answer without a word to its reader: the job is not ours any more."""
        self._answers.pop(job_id, None)

    def publish(self, outputs: Sequence[StepOutput], now: float) -> Published:
        """Turn the new tokens of one step into writes.

        Args:
            outputs: Of requests that were opened here and not dropped.
            now: The worker's monotonic clock.
        """
        writes: list[Write] = []
        stopped: list[str] = []
        for output in outputs:
            write, by_stop_string = self._advance(output, now)
            writes.append(write)
            if isinstance(write, EndWrite):
                del self._answers[output.request_id]
            if by_stop_string and output.finish_reason is None:
                stopped.append(output.request_id)
        return Published(writes=tuple(writes), stopped=tuple(stopped))

    def fail_all(self, code: str, message: str, now: float) -> list[EndWrite]:
        """End every answer in flight as failed and forget it."""
        ends = [
            EndWrite(
                lease=answer.lease,
                end=JobEnd(state="failed", code=code, message=message, usage=answer.usage()),
                times=answer.times(now),
            )
            for answer in self._answers.values()
        ]
        self._answers.clear()
        return ends

    def _advance(self, output: StepOutput, now: float) -> tuple[Write, bool]:
        """Return the write of one output, and whether a stop string ended the answer."""
        answer = self._answers[output.request_id]
        if output.token_ids and answer.first_token_at is None:
            answer.first_token_at = now
        pieces: list[str] = []
        by_stop_string = False
        num_used = 0
        for token_id in output.token_ids:
            piece = answer.text.push(token_id)
            pieces.append(piece.text)
            num_used += 1
            if piece.stopped:
                by_stop_string = True
                break
        answer.num_tokens += num_used
        if output.finish_reason == "error" or output.finish_reason == "deadline":
            return _failed(answer, output.finish_reason, now), False
        reason = "stop" if by_stop_string else output.finish_reason
        if reason is not None:
            pieces.append(answer.text.finish())
        chunk = _chunk(answer, "".join(pieces), output, num_used)
        if reason is None:
            return ChunkWrite(lease=answer.lease, chunk=chunk), False
        end = JobEnd(
            state="finished",
            finish_reason=reason,
            usage=answer.usage(),
            stop_string=answer.text.stop_string if by_stop_string else None,
        )
        write = EndWrite(lease=answer.lease, end=end, chunk=chunk, times=answer.times(now))
        return write, by_stop_string


def _chunk(answer: _Answer, text: str, output: StepOutput, num_used: int) -> TokenChunk:
    """Return the chunk of the first ``num_used`` tokens of an output."""
    token_ids = output.token_ids[:num_used]
    is_first, answer.has_begun = not answer.has_begun, True
    return TokenChunk(
        num_tokens=answer.num_tokens,
        text=text,
        token_ids=token_ids,
        logprobs=wire_logprobs(answer.text.tokenizer, token_ids, output.logprobs),
        num_prompt_tokens=answer.num_prompt_tokens if is_first else None,
    )


def _failed(answer: _Answer, reason: Literal["error", "deadline"], now: float) -> EndWrite:
    """Return the end of an answer that cannot go on."""
    kind, why = {
        "error": (EngineFailedError, "the model's numbers are not finite"),
        "deadline": (DeadlineExceededError, "the job's time was over"),
    }[reason]
    end = JobEnd(
        state="failed",
        code=kind.code,
        message=f"{why} after {answer.num_tokens} tokens",
        usage=answer.usage(),
    )
    return EndWrite(lease=answer.lease, end=end, times=answer.times(now))


def rejection(taken: TakenJob, code: str, message: str, now: float) -> EndWrite:
    """Return the end of a job that cannot run here."""
    return EndWrite(
        lease=taken.claimed.lease,
        end=JobEnd(state="failed", code=code, message=message),
        times=JobTimes(claimed_at=taken.claimed_at, ended_at=now),
    )


def completion(job: CompleteJob, now: float) -> EndWrite:
    """Return the end of a job whose answer earlier runs had delivered whole."""
    usage = Usage(prompt_tokens=job.num_prompt_tokens, completion_tokens=job.num_tokens)
    return EndWrite(
        lease=job.lease,
        end=JobEnd(
            state="finished",
            finish_reason=job.finish_reason,
            usage=usage,
            stop_string=job.stop_string,
        ),
        chunk=job.chunk,
        times=JobTimes(claimed_at=job.claimed_at, ended_at=now),
    )
