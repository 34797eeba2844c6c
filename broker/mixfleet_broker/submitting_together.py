"""Many jobs into their queues in one round trip, each with an outcome of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError

from mixfleet_broker.errors import MessageError, MixfleetError
from mixfleet_broker.messages import ChatJob
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.redis_errors import raise_ours, redis_errors
from mixfleet_broker.submitting import submit_outcome
from mixfleet_broker.terms import JobTerms

Outcome = int | MixfleetError
"""What ``JobQueue.submit`` returns, or what it would have raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job on its way."""

    queue: JobQueue
    """Its rules ask for no durability beyond the server's: that is confirmed for each job alone."""
    job: ChatJob
    terms: JobTerms


def submit_together(redis: Redis, submissions: Sequence[Submission]) -> list[Outcome]:
    """Queue jobs and return the outcome of each, in their order.

    Args:
        redis: Where all the queues are.
        submissions: One is sent as ``JobQueue.submit`` does it.

    Raises:
        BrokerUnavailableError: No Redis answers; some jobs may be queued.
    """
    if len(submissions) == 1:
        return [_outcome(submissions[0], _submit)]
    outcomes: list[Outcome | None] = [None] * len(submissions)
    asked: list[int] = []
    with redis_errors(), redis.pipeline(transaction=False) as pipeline:
        for place, one in enumerate(submissions):
            try:
                one.queue.submit_on(pipeline, one.job, one.terms)
            except MessageError as error:
                outcomes[place] = error
            else:
                asked.append(place)
        replies = pipeline.execute(raise_on_error=False)
    for place, reply in zip(asked, replies, strict=True):
        outcomes[place] = _answered(submissions[place], reply)
    return [outcome for outcome in outcomes if outcome is not None]


def _answered(one: Submission, reply: Any) -> Outcome:
    if isinstance(reply, NoScriptError):  # `submit` gives the server its script again
        return _outcome(one, _submit)
    return _outcome(one, lambda one: _read(one, reply))


def _outcome(one: Submission, act: Callable[[Submission], int]) -> Outcome:
    try:
        return act(one)
    except MixfleetError as error:
        return error


def _submit(one: Submission) -> int:
    return one.queue.submit(one.job, one.terms)


def _read(one: Submission, reply: Any) -> int:
    if isinstance(reply, Exception):
        raise_ours(reply)
    return submit_outcome(reply, one.job, one.terms)
