"""Scripts whose clock is a key of the test: time passes when the test says so.

The same scripts in all else; what expires by itself still does so by the server's own clock.
"""

from functools import cache
from typing import Final

import pytest
from redis import Redis

from mixfleet_broker import lua

CLOCK: Final = "a clock"
REAL: Final = "redis.call('TIME')"
START_MS: Final = 1_700_000_000_000


class LuaClock:
    """The time that the scripts of this process read on a server, in ms."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.set(START_MS)

    def set(self, now_ms: int) -> None:
        """Let it be ``now_ms``."""
        self.now_ms = now_ms
        self._redis.hset(CLOCK, mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})

    def advance(self, ms: int) -> None:
        """Let time pass."""
        self.set(self.now_ms + ms)


def install(monkeypatch: pytest.MonkeyPatch, redis: Redis) -> LuaClock:
    """Let the scripts of this process read a clock of the test, and return it."""
    read = lua._read

    def with_our_clock(name: str) -> str:
        text = read(name)
        assert (REAL in text) == (name == "parts/base")
        return text.replace(REAL, f"redis.call('HMGET', '{CLOCK}', 's', 'us')")

    monkeypatch.setattr(lua, "_read", with_our_clock)
    # What was made of the true text is remembered.
    for made in (lua.script_text, lua.script_digest):
        monkeypatch.setattr(lua, made.__name__, cache(made.__wrapped__))
    return LuaClock(redis)


@pytest.fixture
def lua_clock(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> LuaClock:
    """A clock of the test's own, on an empty server."""
    return install(monkeypatch, redis)
