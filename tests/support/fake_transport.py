"""A fleet in memory, with a clock of its own: reading blocks by moving the clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixfleet_broker.errors import BrokerUnavailableError, UnknownJobError
from mixfleet_broker.inquiry_codec import Inquiry, InquiryAnswer
from mixfleet_broker.messages import (
    TERMINAL_STATES,
    ChatJob,
    FinishReason,
    JobEnd,
    JobEvent,
    JobState,
    RunStarted,
    TokenChunk,
    Usage,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.terms import JobTerms


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeJob:
    job: ChatJob
    state: JobState = "queued"
    events: list[tuple[float, str, JobEvent]] = field(default_factory=list)
    """When it can be seen, its id, and the event."""


class FakeTransport:
    """Implements ``mixfleet.transport.Transport``; ``answers`` scripts what each new job gets."""

    def __init__(self, clock: FakeClock, *answers: list[tuple[float, JobEvent]]) -> None:
        self.clock = clock
        self.answers = list(answers)
        self.jobs: dict[str, FakeJob] = {}
        self.terms: list[JobTerms] = []
        self.attended: list[str] = []
        self.expired: list[str] = []
        self.cancelled: list[str] = []
        self.served: tuple[str, ...] = ("tiny",)
        self.workers = 1
        """Live workers of each model in ``live``."""
        self.live: tuple[str, ...] | None = None
        """Models with workers; None for all that are served."""
        self.outage_until = 0.0
        self.interrupt_after: int | None = None
        """Raise KeyboardInterrupt when this many events were read."""
        self.closed = False
        self.inquiries: list[tuple[str, Inquiry, float]] = []
        self.inquiry_answer = InquiryAnswer(num_tokens=0, context_length=0, max_answer_tokens=0)
        self.read_calls = 0

    def submit(self, job: ChatJob, terms: JobTerms) -> int:
        self._check()
        self.terms.append(terms)
        if job.job_id not in self.jobs:
            self.jobs[job.job_id] = FakeJob(job)
            if self.answers:
                self.schedule(job.job_id, self.answers.pop(0))
        return len(self.jobs) - 1

    def schedule(self, job_id: str, events: list[tuple[float, JobEvent]]) -> None:
        """Let events appear, each so many seconds after the one before."""
        kept = self.jobs[job_id].events
        at = max([self.clock.now, *(when for when, _, _ in kept)])
        for delay, event in events:
            at += delay
            kept.append((at, f"7-{len(kept) + 1}", event))

    def read(self, job_id: str, after: str, block_s: float) -> list[tuple[str, JobEvent]]:
        self.read_calls += 1
        self._check()
        number = int(after.partition("-")[2])
        events = self.jobs[job_id].events[number:] if job_id in self.jobs else []
        if not events or events[0][0] > self.clock.now + block_s:
            self.clock.sleep(block_s)
            return []
        self.clock.now = max(self.clock.now, events[0][0])
        if self.interrupt_after is not None and number >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt
        _, event_id, event = events[0]
        if isinstance(event, JobEnd):
            self.jobs[job_id].state = event.state
        return [(event_id, event)]

    def attend(self, job_ids: Sequence[str]) -> None:
        self._check()
        self.attended += job_ids

    def expire(self, job_id: str, model: str) -> None:
        self._known(job_id, model)
        self.expired.append(job_id)

    def cancel(self, job_id: str, model: str, reason: str | None = None) -> None:
        job = self._known(job_id, model)
        self.cancelled.append(job_id)
        if job.state not in TERMINAL_STATES:
            job.events = [entry for entry in job.events if entry[0] <= self.clock.now]
            self.schedule(job_id, [(0, JobEnd(state="canceled", message=reason))])

    def position(self, job_id: str, model: str) -> int | None:
        return 0 if self._known(job_id, model).state == "queued" else None

    def status(self, job_id: str, model: str) -> JobInfo:
        kept = self._known(job_id, model)
        return JobInfo(
            job_id=job_id,
            state=kept.state,
            position=self.position(job_id, model),
            worker_id=None,
            attempt=0,
            num_losses=0,
            num_workers=self.num_workers(model),
        )

    def model_of(self, job_id: str) -> str:
        return self._known(job_id).job.model

    def models(self) -> tuple[str, ...]:
        self._check()
        return self.served

    def num_workers(self, model: str) -> int:
        self._check()
        return self.workers if model in (self.live or self.served) else 0

    def ask(self, model: str, inquiry: Inquiry, timeout_s: float) -> InquiryAnswer:
        self._check()
        self.inquiries.append((model, inquiry, timeout_s))
        return self.inquiry_answer

    def close(self) -> None:
        self.closed = True

    def _known(self, job_id: str, model: str | None = None) -> FakeJob:
        self._check()
        kept = self.jobs.get(job_id)
        if kept is None:
            raise UnknownJobError(job_id=job_id)
        assert model in (None, kept.job.model)
        return kept

    def _check(self) -> None:
        if self.clock.now < self.outage_until:
            self.clock.sleep(2.0)
            raise BrokerUnavailableError("no Redis answers")


def answer(
    *texts: str,
    delay_s: float = 0.5,
    finish_reason: FinishReason = "stop",
    worker_id: str = "gpu-0",
) -> list[tuple[float, JobEvent]]:
    """A whole answer, one token per text."""
    events: list[tuple[float, JobEvent]] = [
        (delay_s, RunStarted(run=7, worker_id=worker_id, num_tokens=0))
    ]
    events += [(delay_s, chunk(number, text)) for number, text in enumerate(texts, 1)]
    usage = Usage(prompt_tokens=5, completion_tokens=len(texts))
    events.append((0.0, JobEnd(state="finished", finish_reason=finish_reason, usage=usage)))
    return events


def chunk(number: int, text: str) -> TokenChunk:
    """The chunk that ends with token ``number``."""
    return TokenChunk(num_tokens=number, text=text, token_ids=(number,))


def fleet(*answers: list[tuple[float, JobEvent]]) -> tuple[FakeTransport, FakeClock]:
    """A transport and its clock."""
    clock = FakeClock()
    return FakeTransport(clock, *answers), clock
