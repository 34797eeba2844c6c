"""Clients that submit, read, let go and come back, cancel, and check every answer."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from mixfleet import ChatStream, Client, JobEvent, Requeued, TokenChunk, new_job_id
from mixfleet.errors import (
    BrokerError,
    BrokerUnavailableError,
    JobCancelledError,
    JobFailedError,
    MessageError,
)
from mixfleet_broker.settings import resolve
from mixfleet_broker.terms import PRIORITIES
from support.undisturbed import undisturbed_text

T = TypeVar("T")

LETS_GO = 0.15
"""Share of readers that leave in mid-answer and come back as another client."""
CANCELS = 0.05
TENANTS = ("a", "b", "c")
RETRY_S = 0.5


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a client saw of one job."""

    job_id: str
    expected: str
    """The undisturbed answer."""
    was_cancelled: bool = False
    """The client asked for it; the answer may have been faster."""
    is_canceled: bool = False
    ended: bool = False
    code: str | None = None
    """Of the failure."""
    is_wrong: bool = False
    """Its text is another than the undisturbed one."""
    is_torn: bool = False
    """The reader found a gap or a repeat."""
    recovery_s: list[float] = field(default_factory=list)
    """Silences between two tokens of which a lost worker was the reason."""


class Crowd:
    """Clients in threads; a context manager, which ends them.

    Args:
        url: Of Redis.
        model: Whom they ask.
        num_clients: How many ask at once.
        seed: Of chance.
    """

    def __init__(self, url: str, model: str, *, num_clients: int, seed: int) -> None:
        settings = {"redis": url, "model": model, "result_ttl_s": 7200.0}
        self._settings = [resolve({**settings, "tenant": tenant}) for tenant in TENANTS]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on_and_on, args=(random.Random(f"{seed} {n}"), n))
            for n in range(num_clients)
        ]
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(10.0)

    def finish(self, limit_s: float) -> None:
        """Ask nothing more and wait for the last answers, for so long."""
        self._over.set()
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _ask_on_and_on(self, source: random.Random, number: int) -> None:
        settings = self._settings[number % len(TENANTS)]
        asked = 0
        while not self._over.is_set():
            asked += 1
            question = f"question {asked} of client {number}"
            with Client(settings=settings) as client, Client(settings=settings) as other:
                self._ask(client, other, question, source)

    def _ask(self, client: Client, other: Client, question: str, source: random.Random) -> None:
        max_tokens, job_id = source.randint(5, 120), new_job_id()
        seed = source.randrange(1000)
        expected = undisturbed_text(question, max_tokens, seed=seed)
        priority = source.choice(PRIORITIES)
        while True:
            try:
                stream = client.chat(
                    question,
                    max_tokens=max_tokens,
                    temperature=0.0,
                    seed=seed,
                    priority=priority,
                    job_id=job_id,
                )
                break
            except BrokerError:
                # Redis is away. The same id is the same job, whether or not it has arrived.
                if self._over.wait(RETRY_S):
                    return
        outcome = Outcome(job_id=job_id, expected=expected)
        self.outcomes.append(outcome)
        try:
            _read(stream, other, outcome, source)
        except MessageError:
            outcome.is_torn = True


def _read(stream: ChatStream, other: Client, outcome: Outcome, source: random.Random) -> None:
    """Read to the end, be it in two halves, and note what came."""
    leaves_at = source.randint(1, 20) if source.random() < LETS_GO else None
    cancels_at = source.randint(1, 20) if source.random() < CANCELS else None
    text, said_at, was_lost = "", time.monotonic(), False
    while True:
        event = _next_event(stream)
        if event is None:
            break
        if isinstance(event, Requeued):
            was_lost = was_lost or event.reason == "lost"
        if not isinstance(event, TokenChunk):
            continue
        now = time.monotonic()
        if was_lost:
            outcome.recovery_s.append(now - said_at)
        text, said_at, was_lost = text + event.text, now, False
        if leaves_at is not None and event.num_tokens >= leaves_at:
            leaves_at = None
            stream = _again(other, stream)
        if cancels_at is not None and event.num_tokens >= cancels_at:
            cancels_at = None
            outcome.was_cancelled = True
            _insist(partial(stream.cancel))
    outcome.ended = stream.end is not None
    _judge(stream, text, outcome)


def _judge(stream: ChatStream, text: str, outcome: Outcome) -> None:
    try:
        stream.result()
        outcome.is_wrong = text != outcome.expected
    except JobCancelledError:
        outcome.is_canceled = True
        outcome.is_wrong = not outcome.expected.startswith(text)
    except JobFailedError as error:
        outcome.code = error.code
        outcome.is_wrong = not outcome.expected.startswith(text)


def _next_event(stream: ChatStream) -> JobEvent | None:
    return _insist(stream.next_event)


def _again(other: Client, stream: ChatStream) -> ChatStream:
    """Go on as another client, from the last event that was read."""
    return _insist(lambda: other.attach(stream.job_id, after=stream.last_event_id))


def _insist(call: Callable[[], T]) -> T:
    """Call again while Redis is away."""
    while True:
        try:
            return call()
        except BrokerUnavailableError:
            time.sleep(RETRY_S)
