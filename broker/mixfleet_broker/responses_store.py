"""Stored responses of ``/v1/responses``: what was asked, and in the end what was answered.

A record is written before its job is submitted, so that there is none without the other, and once
more, whole, when a gateway has seen the job's end. Until then the answer is in the job's channel,
which is kept as long as the record: its time begins when the job ends (see ``JobTerms.keep_s``),
also where no gateway was there to see it.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from redis import Redis

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.keys import CHANNEL, RESPONSE
from mixfleet_broker.lua import milliseconds
from mixfleet_broker.names import check_job_id
from mixfleet_broker.redis_errors import redis_errors

_SCHEMA: Final = 1
_TYPES: Final = {"tenant": str, "created_at": int, "request": dict, "items": list}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One response. What is in it is JSON, as the HTTP interface has it."""

    job_id: str
    """Of the job that answers it."""
    tenant: str
    """Whose it is."""
    created_at: int
    """Unix time."""
    request: dict[str, Any]
    """What the response repeats of its request, by OpenAI's names; ``model`` among it."""
    items: list[dict[str, Any]]
    """The request's own input."""
    final: dict[str, Any] | None = None
    """The response as it ended; None while that is not known here."""

    @property
    def model(self) -> str:
        """Whose queue the job is in."""
        return str(self.request["model"])


def create_response(
    redis: Redis, record: StoredResponse, ttl_s: float, *, prefix: str = ""
) -> tuple[StoredResponse, bool]:
    """Write a new record; return the one that is there now, and whether it is this one.

    A request that is repeated under its idempotency key finds the record of the first time.

    Raises:
        BrokerError: What was there cannot be read, or see :mod:`mixfleet_broker.redis_errors`.
    """
    key = RESPONSE(check_job_id(record.job_id), prefix=prefix)
    with redis_errors():
        is_new = redis.set(key, _encode(record), px=milliseconds(ttl_s), nx=True)
    if is_new:
        return record, True
    found = find_response(redis, record.job_id, prefix=prefix)
    # It may have expired between the two commands; the repetition is then as good as a first time.
    return (found, False) if found is not None else (record, False)


def find_response(redis: Redis, job_id: str, *, prefix: str = "") -> StoredResponse | None:
    """Return the record of a job; None where there is none, or no more."""
    with redis_errors():
        value = redis.get(RESPONSE(check_job_id(job_id), prefix=prefix))
    return None if value is None else _decode(job_id, cast("bytes", value))


def end_response(
    redis: Redis,
    record: StoredResponse,
    final: dict[str, Any],
    ttl_s: float,
    channel_ttl: int,
    *,
    prefix: str = "",
) -> bool:
    """Write how a response ended and keep it from now on.

    Args:
        redis: The server.
        record: Of the response.
        final: The response as it ended.
        ttl_s: How long it is kept.
        channel_ttl: Seconds for which its channel, which nobody depends on now, can be read yet.
        prefix: Before all keys.

    Returns:
        False if it was deleted meanwhile.
    """
    key = RESPONSE(check_job_id(record.job_id), prefix=prefix)
    ended = _encode(replace(record, final=final))
    with redis_errors():
        is_kept = bool(redis.set(key, ended, px=milliseconds(ttl_s), xx=True))
        # Not one step with the record: a channel that stays longer harms nobody.
        redis.expire(CHANNEL(record.job_id, prefix=prefix), channel_ttl)
    return is_kept


def delete_response(redis: Redis, job_id: str, channel_ttl: int, *, prefix: str = "") -> bool:
    """Forget a record, and its answer with the job's channel in time; False if there was none."""
    with redis_errors():
        is_deleted = bool(redis.delete(RESPONSE(check_job_id(job_id), prefix=prefix)))
        if is_deleted:
            redis.expire(CHANNEL(job_id, prefix=prefix), channel_ttl)
    return is_deleted


def _encode(record: StoredResponse) -> bytes:
    value = {
        "v": _SCHEMA,
        "tenant": record.tenant,
        "created_at": record.created_at,
        "request": record.request,
        "items": record.items,
        "final": record.final,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def _decode(job_id: str, data: bytes) -> StoredResponse:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.pop("v", None) != _SCHEMA or not _is_good(value):
        raise BrokerError(f"stored response of job {job_id}: not of schema {_SCHEMA}")
    return StoredResponse(job_id=job_id, **value)


def _is_good(value: dict[str, Any]) -> bool:
    final = value.get("final")
    return (
        value.keys() == {*_TYPES, "final"}
        and all(isinstance(value[name], kind) for name, kind in _TYPES.items())
        and (final is None or isinstance(final, dict))
        and isinstance(value["request"].get("model"), str)
    )
