"""The limits of API keys: one atomic script for all gateways, so that a limit is one limit.

A limit of n a minute is a bucket that holds n and loses n/60 a second: n at once, then as they
come back. Tokens are charged before a job runs, as many as it may take at most, and what it did
not use is given back when it has ended, by whichever gateway sees that. A job that nobody settles,
because its gateway died, has used what it was charged; its place among the unfinished is free again
once the job has ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from redis import Redis

from mixfleet_broker.errors import RateLimitedError, RequestOverLimitError
from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.lua import Argument, ScriptName, Scripts
from mixfleet_broker.names import check_job_id
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.schema import integer
from mixfleet_broker.terms import QueueRules

LimitName = Literal["requests", "tokens", "tokens_day", "jobs"]
MAX_JOBS = 1000
"""Jobs of one request."""
MAX_TOKENS = 10**9
"""Tokens of one job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """How far a limit is used."""

    name: LimitName
    """Requests and tokens are those of a minute, jobs those that have not ended."""
    limit: int
    remaining: int
    reset_s: float
    """Until all of it remains, if nobody asks meanwhile; 0 for jobs: nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request that its key's limits allow, and that is charged to them."""

    key_id: str
    job_ids: tuple[str, ...]
    tokens: int
    """Charged for each job."""
    states: tuple[LimitState, ...]
    """Of each limit that the key has, with this request."""


class KeyLimits:
    """What API keys have used. Safe to share between threads.

    Every call may be repeated after a lost reply.

    Args:
        redis: A client whose replies are bytes.
        prefix: Before all keys, on a server that is shared with others.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(self, redis: Redis, *, prefix: str = "") -> None:
        self._scripts = Scripts(redis, prefix)

    def admit(self, record: KeyRecord, job_ids: Sequence[str], tokens: int) -> Admission:
        """Charge one request to a key, before its jobs are submitted.

        Args:
            record: The key.
            job_ids: Of the request's jobs, one for each of its choices, all new.
            tokens: Expected of each of them: of its prompt, and the most that its answer may have.

        Raises:
            RateLimitedError: A limit is reached; nothing was charged.
            RequestOverLimitError: The request alone is more than a limit of the key.
            MessageError: An id or a number cannot be used.
        """
        integer(len(job_ids), "jobs", 1, MAX_JOBS)
        integer(tokens, "tokens", 0, MAX_TOKENS)
        reply = self._admit(record, [check_job_id(job_id) for job_id in job_ids], tokens)
        outcome, name, limit, load, retry_ms, states = reply
        if outcome == b"refused":
            asked = {"requests": 1, "jobs": len(job_ids)}.get(name.decode(), tokens * len(job_ids))
            raise _refusal(record, name.decode(), limit, load, asked, retry_ms, _states(states))
        return Admission(
            key_id=record.key_id, job_ids=tuple(job_ids), tokens=tokens, states=_states(states)
        )

    def states(self, record: KeyRecord) -> tuple[LimitState, ...]:
        """Return how far each limit of a key is used; changes nothing."""
        return _states(self._admit(record, [], 0)[5])

    def settle(self, record: KeyRecord, used: Mapping[str, int]) -> int:
        """Give back what jobs that have ended were charged and did not use.

        Args:
            record: The key that they were charged to.
            used: Tokens of prompt and answer by job id. More than was charged is not charged.

        Returns:
            How many of the jobs had not been settled before.
        """
        return self._settle(record, used, with_request=False)

    def refund(self, record: KeyRecord, admission: Admission) -> int:
        """Give back all of a request whose jobs were not submitted; see :meth:`settle`."""
        return self._settle(record, dict.fromkeys(admission.job_ids, 0), with_request=True)

    def _admit(self, record: KeyRecord, job_ids: list[str], tokens: int) -> Any:
        limits = record.limits
        numbers = (
            limits.requests_per_min,
            limits.tokens_per_min,
            limits.tokens_per_day,
            limits.max_parallel_jobs,
        )
        return self._run("admit", record.key_id, *map(_or_none, numbers), tokens, *job_ids)

    def _settle(self, record: KeyRecord, used: Mapping[str, int], *, with_request: bool) -> int:
        pairs: list[Argument] = []
        for job_id, tokens in used.items():
            pairs += [check_job_id(job_id), integer(tokens, "tokens", 0, MAX_TOKENS)]
        return int(
            self._run(
                "settle",
                record.key_id,
                _or_none(record.limits.requests_per_min),
                _or_none(record.limits.tokens_per_min),
                int(with_request),
                *pairs,
            )
        )

    def _run(self, name: ScriptName, key_id: str, *args: Argument) -> Any:
        with redis_errors():
            return self._scripts.run(name, key_id, *args)


def rules_for(record: KeyRecord, rules: QueueRules) -> QueueRules:
    """Return the rules for submitting a key's jobs: with its own limits of what waits."""
    jobs, tokens = record.limits.max_queued_jobs, record.limits.max_queued_tokens
    return replace(
        rules,
        tenant_queue_limit=rules.tenant_queue_limit if jobs is None else jobs,
        tenant_token_limit=rules.tenant_token_limit if tokens is None else tokens,
    )


def _or_none(limit: int | None) -> int:
    return -1 if limit is None else limit


def _states(replies: list[Any]) -> tuple[LimitState, ...]:
    return tuple(
        LimitState(name=name.decode(), limit=limit, remaining=remaining, reset_s=reset_ms / 1000)
        for name, limit, remaining, reset_ms in replies
    )


def _refusal(
    record: KeyRecord,
    name: str,
    limit: int,
    load: int,
    asked: int,
    retry_ms: int,
    states: tuple[LimitState, ...],
) -> RateLimitedError:
    if retry_ms < 0:
        return RequestOverLimitError(
            key_id=record.key_id, name=name, limit=limit, asked=asked, states=states
        )
    return RateLimitedError(
        key_id=record.key_id,
        name=name,
        limit=limit,
        load=load,
        retry_after_s=retry_ms / 1000,
        states=states,
    )
