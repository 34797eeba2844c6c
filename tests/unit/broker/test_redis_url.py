"""Redis URLs: which are taken, and that none is shown with its password."""

import pytest

from mixfleet_broker.redis_url import checked_redis_url, safe_redis_url, unix_socket_url


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("redis://localhost", "redis://localhost"),
        ("redis://user:pass@host:6380/2", "redis://user:pass@host:6380/2"),
        ("rediss://host:6379/0?ssl_cert_reqs=none", "rediss://host:6379/0?ssl_cert_reqs=none"),
        ("REDIS://localhost", "redis://localhost"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("unix://user:pass@/run/redis.sock", "unix://user:pass@/run/redis.sock"),
        ("redis+unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("valkey://localhost:1", "redis://localhost:1"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ],
)
def test_a_redis_url_is_read_in_one_spelling(given: str, read: str) -> None:
    assert checked_redis_url(given) == read


@pytest.mark.parametrize(
    ("url", "requirement"),
    [
        ("localhost:6379", "must start with"),
        ("http://localhost", "must start with"),
        ("", "must start with"),
        ("redis://", "must name a host"),
        ("redis://:6379", "must name a host"),
        ("redis://host/zero", "number of a database"),
        ("redis://host:99999", "port from 1 to 65535"),
        ("redis://host:0", "port from 1 to 65535"),
        ("unix://run/redis.sock", "full path"),
        ("unix://", "full path"),
    ],
)
def test_what_is_no_redis_url_is_refused_with_what_is_missing(url: str, requirement: str) -> None:
    with pytest.raises(ValueError, match=requirement):
        checked_redis_url(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("redis://user:secret@h", "redis://user:***@h"),
        ("redis://user@h", "redis://user@h"),
        ("redis://user:sec@ret/secret@h:1/0", "redis://user:***@h:1/0"),
        ("unix:///run/r.sock?password=secret&db=2", "unix:///run/r.sock?password=***&db=2"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("user:secret@h", "user:***@h"),
    ],
)
def test_a_shown_url_never_holds_the_password(url: str, shown: str) -> None:
    assert safe_redis_url(url) == shown
    assert "secret" not in safe_redis_url(url)


def test_a_socket_path_with_odd_characters_makes_a_url_that_passes_the_check() -> None:
    url = unix_socket_url("/tmp/a b/ü?#%/redis.sock")
    assert checked_redis_url(url) == url
    assert " " not in url
