"""The address of a Redis server: checked, in one spelling, and shown without its password."""

from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

_SCHEMES: Final = ("redis", "rediss", "unix")
_OTHER_SPELLINGS: Final = {
    "redis+unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
    "valkey+unix": "unix",
}
_SECRET_PARAMETERS: Final = frozenset({"password", "ssl_password"})
_HIDDEN: Final = "***"


def checked_redis_url(url: str) -> str:
    """Return ``url`` as redis-py reads it: ``redis://``, ``rediss://`` or ``unix://``.

    ``redis+unix://`` and ``valkey://`` are other spellings of these.

    Raises:
        ValueError: It is no such URL; the text says what is missing, without the URL itself,
            which may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    scheme = _OTHER_SPELLINGS.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in _SCHEMES:
        raise ValueError("must start with redis://, rediss:// or unix://")
    parts = urlsplit(f"{scheme}://{rest}")
    if scheme == "unix":
        _check_socket(parts)
    else:
        _check_address(parts)
    return f"{scheme}://{rest}"


def _check_socket(parts: SplitResult) -> None:
    if parts.netloc.rpartition("@")[2] or not parts.path.startswith("/"):
        raise ValueError("must name the socket by its full path, as in unix:///run/redis.sock")


def _check_address(parts: SplitResult) -> None:
    if not parts.hostname:
        raise ValueError("must name a host, as in redis://localhost:6379/0")
    database = parts.path.strip("/")
    if database and not database.isdecimal():
        raise ValueError("must end in the number of a database, as in redis://localhost:6379/0")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if port is not None and port < 1:
        raise ValueError("must have a port from 1 to 65535")


def safe_redis_url(url: str) -> str:
    """Return ``url`` with ``***`` for its password: for messages, logs and screens."""
    scheme, separator, rest = url.partition("://")
    if not separator:  # not a URL, but it may hold a password all the same
        scheme, rest = "", url
    address, question, query = rest.partition("?")
    # The last "@": a password that should have been percent-encoded may hold one or a slash.
    userinfo, at, host = address.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        address = f"{user}:{_HIDDEN}@{host}" if colon else address
    parameters = [
        (name, _HIDDEN if name in _SECRET_PARAMETERS else value)
        for name, value in parse_qsl(query, keep_blank_values=True)
    ]
    return f"{scheme}{separator}{address}{question}{urlencode(parameters, safe='/*')}"


def unix_socket_url(path: str) -> str:
    """Return the URL of the server that listens on the socket at ``path``."""
    return f"unix://{quote(path)}"
