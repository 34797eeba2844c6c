"""Records of responses: written once, ended once, and never back after they were deleted."""

from dataclasses import replace

import pytest
from redis import Redis

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.keys import RESPONSE
from mixfleet_broker.responses_store import (
    StoredResponse,
    create_response,
    delete_response,
    end_response,
    find_response,
)

RECORD = StoredResponse(
    job_id="j1",
    tenant="team-a",
    created_at=1_764_000_000,
    request={"model": "tiny", "store": True},
    items=[{"type": "message", "content": "Grüße \ud800"}],
)
FINAL = {"id": "resp_j1", "status": "completed"}


@pytest.mark.parametrize("prefix", ["", "{team}:"])
def test_a_record_is_found_as_it_was_written(redis: Redis, prefix: str) -> None:
    assert find_response(redis, "j1", prefix=prefix) is None
    assert create_response(redis, RECORD, 60, prefix=prefix) == (RECORD, True)
    assert find_response(redis, "j1", prefix=prefix) == RECORD
    assert 59_000 < int(redis.pttl(RESPONSE("j1", prefix=prefix))) <= 60_000


def test_a_repeated_request_finds_the_first_record(redis: Redis) -> None:
    create_response(redis, RECORD, 60)
    assert create_response(redis, replace(RECORD, created_at=2), 60) == (RECORD, False)
    assert find_response(redis, "j1") == RECORD


def test_an_end_is_kept_from_then_on(redis: Redis) -> None:
    create_response(redis, RECORD, 5)
    assert end_response(redis, RECORD, FINAL, 60, 60)
    assert find_response(redis, "j1") == replace(RECORD, final=FINAL)
    assert int(redis.pttl(RESPONSE("j1"))) > 5_000


def test_a_deleted_record_does_not_come_back_with_its_end(redis: Redis) -> None:
    create_response(redis, RECORD, 60)
    assert delete_response(redis, "j1", 60)
    assert not delete_response(redis, "j1", 60)
    assert not end_response(redis, RECORD, FINAL, 60, 60)
    assert find_response(redis, "j1") is None


@pytest.mark.parametrize(
    "value",
    [
        b"no JSON",
        b"[]",
        b'{"v":2}',
        b'{"v":1,"tenant":1,"created_at":1,"request":{"model":"m"},"items":[],"final":null}',
        b'{"v":1,"tenant":"t","created_at":1,"request":{},"items":[],"final":null}',
        b'{"v":1,"tenant":"t","created_at":1,"request":{"model":"m"},"items":[],"final":1}',
    ],
)
def test_a_record_that_is_not_of_the_schema_is_an_error(redis: Redis, value: bytes) -> None:
    redis.set(RESPONSE("j1"), value)
    with pytest.raises(BrokerError, match="stored response of job j1: not of schema 1"):
        find_response(redis, "j1")
