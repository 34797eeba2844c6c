"""A slow and obvious model of the limits of one API key: it keeps all that ever happened.

A bucket is replayed from its beginning at each question, in fractions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from mixfleet_broker.key_records import Limits

MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
SUBMIT_MS: Final = 30_000
SWEEP_MS: Final = 1_000
NEVER: Final = -1

State = tuple[str, int, int, int]
"""Limit, its number, what remains, ms until all of it does."""


@dataclass(frozen=True)
class Refusal:
    name: str
    limit: int
    retry_ms: int
    load: int | None
    """None where the request alone is too large."""


class PlainBucket:
    """What comes in leaks out at ``limit`` a minute."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._events: list[tuple[int, Fraction]] = []
        """What was put in, or taken out, at which ms."""

    def leaked_in(self, ms: int) -> Fraction:
        return Fraction(self.limit * ms, MINUTE_MS)

    def level(self, now_ms: int) -> Fraction:
        level, last = Fraction(0), 0
        for at, amount in [*self._events, (now_ms, Fraction(0))]:
            level = max(Fraction(0), level - self.leaked_in(at - last))
            level = max(Fraction(0), level + amount)
            last = at
        return level

    def add(self, now_ms: int, amount: Fraction | int) -> None:
        self._events.append((now_ms, Fraction(amount)))

    def wait_ms(self, now_ms: int, amount: int) -> int:
        over = self.level(now_ms) + amount - self.limit
        return max(0, math.ceil(over * MINUTE_MS / self.limit))

    def state(self, name: str, now_ms: int) -> State:
        level = self.level(now_ms)
        reset = math.ceil(level * MINUTE_MS / self.limit)
        return (name, self.limit, max(0, math.floor(self.limit - level)), reset)


@dataclass
class PlainCharge:
    at: int
    tokens: int
    top: Fraction
    """How full the bucket of tokens was with it."""
    request_top: Fraction | None
    """The same of requests, where the request was charged with it."""


@dataclass
class PlainLimits:
    """One key, all of whose limits are set."""

    limits: Limits
    statuses: dict[str, str] = field(default_factory=dict)
    """Of the jobs that are in Redis."""

    def __post_init__(self) -> None:
        assert self.limits.requests_per_min is not None
        assert self.limits.tokens_per_min is not None
        assert self.limits.tokens_per_day is not None
        assert self.limits.max_parallel_jobs is not None
        self.requests = PlainBucket(self.limits.requests_per_min)
        self.tokens = PlainBucket(self.limits.tokens_per_min)
        self.tokens_per_day = self.limits.tokens_per_day
        self.max_jobs = self.limits.max_parallel_jobs
        self.by_day: dict[int, int] = {}
        self.unfinished: dict[str, int] = {}
        self.charges: dict[str, PlainCharge] = {}
        self._swept = 0

    def admit(self, now_ms: int, job_ids: Sequence[str], tokens: int) -> Refusal | None:
        """Charge a request, or return why not."""
        total = tokens * len(job_ids)
        used_today = self.by_day.get(now_ms // DAY_MS, 0)
        midnight = DAY_MS - now_ms % DAY_MS
        if len(job_ids) <= self.max_jobs < len(self.unfinished) + len(job_ids):
            self._sweep(now_ms)
        held = len(self.unfinished)
        full = held + len(job_ids) > self.max_jobs
        requests, per_min = self.requests, self.tokens
        asked: list[tuple[str, int, int, Fraction | int, int]] = [
            ("requests", requests.limit, 1, requests.level(now_ms), requests.wait_ms(now_ms, 1)),
            ("tokens", per_min.limit, total, per_min.level(now_ms), per_min.wait_ms(now_ms, total)),
            ("tokens_day", self.tokens_per_day, total, used_today,
             midnight if used_today + total > self.tokens_per_day else 0),
            ("jobs", self.max_jobs, len(job_ids), held, SWEEP_MS if full else 0),
        ]  # fmt: skip
        for name, limit, amount, *_ in asked:
            if amount > limit:
                return Refusal(name, limit, NEVER, None)
        longest = max(wait_ms for *_, wait_ms in asked)
        for name, limit, _, load, wait_ms in asked:
            if wait_ms == longest > 0:
                return Refusal(name, limit, wait_ms, math.ceil(load))
        self._charge(now_ms, job_ids, tokens)
        return None

    def _charge(self, now_ms: int, job_ids: Sequence[str], tokens: int) -> None:
        day = now_ms // DAY_MS
        self.requests.add(now_ms, 1)
        for i, job_id in enumerate(job_ids):
            self.tokens.add(now_ms, tokens)
            self.by_day[day] = self.by_day.get(day, 0) + tokens
            self.unfinished[job_id] = now_ms
            self.charges[job_id] = PlainCharge(
                at=now_ms,
                tokens=tokens,
                top=self.tokens.level(now_ms),
                request_top=self.requests.level(now_ms) if i == 0 else None,
            )

    def settle(self, now_ms: int, used: Mapping[str, int], *, with_request: bool = False) -> int:
        num_settled = 0
        for job_id, tokens in used.items():
            self.unfinished.pop(job_id, None)
            charge = self.charges.pop(job_id, None)
            if charge is None:
                continue
            num_settled += 1
            unused = max(0, charge.tokens - tokens)
            self._take_out(self.tokens, now_ms, unused, charge.at, charge.top)
            if charge.at // DAY_MS == now_ms // DAY_MS:
                self.by_day[now_ms // DAY_MS] -= unused
            if with_request and charge.request_top is not None:
                self._take_out(self.requests, now_ms, 1, charge.at, charge.request_top)
        return num_settled

    def _take_out(
        self, bucket: PlainBucket, now_ms: int, amount: int, at: int, top: Fraction
    ) -> None:
        left = max(Fraction(0), top - bucket.leaked_in(now_ms - at))
        bucket.add(now_ms, -min(Fraction(amount), left))

    def states(self, now_ms: int) -> list[State]:
        used_today = self.by_day.get(now_ms // DAY_MS, 0)
        reset = DAY_MS - now_ms % DAY_MS if used_today else 0
        left = max(0, self.tokens_per_day - used_today)
        return [
            self.requests.state("requests", now_ms),
            self.tokens.state("tokens", now_ms),
            ("tokens_day", self.tokens_per_day, left, reset),
            ("jobs", self.max_jobs, max(0, self.max_jobs - len(self.unfinished)), 0),
        ]

    def _sweep(self, now_ms: int) -> None:
        if now_ms - self._swept < SWEEP_MS:
            return
        self._swept = now_ms
        for job_id, at in list(self.unfinished.items()):
            status = self.statuses.get(job_id)
            is_coming = status is None and now_ms - at < SUBMIT_MS
            if status not in ("queued", "started") and not is_coming:
                del self.unfinished[job_id]
