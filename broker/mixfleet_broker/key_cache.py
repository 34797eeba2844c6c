"""Keys found lately, so that a gateway does not ask Redis at each request."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from mixfleet_broker.key_records import KeyRecord
from mixfleet_broker.key_secrets import digest_of, is_secret

TTL_S: Final = 1.0
"""How long an answer is believed: a key that is revoked or changed is so after this time at most,
in each gateway."""
MAX_ENTRIES: Final = 10_000


class KeyCache:
    """What :meth:`~mixfleet_broker.api_keys.ApiKeys.find` said a moment ago. Safe between threads.

    Who tries secrets at random fills only the half that holds secrets of no key. No secret is
    kept, only digests. What ``find`` raises is passed on and not remembered.

    Args:
        find: Asks Redis.
        clock: Seconds that never go back.
        ttl_s: How long an answer is believed, counted from the question.
        max_entries: Of each half; the oldest goes first.
    """

    def __init__(
        self,
        find: Callable[[str], KeyRecord | None],
        *,
        clock: Callable[[], float] = time.monotonic,
        ttl_s: float = TTL_S,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._find = find
        self._clock = clock
        self._ttl_s = ttl_s
        self._known = _Answers(max_entries)
        self._unknown = _Answers(max_entries)
        self._lock = Lock()

    def find(self, secret: str) -> KeyRecord | None:
        """Return the key with this secret; None where there is none that is valid."""
        if not is_secret(secret):
            return None
        digest = digest_of(secret)
        # From before the question on: what is revoked while Redis answers is believed no longer.
        now = self._clock()
        with self._lock:
            for answers in (self._known, self._unknown):
                answer = answers.get(digest, now)
                if answer is not None:
                    return answer.record
        record = self._find(secret)
        with self._lock:
            answers = self._unknown if record is None else self._known
            answers.put(digest, _Answer(record=record, until=now + self._ttl_s))
        return record

    def __len__(self) -> int:
        """Return how many answers are held, also those that are not believed any more."""
        return len(self._known) + len(self._unknown)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    record: KeyRecord | None
    until: float


class _Answers:
    """Answers by digest, the oldest first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._by_digest: OrderedDict[str, _Answer] = OrderedDict()

    def get(self, digest: str, now: float) -> _Answer | None:
        answer = self._by_digest.get(digest)
        return answer if answer is not None and now < answer.until else None

    def put(self, digest: str, answer: _Answer) -> None:
        self._by_digest.pop(digest, None)
        self._by_digest[digest] = answer
        if len(self._by_digest) > self._max_entries:
            self._by_digest.popitem(last=False)

    def __len__(self) -> int:
        return len(self._by_digest)
