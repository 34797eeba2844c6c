"""A worker in a thread that answers what a test tells it to, chunk by chunk."""

import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mixfleet_broker.connection import connect
from mixfleet_broker.inquiries import InquiryBox
from mixfleet_broker.inquiry_codec import InquiryAnswer, encode_answer
from mixfleet_broker.job_codec import decode_job
from mixfleet_broker.messages import (
    AnswerPart,
    ChatJob,
    FinishReason,
    JobEnd,
    TokenChunk,
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.records import ClaimedJob
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import append_chunk

WAKE_UP_S = 0.02
LEASE_S = 15.0
CONTEXT_LENGTH = 8192
NUM_PROMPT_TOKENS = 7


@dataclass(frozen=True, slots=True)
class Scripted:
    """One answer.

    Args:
        pieces: Each is a token of a part.
        finish_reason: Why it ends.
        stop_string: Which string ended it.
        code: Of the error that it ends with instead.
    """

    pieces: tuple[tuple[AnswerPart, str], ...]
    finish_reason: FinishReason = "stop"
    stop_string: str | None = None
    code: str | None = None

    def end(self) -> JobEnd:
        """How it ends."""
        usage = Usage(prompt_tokens=NUM_PROMPT_TOKENS, completion_tokens=len(self.pieces))
        if self.code is not None:
            return JobEnd(state="failed", code=self.code, message="as scripted", usage=usage)
        return JobEnd(
            state="finished",
            finish_reason=self.finish_reason,
            stop_string=self.stop_string,
            usage=usage,
        )


class AnswerWorker:
    """Serves ``model``, one job at a time, with the answers of :attr:`script` in turn.

    A job waits in the queue while there is no answer for it. Whoever asks if it would take a job
    hears that it would.
    """

    def __init__(self, url: str, model: str = "tiny") -> None:
        self._redis = connect(url)
        self._queue = JobQueue(self._redis, model, QueueRules(lease_s=LEASE_S))
        self._inquiries = InquiryBox(self._redis, model)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        record = WorkerRecord.of_this_process(
            worker_id="answers",
            model=model,
            max_batch_size=1,
            context_length=CONTEXT_LENGTH,
            started_at=time.time(),
        )
        self._registration = Registration(self._redis, record, lease_s=LEASE_S)
        self.script: deque[Scripted] = deque()
        self.jobs: list[ChatJob] = []
        """What it was asked."""

    def _run(self) -> None:
        while not self._stop.is_set():
            self._registration.beat(state="idle", in_flight=0)
            if self.script:
                for claimed in self._queue.claim("answers", 1, new_job_id()):
                    self._answer(claimed)
            asked = self._inquiries.wait(WAKE_UP_S)
            if asked is not None:
                self._inquiries.give(asked.inquiry_id, encode_answer(_YES))

    def _answer(self, claimed: ClaimedJob) -> None:
        self.jobs.append(decode_job(claimed.payload))
        scripted = self.script.popleft()
        for number, (part, text) in enumerate(scripted.pieces, 1):
            chunk = TokenChunk(
                num_tokens=number,
                text=text,
                token_ids=(number,),
                part=part,
                num_prompt_tokens=NUM_PROMPT_TOKENS if number == 1 else None,
            )
            append_chunk(self._queue, claimed.lease, chunk)
        self._queue.finish(claimed.lease, scripted.end())

    def __enter__(self) -> Self:
        self._registration.beat(state="idle", in_flight=0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._registration.deregister()
        self._redis.close()


_YES = InquiryAnswer(
    num_tokens=NUM_PROMPT_TOKENS, context_length=CONTEXT_LENGTH, max_answer_tokens=CONTEXT_LENGTH
)
