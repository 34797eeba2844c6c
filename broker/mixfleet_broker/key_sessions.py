"""Sessions of API keys: a login's own key, for clients that do not send their API key each time.

A session lies in Redis, so any gateway knows it, and holds the digest of the secret that logged
in: it ends with its time, and with that secret, be it revoked, rotated or expired.
"""

from typing import Any, Final

from redis import Redis

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.key_secrets import digest_of, is_secret, new_secret
from mixfleet_broker.keys import AIME_SESSION
from mixfleet_broker.redis_errors import redis_errors

SESSION_TTL_S: Final = 86_400


class KeySessions:
    """All sessions on one server. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        prefix: Before all keys.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(self, redis: Redis, *, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._keys = ApiKeys(redis, prefix=prefix)

    def open(self, secret: str) -> str:
        """Return the key of a new session of a valid secret."""
        session = new_secret()
        with redis_errors():
            self._redis.set(self._place(session), digest_of(secret), ex=SESSION_TTL_S)
        return session

    def find(self, session: str) -> KeyRecord | None:
        """Return the API key of a session; None where there is no such session any more.

        Raises:
            MessageError: There is one, and the record of its key cannot be read.
        """
        if not is_secret(session):
            return None
        with redis_errors():
            digest: Any = self._redis.get(self._place(session))
        return None if digest is None else self._keys.find_digest(digest.decode())

    def _place(self, session: str) -> str:
        return AIME_SESSION(digest_of(session), prefix=self._prefix)
