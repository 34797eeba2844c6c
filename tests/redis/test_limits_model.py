"""The limits of a key against a slow and obvious model, over random requests and times."""

import random
from dataclasses import dataclass, field
from typing import Final

import pytest
from redis import Redis

from mixfleet_broker.errors import RateLimitedError, RequestOverLimitError
from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.keys import JOB
from mixfleet_broker.limits import Admission, KeyLimits, LimitState
from support.api_keys import key_record, put_job
from support.lua_clock import LuaClock
from support.plain_limits import DAY_MS, NEVER, PlainLimits, Refusal, State

NUM_STEPS: Final = 300
SEEDS: Final = range(12)


def some_limits(rng: random.Random) -> dict[str, int]:
    """Numbers of which many divide no minute, so that every rounding matters."""
    return {
        "requests_per_min": rng.choice([1, 7, 60, 977]),
        "tokens_per_min": rng.choice([100, 997, 60_000]),
        "tokens_per_day": rng.choice([500, 10_000, 10**12]),
        "max_parallel_jobs": rng.choice([2, 5, 100]),
    }


def as_told(states: tuple[LimitState, ...]) -> list[State]:
    return [(s.name, s.limit, s.remaining, round(s.reset_s * 1000)) for s in states]


def asked(
    limits: KeyLimits, record: KeyRecord, job_ids: list[str], tokens: int
) -> Admission | RateLimitedError:
    """What a request meets."""
    try:
        return limits.admit(record, job_ids, tokens)
    except RateLimitedError as error:
        return error


def as_refusal(error: RateLimitedError) -> Refusal:
    if isinstance(error, RequestOverLimitError):
        return Refusal(error.name, error.limit, NEVER, None)
    assert error.retry_after_s is not None
    return Refusal(error.name, error.limit, round(error.retry_after_s * 1000), error.load)


@dataclass
class Run:
    """One key in Redis and in the model, and the jobs that they have admitted."""

    redis: Redis
    clock: LuaClock
    rng: random.Random
    admissions: list[Admission] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.record: KeyRecord = key_record(**some_limits(self.rng))
        self.limits = KeyLimits(self.redis)
        self.plain = PlainLimits(self.record.limits)
        self._num_jobs = 0

    def step(self) -> None:
        actions = [self.wait, self.ask, self.ask, self.ask, self.settle, self.refund, self.end_job]
        self.rng.choice(actions)()
        assert as_told(self.limits.states(self.record)) == self.plain.states(self.clock.now_ms)

    def wait(self) -> None:
        kind = self.rng.random()
        if kind < 0.05:  # to within a moment of midnight
            left = DAY_MS - self.clock.now_ms % DAY_MS
            self.clock.advance(max(0, left + self.rng.randint(-1, 1)))
        elif kind < 0.3:
            self.clock.advance(self.rng.randint(1_000, 90_000))
        else:
            self.clock.advance(self.rng.randint(0, 1_000))

    def ask(self) -> None:
        job_ids = [f"job{self._num_jobs + i}" for i in range(self.rng.choice([1, 1, 1, 2, 3]))]
        self._num_jobs += len(job_ids)
        tokens = self.rng.choice([0, 1, 7, 50, 333])
        expected = self.plain.admit(self.clock.now_ms, job_ids, tokens)
        answer = asked(self.limits, self.record, job_ids, tokens)
        assert as_told(answer.states) == self.plain.states(self.clock.now_ms)
        if isinstance(answer, RateLimitedError):
            assert as_refusal(answer) == expected
            return
        assert expected is None
        assert asked(self.limits, self.record, job_ids, tokens) == answer  # a lost reply
        self.admissions.append(answer)
        for job_id in job_ids:
            if self.rng.random() < 0.8:  # else its gateway dies before it submits
                self.set_status(job_id, "queued")

    def settle(self) -> None:
        for job_id in self.some_job_ids():
            used = {job_id: self.rng.choice([0, 1, 20, 400])}
            now_ms = self.clock.now_ms
            assert self.limits.settle(self.record, used) == self.plain.settle(now_ms, used)

    def refund(self) -> None:
        if self.admissions:
            admission = self.rng.choice(self.admissions)
            used = dict.fromkeys(admission.job_ids, 0)
            expected = self.plain.settle(self.clock.now_ms, used, with_request=True)
            assert self.limits.refund(self.record, admission) == expected

    def end_job(self) -> None:
        for job_id in self.some_job_ids():
            self.set_status(job_id, self.rng.choice(["started", "finished", "failed", ""]))

    def some_job_ids(self) -> tuple[str, ...]:
        return self.rng.choice(self.admissions[-5:]).job_ids if self.admissions else ()

    def set_status(self, job_id: str, status: str) -> None:
        if status:
            put_job(self.redis, job_id, status)
            self.plain.statuses[job_id] = status
        else:
            self.redis.delete(JOB(job_id))
            self.plain.statuses.pop(job_id, None)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_limits_are_those_of_the_model(redis: Redis, lua_clock: LuaClock, seed: int) -> None:
    run = Run(redis, lua_clock, random.Random(seed))
    for _ in range(NUM_STEPS):
        run.step()
    assert run.admissions


@pytest.mark.parametrize("seed", SEEDS)
def test_who_asks_at_the_named_time_is_admitted_and_not_a_moment_before(
    redis: Redis, lua_clock: LuaClock, seed: int
) -> None:
    rng = random.Random(seed)
    record = key_record(
        requests_per_min=rng.choice([7, 61]), tokens_per_min=997, tokens_per_day=9973
    )
    limits, num_refused = KeyLimits(redis), 0
    for i in range(NUM_STEPS):
        lua_clock.advance(rng.randint(0, 500))
        request = ([f"job{i}"], rng.choice([1, 7, 50, 90]))
        answer = asked(limits, record, *request)
        if isinstance(answer, RateLimitedError):
            num_refused += 1
            wait_ms = as_refusal(answer).retry_ms
            lua_clock.advance(wait_ms - 1)
            still = asked(limits, record, *request)
            assert isinstance(still, RateLimitedError)
            assert as_refusal(still).retry_ms == 1
            lua_clock.advance(1)
            limits.admit(record, *request)
    assert num_refused > 10
