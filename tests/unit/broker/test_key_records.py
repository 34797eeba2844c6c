import re
from typing import get_args

import pytest

from mixfleet_broker.key_records import MOST, KeyRecord, Limits, key_fields, read_key
from mixfleet_broker.key_secrets import digest_of, is_secret, new_key_id, new_secret
from mixfleet_broker.names import check_tenant
from mixfleet_broker.terms import PRIORITIES, Priority
from support.api_keys import SECRET, key_record


def with_priority(priority: Priority) -> KeyRecord:
    return KeyRecord(key_id="k", name="x", tenant="k", created_at=0.0, priority=priority)


def test_secrets_and_ids_are_all_different_and_of_their_form() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert all(is_secret(secret) for secret in secrets)
    ids = {new_key_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"k_[a-z2-9]{10}", key_id) for key_id in ids)
    assert all(check_tenant(key_id) for key_id in ids)


def test_a_digest_is_a_sha_256() -> None:
    assert digest_of("abc").startswith("ba7816bf8f01cfea")
    assert len(digest_of(SECRET)) == 64


@pytest.mark.parametrize("text", ["", "mf-", SECRET[:-1], SECRET + "x", SECRET + "\n", "k_abc"])
def test_other_texts_are_no_secrets(text: str) -> None:
    assert not is_secret(text)


@pytest.mark.parametrize("own", PRIORITIES)
def test_a_key_may_ask_for_its_priority_and_for_later_ones(own: Priority) -> None:
    allowed = [p for p in get_args(Priority) if with_priority(own).may_use_priority(p)]
    assert allowed == list(PRIORITIES[PRIORITIES.index(own) :])


def test_a_key_with_models_may_use_those_alone() -> None:
    assert key_record().may_use_model("any")
    record = KeyRecord(
        key_id="k", name="x", tenant="k", created_at=0.0, models=frozenset({"a", "b"})
    )
    assert record.may_use_model("a")
    assert not record.may_use_model("ab")


def test_a_key_is_expired_from_the_moment_on() -> None:
    record = KeyRecord(key_id="k", name="x", tenant="k", created_at=0.0, expires_at=10.0)
    assert not record.is_expired(9.999)
    assert record.is_expired(10.0)
    assert not key_record().is_expired(1e12)


def test_every_limit_has_a_most_and_comes_back_from_its_field() -> None:
    limits = Limits(**MOST)
    limits.check()
    record = KeyRecord(key_id="k", name="x", tenant="k", created_at=1.5, limits=limits)
    content = {**key_fields(record), "key_id": "k", "created_ms": "1500", "expires_ms": ""}
    assert read_key({name.encode(): text.encode() for name, text in content.items()}) == record
