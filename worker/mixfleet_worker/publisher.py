"""From the engine's tokens to what readers get: text, in order, and one end per job.

It holds the text filter of every answer in flight and returns values only: writes for the I/O
thread, and the ids of requests that the engine should forget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from mixfleet_broker.errors import (
    DeadlineExceededError,
    EngineFailedError,
    InvalidRequestError,
)
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    Usage,
)
from mixfleet_broker.queue import Lease
from mixfleet_engine.detokenizer import AnswerText, TextPiece
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
    traceparent: str | None = None
    first_token_at: float | None = None
    has_begun: bool = False
    """A chunk of this run is out."""

    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_tokens)

    def times(self, now: float) -> JobTimes:
        return JobTimes(
            claimed_at=self.claimed_at,
            first_token_at=self.first_token_at,
            ended_at=now,
            traceparent=self.traceparent,
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
            traceparent=job.traceparent,
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
            new, by_stop_string = self._advance(output, now)
            writes += new
            if new and isinstance(new[-1], EndWrite):
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

    def _advance(self, output: StepOutput, now: float) -> tuple[list[Write], bool]:
        """Return the writes of one output, and whether a stop string ended the answer."""
        answer = self._answers[output.request_id]
        if output.token_ids and answer.first_token_at is None:
            answer.first_token_at = now
        pieces: list[TextPiece] = []
        for token_id in output.token_ids:
            pieces.append(answer.text.push(token_id))
            if pieces[-1].stopped:
                break
        by_stop_string = bool(pieces) and pieces[-1].stopped
        num_before = answer.num_tokens
        answer.num_tokens += len(pieces)
        reason = "stop" if by_stop_string else output.finish_reason
        if reason == "error" or reason == "deadline" or reason == "grammar":
            return [_failed(answer, reason, now)], False
        chunks, lease = _chunks(answer, num_before, output, pieces), answer.lease
        if reason is None:
            return [ChunkWrite(lease=lease, chunk=chunk) for chunk in chunks], False
        chunks = _with_rest(chunks, answer)
        end = JobEnd(
            state="finished",
            finish_reason=reason,
            usage=answer.usage(),
            stop_string=answer.text.stop_string if by_stop_string else None,
        )
        # Nothing is new where the last run had delivered all and died before it said so.
        last = chunks.pop() if chunks else None
        write = EndWrite(lease=lease, end=end, chunk=last, times=answer.times(now))
        return [*(ChunkWrite(lease=lease, chunk=chunk) for chunk in chunks), write], by_stop_string


def _chunks(
    answer: _Answer, num_before: int, output: StepOutput, pieces: Sequence[TextPiece]
) -> list[TokenChunk]:
    """Return the chunks of one output, one of each part of the answer that it has tokens of.

    Args:
        answer: Whose they are.
        num_before: Tokens of the answer before these.
        output: At least one token for each piece.
        pieces: What each token added.
    """
    chunks: list[TokenChunk] = []
    num_used = 0
    for part, group in groupby(pieces, key=lambda piece: piece.part):
        texts = [piece.text for piece in group]
        end = num_used + len(texts)
        token_ids = output.token_ids[num_used:end]
        is_first, answer.has_begun = not answer.has_begun, True
        chunks.append(
            TokenChunk(
                num_tokens=num_before + end,
                text="".join(texts),
                token_ids=token_ids,
                part=part,
                logprobs=wire_logprobs(
                    answer.text.tokenizer, token_ids, output.logprobs[num_used:end]
                ),
                num_prompt_tokens=answer.num_prompt_tokens if is_first else None,
            )
        )
        num_used = end
    return chunks


def _with_rest(chunks: list[TokenChunk], answer: _Answer) -> list[TokenChunk]:
    """Return the last chunks of an answer, with what was held back of it until its end."""
    rest = answer.text.finish()
    if not rest:
        return chunks
    if chunks:
        # Where the last token itself began another part, nothing of that can have been held back.
        return [*chunks[:-1], replace(chunks[-1], text=chunks[-1].text + rest)]
    return [
        TokenChunk(
            num_tokens=answer.num_tokens,
            text=rest,
            token_ids=(),
            part=answer.text.part,
            num_prompt_tokens=None if answer.has_begun else answer.num_prompt_tokens,
        )
    ]


def _failed(
    answer: _Answer, reason: Literal["error", "deadline", "grammar"], now: float
) -> EndWrite:
    """Return the end of an answer that cannot go on."""
    kind, why = {
        "error": (EngineFailedError, "the model's numbers are not finite"),
        "deadline": (DeadlineExceededError, "the job's time was over"),
        "grammar": (InvalidRequestError, "the output format led where nothing can follow"),
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
