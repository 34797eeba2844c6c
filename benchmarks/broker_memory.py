"""Bytes of Redis's memory by kind of key."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from redis import Redis

from mixfleet_broker.keys import KEYS, Key

_FIELD: Final = re.compile(r"\\\{\w+\\\}")
_SCANNED: Final = 1000


def _pattern(key: Key) -> re.Pattern[str]:
    return re.compile(_FIELD.sub("[^:]+", re.escape(key.template)))


_PATTERNS: Final = {key.name: _pattern(key) for key in KEYS}
OF_ONE_JOB: Final = frozenset(key.name for key in KEYS if "{job_id}" in key.template)
"""Kinds of keys that a job brings along, and that must go with it."""


def kind_of(name: str) -> str:
    """Return what keys.py calls a key; ``unknown`` if it is none of ours."""
    for kind, pattern in _PATTERNS.items():
        if pattern.fullmatch(name):
            return kind
    return "unknown"


def used_bytes(redis: Redis) -> int:
    """Return the bytes that the server holds for its data and itself."""
    found: Any = redis.info("memory")
    return int(found["used_memory"])


def keys_by_kind(redis: Redis) -> Counter[str]:
    """Return how many keys there are of each kind."""
    return Counter(kind_of(name.decode()) for name in _names(redis))


def bytes_by_kind(redis: Redis) -> Counter[str]:
    """Return the bytes of all keys of each kind, as Redis reckons them (MEMORY USAGE)."""
    found: Counter[str] = Counter()
    names = list(_names(redis))
    for start in range(0, len(names), _SCANNED):
        batch = names[start : start + _SCANNED]
        with redis.pipeline(transaction=False) as pipeline:
            for name in batch:
                pipeline.memory_usage(name, samples=0)
            for name, num_bytes in zip(batch, pipeline.execute(), strict=True):
                found[kind_of(name.decode())] += num_bytes or 0
    return found


def _names(redis: Redis) -> Iterable[bytes]:
    names: Iterable[bytes] = redis.scan_iter(count=_SCANNED)
    return names
