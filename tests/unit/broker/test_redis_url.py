"""Redis URLs: which are taken, how they are read, and that none is shown with its password."""

import pytest

from mixfleet_broker.redis_url import (
    RedisUrl,
    at_host,
    checked_redis_url,
    parse_redis_url,
    safe_redis_url,
    unix_socket_url,
)
from mixfleet_broker.redis_url_options import SECRET_OPTIONS, URL_OPTIONS


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
        ("redis+sentinel://a,b:1/m/2", "redis+sentinel://a,b:1/m/2"),
        ("valkey+sentinel://a/m", "redis+sentinel://a/m"),
        ("valkeys+sentinel://a/m", "rediss+sentinel://a/m"),
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
        ("redis://a,b", "several hosts only as Sentinels"),
        ("redis+sentinel://a:1,b:2", "must name the primary"),
        ("redis+sentinel://a:1,,b:2/m", "must name a host"),
        ("redis+sentinel://a:1,b:x/m", "port from 1 to 65535"),
        ("redis+sentinel://a:1/m/x", "number of a database"),
        ("redis+sentinel:///m", "must name a host"),
        ("redis://[::1/0", "must name a host"),
        ("redis://h?decode_responses=yes", "none of ours: decode_responses"),
        ("redis://h?ssl_ca_cert=/ca", "none of ours: ssl_ca_cert; did you mean ssl_ca_certs"),
        ("redis://h?ssl_ca_certs=/ca", "ssl_ca_certs only with rediss://"),
        ("redis://h?sentinel_password=p", "sentinel_password only with redis"),
        ("rediss://h?ssl_keyfile=/key", "ssl_keyfile only with ssl_certfile"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs that must be required, optional or none"),
        ("rediss://h?ssl_check_hostname=perhaps", "ssl_check_hostname that must be yes or no"),
        ("redis://h?socket_timeout=0", "socket_timeout that must be a number of seconds above 0"),
        ("redis://h?socket_timeout=soon", "socket_timeout that must be a number"),
        ("unix:///r.sock?db=one", "db that must be a whole number"),
        ("redis://h?client_name=", "client_name that must not be empty"),
    ],
)
def test_what_is_no_redis_url_is_refused_with_what_is_missing(url: str, requirement: str) -> None:
    with pytest.raises(ValueError, match=requirement):
        checked_redis_url(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h", RedisUrl(scheme="redis", hosts=(("h", 6379),))),
        (
            "redis://us%40er:p%2Fw@h:1/3",
            RedisUrl(scheme="redis", hosts=(("h", 1),), db=3, username="us@er", password="p/w"),
        ),
        ("redis://:pw@h", RedisUrl(scheme="redis", hosts=(("h", 6379),), password="pw")),
        (
            "redis://h/1?db=2&username=u&password=p%20w&client_name=c",
            RedisUrl(
                scheme="redis",
                hosts=(("h", 6379),),
                db=2,
                username="u",
                password="p w",
                options={"client_name": "c"},
            ),
        ),
        ("redis://[fe80::1]:7/0", RedisUrl(scheme="redis", hosts=(("fe80::1", 7),))),
        ("unix:///a%20b@c/r.sock?db=4", RedisUrl(scheme="unix", socket="/a b@c/r.sock", db=4)),
        (
            "rediss+sentinel://u:p@[::1]:1,b/my%20master/5?sentinel_password=s&ssl_ca_certs=/c",
            RedisUrl(
                scheme="rediss+sentinel",
                hosts=(("::1", 1), ("b", 26379)),
                service="my master",
                db=5,
                username="u",
                password="p",
                options={"sentinel_password": "s", "ssl_ca_certs": "/c"},
            ),
        ),
    ],
)
def test_a_url_is_read_into_its_parts(url: str, says: RedisUrl) -> None:
    assert parse_redis_url(url) == says


def test_the_parts_of_a_url_do_not_show_its_secrets() -> None:
    url = "redis+sentinel://u:secret@h/m?sentinel_password=secret"
    assert "secret" not in repr(parse_redis_url(url))


def test_an_option_that_cannot_be_used_is_named_without_its_value() -> None:
    with pytest.raises(ValueError, match="has an option") as caught:
        checked_redis_url("redis://h?pasword=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(URL_OPTIONS))
def test_each_option_that_holds_a_password_is_hidden(name: str) -> None:
    assert (name in SECRET_OPTIONS) == name.endswith("password")
    shown = safe_redis_url(f"rediss+sentinel://h/m?{name}=value")
    assert shown.endswith(f"{name}=***" if name.endswith("password") else f"{name}=value")


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
        ("redis://user:sec?ret#secret@h:1/0", "redis://user:***@h:1/0"),
        (
            "redis+sentinel://u:secret@a:1,b:2/m/0?sentinel_username=s&sentinel_password=secret",
            "redis+sentinel://u:***@a:1,b:2/m/0?sentinel_username=s&sentinel_password=***",
        ),
    ],
)
def test_a_shown_url_never_holds_the_password(url: str, shown: str) -> None:
    assert safe_redis_url(url) == shown
    assert "secret" not in safe_redis_url(url)


@pytest.mark.parametrize(
    ("sentinels", "host", "url"),
    [
        ("redis+sentinel://a,b/m/3", ("10.0.0.1", 7), "redis://10.0.0.1:7/3"),
        ("redis+sentinel://u%40:p%2F@a/m", ("h", 1), "redis://u%40:p%2F@h:1/0"),
        ("redis+sentinel://:p@a/m?sentinel_password=s", ("::1", 1), "redis://:p@[::1]:1/0"),
        (
            "rediss+sentinel://a/m?ssl_ca_certs=/ca.pem&ssl_check_hostname=no",
            ("h", 1),
            "rediss://h:1/0?ssl_ca_certs=%2Fca.pem&ssl_check_hostname=no",
        ),
    ],
)
def test_a_server_that_sentinels_name_gets_a_url_of_its_own(
    sentinels: str, host: tuple[str, int], url: str
) -> None:
    made = at_host(parse_redis_url(sentinels), host)
    assert made == url
    assert parse_redis_url(made).hosts == (host,)


def test_a_socket_path_with_odd_characters_makes_a_url_that_passes_the_check() -> None:
    url = unix_socket_url("/tmp/a b/ü?#%/redis.sock")
    assert checked_redis_url(url) == url
    assert " " not in url
