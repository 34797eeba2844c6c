"""Sessions of API keys on a real Redis."""

from typing import cast

import pytest
from redis import Redis

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.key_records import KeyTerms
from mixfleet_broker.key_sessions import SESSION_TTL_S, KeySessions
from support.api_keys import SECRET, everything


@pytest.fixture
def keys(redis: Redis) -> ApiKeys:
    return ApiKeys(redis)


@pytest.fixture
def sessions(redis: Redis) -> KeySessions:
    return KeySessions(redis)


def test_a_session_is_its_key_for_a_day(redis: Redis, keys: ApiKeys, sessions: KeySessions) -> None:
    record, secret = keys.create(KeyTerms(name="x"))
    session = sessions.open(secret)
    assert sessions.find(session) == record
    [name] = cast("list[bytes]", list(redis.scan_iter("mixfleet:aime_session:*")))
    assert 0 < redis.ttl(name) <= SESSION_TTL_S
    redis.delete(name)
    assert sessions.find(session) is None


def test_neither_a_sessions_key_nor_the_secret_lies_in_redis(
    redis: Redis, keys: ApiKeys, sessions: KeySessions
) -> None:
    _, secret = keys.create(KeyTerms(name="x"))
    session = sessions.open(secret)
    assert session not in everything(redis)
    assert secret not in everything(redis)


def test_a_session_ends_with_the_secret_that_opened_it(
    keys: ApiKeys, sessions: KeySessions
) -> None:
    revoked, secret = keys.create(KeyTerms(name="x"))
    session = sessions.open(secret)
    keys.revoke(revoked.key_id)
    assert sessions.find(session) is None
    rotated, old = keys.create(KeyTerms(name="y"))
    session = sessions.open(old)
    new = keys.rotate(rotated.key_id)
    assert sessions.find(session) is None
    assert sessions.find(sessions.open(new)) == keys.get(rotated.key_id)


def test_a_secret_is_no_session_nor_a_session_a_secret(
    keys: ApiKeys, sessions: KeySessions
) -> None:
    _, secret = keys.create(KeyTerms(name="x"))
    assert sessions.find(secret) is None
    assert sessions.find(SECRET) is None
    assert sessions.find("nonsense") is None
    assert keys.find(sessions.open(secret)) is None
    assert sessions.find(sessions.open(SECRET)) is None
