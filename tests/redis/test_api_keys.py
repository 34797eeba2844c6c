"""API keys: made, found, changed, replaced, revoked; and what of them is in Redis."""

from dataclasses import replace
from hashlib import sha256

import pytest
from redis import Redis

from mixfleet_broker.api_keys import ApiKeys, any_keys
from mixfleet_broker.errors import BrokerUnavailableError, MessageError, UnknownKeyError
from mixfleet_broker.key_cache import KeyCache
from mixfleet_broker.key_records import KeyTerms, Limits
from mixfleet_broker.keys import API_JOBS, API_KEY, API_KEYS, API_SECRET, API_USE
from mixfleet_broker.limits import KeyLimits
from support.api_keys import SECRET, everything
from support.lua_clock import LuaClock

TERMS = KeyTerms(name="app one")
ALL_TERMS = KeyTerms(
    name="everything, ümlauts",
    tenant="team-a",
    scopes=frozenset({"chat", "ops"}),
    priority="interactive",
    models=frozenset({"mixtral-8x7b", "tiny"}),
    limits=Limits(
        requests_per_min=1,
        tokens_per_min=2,
        tokens_per_day=3,
        max_parallel_jobs=4,
        max_queued_jobs=5,
        max_queued_tokens=6,
    ),
)


@pytest.mark.parametrize("prefix", ["", "{team}:"])
def test_a_key_is_found_by_its_secret_with_all_its_terms(redis: Redis, prefix: str) -> None:
    keys = ApiKeys(redis, prefix=prefix)
    record, secret = keys.create(ALL_TERMS)
    assert keys.find(secret) == keys.get(record.key_id) == record
    assert record.tenant == "team-a"
    assert {name: getattr(record, name) for name in ("name", "scopes", "priority", "models")} == {
        name: getattr(ALL_TERMS, name) for name in ("name", "scopes", "priority", "models")
    }
    assert record.limits == ALL_TERMS.limits
    assert abs(record.created_at - redis.time()[0]) < 5
    assert all(name.decode().startswith(prefix) for name in redis.scan_iter())


def test_a_keys_own_id_is_the_tenant_of_its_jobs_unless_it_has_another(redis: Redis) -> None:
    record, _ = ApiKeys(redis).create(TERMS)
    assert record.tenant == record.key_id


def test_keys_are_listed_from_the_oldest_on(redis: Redis, lua_clock: LuaClock) -> None:
    keys = ApiKeys(redis)
    made = []
    for _ in range(3):
        made.append(keys.create(TERMS)[0])
        lua_clock.advance(1)
    assert keys.all() == made


def test_only_digests_of_secrets_are_in_redis(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, first = keys.create(ALL_TERMS)
    second = keys.rotate(record.key_id, 60.0)
    KeyLimits(redis).admit(replace(record, limits=Limits(max_parallel_jobs=2)), ["a"], 1)
    assert keys.find(first) == keys.find(second) is not None
    found = everything(redis)
    for secret in (first, second):
        assert sha256(secret.encode()).hexdigest() in found
        assert secret not in found
        assert secret.removeprefix("mf-") not in found
    assert "everything" in found


@pytest.mark.parametrize(
    "secret", [SECRET, "", "mf-", "x" * 46, SECRET + "\n", "mf-" + "é" * 43, "mf-" + "x" * 10**6]
)
def test_what_is_no_secret_of_a_key_finds_none(redis: Redis, secret: str) -> None:
    keys = ApiKeys(redis)
    keys.create(TERMS)
    assert keys.find(secret) is None


def test_the_id_of_a_key_and_its_digest_open_nothing(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS)
    assert keys.find(record.key_id) is None
    assert keys.find(sha256(secret.encode()).hexdigest()) is None


def test_a_pointer_to_a_key_that_has_another_digest_opens_nothing(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, _ = keys.create(TERMS)
    redis.set(API_SECRET(sha256(SECRET.encode()).hexdigest()), record.key_id)
    assert keys.find(SECRET) is None


def test_a_revoked_key_opens_nothing_and_stays_in_the_list(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS)
    keys.revoke(record.key_id)
    keys.revoke(record.key_id)
    assert keys.find(secret) is None
    [left] = keys.all()
    assert left.revoked_at is not None
    assert any_keys(redis)
    assert not list(redis.scan_iter(API_SECRET("*")))
    with pytest.raises(UnknownKeyError, match="revoked: make a new one"):
        keys.rotate(record.key_id)
    with pytest.raises(UnknownKeyError, match="revoked"):
        keys.change(left, replace(left, name="other"))
    digest = sha256(secret.encode()).hexdigest()
    assert digest not in everything(redis)
    # Not even where the pointer comes back, or the digest.
    redis.set(API_SECRET(digest), record.key_id)
    assert keys.find(secret) is None
    redis.hset(API_KEY(record.key_id), "digest", digest)
    assert keys.find(secret) is None


def test_a_forgotten_key_leaves_nothing_and_the_last_one_no_demand_for_keys(redis: Redis) -> None:
    keys, limits = ApiKeys(redis), KeyLimits(redis)
    assert not any_keys(redis)
    record, secret = keys.create(ALL_TERMS)
    assert any_keys(redis)
    limits.admit(record, ["a"], 1)
    limits.settle(record, {"a": 1})
    keys.revoke(record.key_id, forget=True)
    assert not any_keys(redis)
    assert keys.find(secret) is None
    assert redis.dbsize() == 0
    with pytest.raises(UnknownKeyError, match="is unknown"):
        keys.revoke(record.key_id)


def test_an_expired_key_opens_nothing_until_it_is_given_more_time(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS, life_s=3600.0)
    assert record.expires_at is not None
    assert 3590 < record.expires_at - redis.time()[0] < 3601
    assert keys.find(secret) == record
    redis.hset(API_KEY(record.key_id), "expires_ms", redis.time()[0] * 1000 - 1)
    assert keys.find(secret) is None
    again = keys.change(record, record, life_s=60.0)
    assert keys.find(secret) == again
    assert keys.change(again, again, for_ever=True).expires_at is None


def test_a_rotated_key_has_one_secret(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, first = keys.create(TERMS)
    second = keys.rotate(record.key_id)
    assert keys.find(first) is None
    assert keys.find(second) == record
    assert len(list(redis.scan_iter(API_SECRET("*")))) == 1


def test_a_rotated_key_keeps_its_last_secret_for_the_grace_time(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, first = keys.create(TERMS)
    second = keys.rotate(record.key_id, 3600.0)
    found = keys.find(first)
    assert found is not None
    assert found == keys.find(second)
    assert found.old_secret_until is not None
    assert 3590 < found.old_secret_until - redis.time()[0] < 3601
    assert redis.ttl(API_SECRET(sha256(first.encode()).hexdigest())) > 3590
    # Its time is over, by Redis's clock, before Redis has dropped the pointer.
    redis.hset(API_KEY(record.key_id), "old_until_ms", redis.time()[0] * 1000 - 1)
    assert keys.find(first) is None
    assert keys.find(second) is not None


def test_a_second_rotation_ends_the_grace_of_the_first(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, first = keys.create(TERMS)
    second = keys.rotate(record.key_id, 3600.0)
    third = keys.rotate(record.key_id, 3600.0)
    assert keys.find(first) is None
    assert keys.find(second) is not None
    assert keys.find(third) is not None
    assert len(list(redis.scan_iter(API_SECRET("*")))) == 2
    keys.revoke(record.key_id)
    assert [keys.find(secret) for secret in (first, second, third)] == [None] * 3


def test_a_change_writes_what_differs_and_leaves_the_rest_to_others(redis: Redis) -> None:
    keys = ApiKeys(redis)
    before, secret = keys.create(ALL_TERMS)
    keys.change(before, replace(before, limits=replace(before.limits, requests_per_min=None)))
    keys.change(before, replace(before, name="new name", models=frozenset()))
    now = keys.find(secret)
    assert now is not None
    assert (now.name, now.models, now.limits.requests_per_min) == ("new name", frozenset(), None)
    assert now.limits.tokens_per_min == 2


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        (KeyTerms(name=""), "name"),
        (KeyTerms(name="a\nb"), "name"),
        (KeyTerms(name="x", tenant="a b"), "tenant"),
        (KeyTerms(name="x", scopes=frozenset()), "scopes"),
        (KeyTerms(name="x", models=frozenset({"a b"})), "model"),
        (KeyTerms(name="x", limits=Limits(requests_per_min=0)), "requests_per_min=0"),
        (KeyTerms(name="x", limits=Limits(max_parallel_jobs=10_001)), "from 1 to 10000"),
    ],
)
def test_terms_that_cannot_be_used_make_no_key(redis: Redis, terms: KeyTerms, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        ApiKeys(redis).create(terms)
    assert redis.dbsize() == 0


@pytest.mark.parametrize("life_s", [0.0, -1.0, 1e12, float("nan")])
def test_a_time_that_cannot_be_used_makes_no_key(redis: Redis, life_s: float) -> None:
    with pytest.raises(MessageError, match="expires="):
        ApiKeys(redis).create(TERMS, life_s)
    assert redis.dbsize() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("scopes", ""), ("scopes", "chat root"), ("priority", "first"), ("tokens_per_min", "-5"),
     ("expires_ms", "soon"), ("name", ""), ("requests_per_min", b"\xff")],
)  # fmt: skip
def test_a_record_that_cannot_be_read_opens_nothing(
    redis: Redis, field: str, value: str | bytes
) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS)
    redis.hset(API_KEY(record.key_id), field, value)
    with pytest.raises(MessageError):
        keys.find(secret)


def test_a_field_of_a_newer_version_is_passed_over(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS)
    redis.hset(API_KEY(record.key_id), "colour", "blue")
    redis.hdel(API_KEY(record.key_id), "max_queued_tokens")
    assert keys.find(secret) == record


def test_a_lost_reply_and_a_second_call_make_one_key(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(TERMS)
    digest = sha256(secret.encode()).hexdigest()
    run = keys._scripts.run
    assert run("key_create", record.key_id, digest, -1, "name", "other") == 1
    assert run("key_create", record.key_id, "another digest", -1, "name", "other") == 0
    assert keys.all() == [record]
    new = "ab" * 32
    assert [run("key_rotate", record.key_id, new, 60_000) for _ in range(2)] == [1, 1]
    assert keys.find(secret) is not None


def test_a_revocation_holds_everywhere_within_the_time_of_the_cache(redis: Redis) -> None:
    keys = ApiKeys(redis)
    now = 0.0
    record, secret = keys.create(TERMS)
    gateways = [KeyCache(keys.find, clock=lambda: now) for _ in range(2)]
    assert gateways[0].find(secret) == record
    keys.revoke(record.key_id)
    now = 0.999
    assert [gateway.find(secret) for gateway in gateways] == [record, None]
    now = 1.0
    assert [gateway.find(secret) for gateway in gateways] == [None, None]


def test_without_a_redis_nothing_is_found_and_nothing_opened(no_redis: Redis) -> None:
    keys = ApiKeys(no_redis)
    for call in (lambda: keys.find(SECRET), keys.all, lambda: any_keys(no_redis)):
        with pytest.raises(BrokerUnavailableError):
            call()


def test_the_keys_of_keys_are_these(redis: Redis) -> None:
    keys = ApiKeys(redis)
    record, secret = keys.create(ALL_TERMS)
    KeyLimits(redis).admit(record, ["a"], 1)
    digest = sha256(secret.encode()).hexdigest()
    expected = {API_KEYS(), API_KEY(record.key_id), API_SECRET(digest)}
    expected |= {API_USE(record.key_id), API_JOBS(record.key_id), "mixfleet:api_charge:a"}
    assert {name.decode() for name in redis.scan_iter()} == expected
