"""The API keys of a fleet: made, changed, replaced and revoked; found by their secrets.

A record never leaves Redis with anything that its secret could be made from.
"""

import hmac
from typing import Any, Final, cast

from redis import Redis

from mixfleet_broker.errors import BrokerError, MessageError, UnknownKeyError
from mixfleet_broker.key_records import KeyRecord, KeyTerms, key_fields, read_key
from mixfleet_broker.key_secrets import digest_of, is_secret, new_key_id, new_secret
from mixfleet_broker.keys import API_KEY, API_KEYS, API_SECRET
from mixfleet_broker.lua import Argument, ScriptName, Scripts, milliseconds
from mixfleet_broker.names import check_tenant
from mixfleet_broker.redis_errors import redis_errors

MAX_LIFE_S: Final = 10 * 366 * 86_400
MAX_GRACE_S: Final = 30 * 86_400
_FOR_EVER: Final = -1
_AS_IT_WAS: Final = -2


class ApiKeys:
    """All API keys on one server. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        prefix: Before all keys, on a server that is shared with others.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(self, redis: Redis, *, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._scripts = Scripts(redis, prefix)

    def create(self, terms: KeyTerms, life_s: float | None = None) -> tuple[KeyRecord, str]:
        """Make a key; return it with its secret, which nobody can ask for again.

        Args:
            terms: What it may do.
            life_s: How long it is valid; None: until it is revoked.

        Raises:
            MessageError: The terms or the time cannot be used.
        """
        terms.check()
        key_id, secret = new_key_id(), new_secret()
        life = _FOR_EVER if life_s is None else _ms("expires", life_s, MAX_LIFE_S)
        if not self._run("key_create", key_id, digest_of(secret), life, *_flat(key_fields(terms))):
            raise BrokerError(f"API key {key_id} exists already: try again")
        return self.get(key_id), secret

    def get(self, key_id: str) -> KeyRecord:
        """Return a key, revoked or not.

        Raises:
            UnknownKeyError: There is none with this id.
            MessageError: Its record cannot be read.
        """
        content = self._content(check_tenant(key_id))
        if not content:
            raise UnknownKeyError(key_id=key_id)
        return read_key(content)

    def all(self) -> list[KeyRecord]:
        """Return all keys, also revoked and expired ones, the oldest first."""
        with redis_errors():
            ids = cast("list[bytes]", self._redis.zrange(API_KEYS(prefix=self._prefix), 0, -1))
            with self._redis.pipeline(transaction=False) as pipeline:
                for key_id in ids:
                    pipeline.hgetall(API_KEY(key_id.decode(), prefix=self._prefix))
                contents = pipeline.execute()
        return [read_key(content) for content in contents if content]

    def find(self, secret: str) -> KeyRecord | None:
        """Return the key with this secret; None where it is none, expired, replaced or revoked.

        Raises:
            MessageError: There is such a key, and its record cannot be read.
        """
        return self.find_digest(digest_of(secret)) if is_secret(secret) else None

    def find_digest(self, digest: str) -> KeyRecord | None:
        """Do as :meth:`find`, for a secret of which only the digest is known."""
        with redis_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.get(API_SECRET(digest, prefix=self._prefix))
            pipeline.time()
            key_id, (now_s, now_us) = pipeline.execute()
        if key_id is None:
            return None
        now = now_s + now_us / 1e6
        content = self._content(key_id.decode())
        if not _opens(content, digest, now):
            return None
        record = read_key(content)
        return None if record.is_expired(now) else record

    def change(
        self,
        before: KeyRecord,
        after: KeyTerms,
        *,
        life_s: float | None = None,
        for_ever: bool = False,
    ) -> KeyRecord:
        """Change the terms of a key in which ``after`` differs from ``before``, and no others.

        Args:
            before: The key as it was read.
            after: The terms that it is to have.
            life_s: How long it is valid from now on; None: as it was.
            for_ever: Let it be valid until it is revoked.

        Raises:
            UnknownKeyError: It is gone, or revoked.
            MessageError: The terms or the time cannot be used.
        """
        after.check()
        old = key_fields(before)
        changed = {name: text for name, text in key_fields(after).items() if text != old[name]}
        life = _AS_IT_WAS if life_s is None else _ms("expires", life_s, MAX_LIFE_S)
        life = _FOR_EVER if for_ever else life
        self._run_on_live_key("key_change", before.key_id, life, *_flat(changed))
        return self.get(before.key_id)

    def rotate(self, key_id: str, grace_s: float = 0.0) -> str:
        """Give a key a new secret and return it; the one of now stays valid for ``grace_s``.

        Raises:
            UnknownKeyError: There is no such key, or it is revoked.
            MessageError: The time cannot be used.
        """
        secret = new_secret()
        grace = 0 if grace_s == 0 else _ms("grace", grace_s, MAX_GRACE_S)
        self._run_on_live_key("key_rotate", check_tenant(key_id), digest_of(secret), grace)
        return secret

    def revoke(self, key_id: str, *, forget: bool = False) -> None:
        """Take a key out of use for good; jobs that it has submitted go on.

        Args:
            key_id: The key.
            forget: Keep nothing of it, not even in the list. Once the last key is forgotten,
                :func:`any_keys` says so, and gateways no longer ask for keys.

        Raises:
            UnknownKeyError: There is no such key.
        """
        if not self._run("key_revoke", check_tenant(key_id), int(forget)):
            raise UnknownKeyError(key_id=key_id)

    def _content(self, key_id: str) -> dict[bytes, bytes]:
        with redis_errors():
            name = API_KEY(key_id, prefix=self._prefix)
            return cast("dict[bytes, bytes]", self._redis.hgetall(name))

    def _run_on_live_key(self, name: ScriptName, key_id: str, *args: Argument) -> None:
        outcome = self._run(name, key_id, *args)
        if outcome != 1:
            raise UnknownKeyError(key_id=key_id, is_revoked=outcome == -1)

    def _run(self, name: ScriptName, key_id: str, *args: Argument) -> Any:
        with redis_errors():
            return self._scripts.run(name, key_id, *args)


def any_keys(redis: Redis, *, prefix: str = "") -> bool:
    """Whether a key was ever made and not forgotten: then a caller must have one.

    Also where all are revoked, so that the last revocation never opens a gateway to all.
    """
    with redis_errors():
        return bool(redis.exists(API_KEYS(prefix=prefix)))


def _opens(content: dict[bytes, bytes], digest: str, now: float) -> bool:
    """Whether a secret with this digest is one of the key's.

    Nothing here tells by its time how much of a guess was right. What Redis compares is the name
    of a key, which is the guess's SHA-256: who learned some of its digits could not choose a secret
    by them. And the whole digests are compared here in a time that does not depend on them, so that
    even a wrong pointer in Redis opens nothing.
    """
    is_current = hmac.compare_digest(content.get(b"digest", b""), digest.encode())
    is_old = hmac.compare_digest(content.get(b"old_digest", b""), digest.encode())
    until_ms = content.get(b"old_until_ms", b"0")
    is_in_time = until_ms.isdigit() and now * 1000 < int(until_ms)
    return b"revoked_ms" not in content and (is_current or (is_old and is_in_time))


def _ms(name: str, seconds: float, most_s: float) -> int:
    if not 0 < seconds <= most_s:
        raise MessageError(f"{name}={seconds:g}: must be above 0 and at most {most_s} s")
    return milliseconds(seconds)


def _flat(content: dict[str, str]) -> list[str]:
    return [part for pair in content.items() for part in pair]
