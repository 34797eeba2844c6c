"""Limits of API keys: what is refused, what is given back, and what N gateways let through."""

import threading
from collections.abc import Callable

import pytest
from redis import Redis

from mixfleet_broker.errors import MessageError, RateLimitedError, RequestOverLimitError
from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.keys import API_CHARGE, API_JOBS, API_USE, JOB
from mixfleet_broker.limits import KeyLimits, rules_for
from mixfleet_broker.messages import new_job_id
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.terms import QueueRules
from support.api_keys import key_record, put_job
from support.lua_clock import LuaClock
from support.queue_jobs import DONE, MODEL, chat_job, claim_one
from support.redis_server import RedisServer

NUM_GATEWAYS = 8
ASKS_EACH = 40


def admitted_by_many(server: RedisServer, record: KeyRecord, tokens: int = 1) -> int:
    """How many requests get through when several gateways ask at once."""
    start = threading.Barrier(NUM_GATEWAYS)
    admitted: list[str] = []

    def gateway() -> None:
        with server.client() as redis:
            limits = KeyLimits(redis)
            start.wait()
            for _ in range(ASKS_EACH):
                job_id = new_job_id()
                try:
                    limits.admit(record, [job_id], tokens)
                except RateLimitedError:
                    continue
                admitted.append(job_id)

    threads = [threading.Thread(target=gateway) for _ in range(NUM_GATEWAYS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return len(admitted)


@pytest.mark.parametrize(
    ("limits", "tokens", "permitted"),
    [
        ({"requests_per_min": 100}, 1, 100),
        ({"tokens_per_min": 1000}, 7, 142),
        ({"tokens_per_day": 1000}, 7, 142),
        ({"max_parallel_jobs": 37}, 1, 37),
        ({"requests_per_min": 100, "tokens_per_min": 300, "max_parallel_jobs": 50}, 9, 33),
        ({}, 1, NUM_GATEWAYS * ASKS_EACH),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.usefixtures("lua_clock")
def test_many_gateways_let_through_exactly_what_one_would(
    redis_server: RedisServer, limits: dict[str, int], tokens: int, permitted: int
) -> None:
    assert admitted_by_many(redis_server, key_record(**limits), tokens) == permitted


def test_the_servers_own_clock_lets_requests_come_back(redis: Redis) -> None:
    limits, record = KeyLimits(redis), key_record(requests_per_min=600)
    for _ in range(600):
        limits.admit(record, [new_job_id()], 1)
    used = limits.states(record)[0]
    assert used.reset_s > 59
    # A client's clock is not asked: the time in Redis is moved instead.
    level, at = (redis.hget(API_USE("k_test"), "requests") or b"").split()
    redis.hset(API_USE("k_test"), "requests", f"{int(level)} {int(at) - 60_000}")
    [state] = limits.states(record)
    assert (state.remaining, state.reset_s) == (600, 0)


def test_a_refusal_says_which_limit_and_how_far_it_is_used_and_when_to_ask_again(
    redis: Redis, lua_clock: LuaClock
) -> None:
    limits, record = KeyLimits(redis), key_record(requests_per_min=2, tokens_per_min=1000)
    first = limits.admit(record, ["a"], 100)
    assert [(s.name, s.limit, s.remaining, s.reset_s) for s in first.states] == [
        ("requests", 2, 1, 30.0),
        ("tokens", 1000, 900, 6.0),
    ]
    lua_clock.advance(1000)
    limits.admit(record, ["b"], 100)
    with pytest.raises(RateLimitedError) as caught:
        limits.admit(record, ["c"], 100)
    error = caught.value
    assert (error.name, error.limit, error.load, error.retry_after_s) == ("requests", 2, 2, 29.0)
    assert error.code == "rate_limited"
    assert error.retryable
    assert [s.remaining for s in error.states] == [0, 816]
    assert str(error) == (
        "API key k_test: 2 requests in a minute, the limit is 2; try again in 29 s"
    )


def test_a_request_that_alone_is_over_a_limit_is_refused_for_good(redis: Redis) -> None:
    limits = KeyLimits(redis)
    for record, jobs, tokens, name, asked in (
        (key_record(tokens_per_min=100), 2, 51, "tokens", 102),
        (key_record(tokens_per_day=100), 1, 101, "tokens_day", 101),
        (key_record(max_parallel_jobs=3), 4, 1, "jobs", 4),
    ):
        with pytest.raises(RequestOverLimitError) as caught:
            limits.admit(record, [f"j{i}" for i in range(jobs)], tokens)
        error = caught.value
        assert (error.name, error.load, error.retry_after_s) == (name, asked, None)
        assert not error.retryable
        assert f"the request alone is {asked} " in str(error)
    assert not redis.exists(API_USE("k_test"))


def test_a_day_ends_at_midnight_utc(redis: Redis, lua_clock: LuaClock) -> None:
    limits, record = KeyLimits(redis), key_record(tokens_per_day=100)
    lua_clock.set(86_400_000 * 20_000 - 1500)
    limits.admit(record, ["a"], 100)
    with pytest.raises(RateLimitedError) as caught:
        limits.admit(record, ["b"], 1)
    assert (caught.value.name, caught.value.retry_after_s) == ("tokens_day", 1.5)
    lua_clock.advance(1500)
    limits.admit(record, ["b"], 100)
    # What was charged yesterday is not given back today.
    assert limits.settle(record, {"a": 0}) == 1
    assert limits.states(record)[0].remaining == 0


@pytest.mark.usefixtures("lua_clock")
def test_what_a_job_did_not_use_is_given_back_once(redis: Redis) -> None:
    record = key_record(tokens_per_min=1000, tokens_per_day=1000, max_parallel_jobs=2)
    one, other = KeyLimits(redis), KeyLimits(redis)
    one.admit(record, ["a"], 400)
    one.admit(record, ["b"], 400)
    assert [s.remaining for s in one.states(record)] == [200, 200, 0]
    assert one.settle(record, {"a": 100}) == 1
    assert [s.remaining for s in one.states(record)] == [500, 500, 1]
    assert other.settle(record, {"a": 0}) == 0
    assert other.settle(record, {"a": 100, "never": 0}) == 0
    assert [s.remaining for s in one.states(record)] == [500, 500, 1]
    # More than was expected is not charged afterwards, and nothing falls below 0.
    assert one.settle(record, {"b": 900}) == 1
    assert [s.remaining for s in one.states(record)] == [500, 500, 2]
    assert not redis.exists(API_CHARGE("a"), API_CHARGE("b"), API_JOBS("k_test"))


@pytest.mark.usefixtures("lua_clock")
def test_a_request_that_was_not_submitted_costs_nothing(redis: Redis) -> None:
    record = key_record(
        requests_per_min=10, tokens_per_min=1000, tokens_per_day=1000, max_parallel_jobs=5
    )
    limits = KeyLimits(redis)
    untouched = [s.remaining for s in limits.states(record)]
    limits.admit(record, ["other"], 0)
    admission = limits.admit(record, ["a", "b", "c"], 300)
    assert [s.remaining for s in admission.states] == [8, 100, 100, 1]
    assert limits.refund(record, admission) == 3
    assert limits.refund(record, admission) == 0
    limits.settle(record, {"other": 0})
    assert [s.remaining for s in limits.states(record)] == [9, *untouched[1:]]


@pytest.mark.usefixtures("lua_clock")
def test_a_request_is_a_repetition_only_where_all_its_jobs_are_charged(redis: Redis) -> None:
    limits, record = KeyLimits(redis), key_record(requests_per_min=10, tokens_per_min=100)
    first = limits.admit(record, ["a", "b"], 10)
    assert limits.admit(record, ["a", "b"], 10) == first
    stranger = KeyRecord(
        key_id="k_other", name="x", tenant="t", created_at=0.0, limits=record.limits
    )
    assert [s.remaining for s in limits.admit(stranger, ["a"], 10).states] == [9, 90]
    assert [s.remaining for s in limits.admit(record, ["b", "c"], 10).states] == [8, 60]


def test_a_job_is_not_settled_for_another_key(redis: Redis) -> None:
    limits, record = KeyLimits(redis), key_record(tokens_per_day=100)
    limits.admit(record, ["a"], 60)
    stranger = KeyRecord(key_id="k_other", name="other", tenant="t", created_at=0.0)
    assert limits.settle(stranger, {"a": 0}) == 0
    assert limits.states(record)[0].remaining == 40


def test_a_dead_gateways_jobs_make_room_once_they_have_ended(
    redis: Redis, lua_clock: LuaClock
) -> None:
    limits, record = KeyLimits(redis), key_record(max_parallel_jobs=4, tokens_per_day=1000)
    jobs = ["runs", "ended", "was_never_submitted", "waits"]
    for job_id in jobs:
        limits.admit(record, [job_id], 100)
    for job_id in ("runs", "ended", "waits"):
        put_job(redis, job_id, "queued" if job_id == "waits" else "started")
    with pytest.raises(RateLimitedError) as caught:
        limits.admit(record, ["next"], 100)
    assert (caught.value.name, caught.value.load) == ("jobs", 4)
    put_job(redis, "ended", "finished")
    lua_clock.advance(1000)
    limits.admit(record, ["next"], 100)
    put_job(redis, "next", "started")
    lua_clock.advance(30_000)
    limits.admit(record, ["last"], 100)
    lua_clock.advance(1000)
    with pytest.raises(RateLimitedError):
        limits.admit(record, ["none"], 100)
    # Its place is taken, its charge is not: it can still be settled.
    assert limits.settle(record, {"ended": 10}) == 1
    assert limits.states(record)[0].remaining == 1000 - 500 - 10


def test_the_jobs_of_a_real_queue_count_until_they_end(redis: Redis, lua_clock: LuaClock) -> None:
    queue, limits, record = (
        JobQueue(redis, MODEL),
        KeyLimits(redis),
        key_record(max_parallel_jobs=2),
    )
    jobs = [chat_job() for _ in range(2)]
    for job in jobs:
        limits.admit(record, [job.job_id], 1)
        queue.submit(job)
    claimed = claim_one(queue)

    def is_refused() -> bool:
        lua_clock.advance(31_000)
        try:
            limits.admit(record, [new_job_id()], 1)
        except RateLimitedError:
            return True
        return False

    assert is_refused()
    queue.finish(claimed.lease, DONE)
    assert not is_refused()


def test_everything_that_limits_keep_goes_away_by_itself(redis: Redis) -> None:
    limits = KeyLimits(redis)
    record = key_record(requests_per_min=9, tokens_per_min=99, max_parallel_jobs=3)
    limits.admit(record, ["a", "b"], 10)
    kept = {API_USE("k_test"), API_JOBS("k_test"), API_CHARGE("a"), API_CHARGE("b")}
    assert {name.decode() for name in redis.scan_iter()} == kept
    assert all(redis.ttl(name) > 0 for name in kept)
    with pytest.raises(RateLimitedError):
        limits.admit(record, ["c", "d"], 10)
    limits.settle(record, {"a": 1})
    assert {name.decode() for name in redis.scan_iter()} == kept - {API_CHARGE("a")}
    assert all(redis.ttl(name) > 0 for name in kept - {API_CHARGE("a")})


def test_a_key_without_limits_is_always_admitted(redis: Redis) -> None:
    limits, record = KeyLimits(redis), key_record()
    admission = limits.admit(record, ["a", "b"], 10**9)
    assert admission.states == limits.states(record) == ()
    assert limits.refund(record, admission) == 2


def test_a_limit_that_is_set_later_counts_from_then_on(redis: Redis, lua_clock: LuaClock) -> None:
    limits = KeyLimits(redis)
    limits.admit(key_record(), ["a"], 100)
    lua_clock.advance(1)
    record = key_record(tokens_per_min=100)
    limits.admit(record, ["b"], 60)
    limits.settle(record, {"a": 0})
    assert [s.remaining for s in limits.states(record)] == [40]


@pytest.mark.parametrize(
    "call",
    [
        lambda limits: limits.admit(key_record(), [], 1),
        lambda limits: limits.admit(key_record(), ["a"], -1),
        lambda limits: limits.admit(key_record(), ["a:b"], 1),
        lambda limits: limits.settle(key_record(), {"a": -1}),
        lambda limits: limits.settle(key_record(), {"a b": 1}),
    ],
)
def test_what_cannot_be_charged_is_an_error(
    redis: Redis, call: Callable[[KeyLimits], object]
) -> None:
    with pytest.raises(MessageError):
        call(KeyLimits(redis))
    assert not redis.dbsize()


def test_two_fleets_on_one_server_do_not_share_limits(redis: Redis) -> None:
    record = key_record(requests_per_min=1)
    KeyLimits(redis).admit(record, ["a"], 1)
    KeyLimits(redis, prefix="{b}:").admit(record, ["a"], 1)
    assert redis.exists(API_USE("k_test"), API_USE("k_test", prefix="{b}:")) == 2


def test_a_keys_own_limits_of_what_waits_stand_in_the_rules() -> None:
    rules = QueueRules(queue_limit=50, tenant_queue_limit=10, tenant_token_limit=1000)
    assert rules_for(key_record(), rules) == rules
    own = rules_for(key_record(max_queued_jobs=20, max_queued_tokens=5), rules)
    assert (own.queue_limit, own.tenant_queue_limit, own.tenant_token_limit) == (50, 20, 5)


def test_foreign_values_in_the_place_of_a_job_count_as_ended(
    redis: Redis, lua_clock: LuaClock
) -> None:
    limits, record = KeyLimits(redis), key_record(max_parallel_jobs=1)
    limits.admit(record, ["a"], 1)
    redis.set(JOB("a"), "no hash")
    lua_clock.advance(30_000)
    limits.admit(record, ["b"], 1)
