"""The address of a Redis: checked, in one spelling, read, and shown without its secrets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

from mixfleet_broker.redis_url_options import SECRET_OPTIONS, read_options

_SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_OTHER_SPELLINGS: Final = {
    "redis+unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
    "valkey+unix": "unix",
    "valkey+sentinel": "redis+sentinel",
    "valkeys+sentinel": "rediss+sentinel",
}
_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_MAX_PORT: Final = 65535
_HIDDEN: Final = "***"

Host = tuple[str, int]
"""Name or address, and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """What a URL says."""

    scheme: str
    """One of ``redis``, ``rediss``, ``unix``, ``redis+sentinel``, ``rediss+sentinel``."""
    hosts: tuple[Host, ...] = ()
    """The server, or all Sentinels; none with ``unix``."""
    socket: str = ""
    """Path of the socket with ``unix``."""
    service: str = ""
    """What the Sentinels call the primary; empty without Sentinels."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, object] = field(default_factory=dict, repr=False)
    """The rest of the query, see :data:`mixfleet_broker.redis_url_options.URL_OPTIONS`."""

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.scheme.startswith("rediss")


def parse_redis_url(url: str) -> RedisUrl:
    """Return what ``url`` says.

    Raises:
        ValueError: It is no URL of a Redis; the text says what is missing, without the URL
            itself, which may hold a password.
    """
    scheme, rest = _split_scheme(url)
    address, _, query = rest.partition("?")
    authority, _, path = address.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    username, _, password = userinfo.partition(":")
    place = _place(scheme, hosts, path)
    pairs = parse_qsl(query, keep_blank_values=True)
    options = read_options(pairs, tls=place.has_tls, sentinel=bool(place.service))
    given: dict[str, Any] = {
        name: options.pop(name) for name in ("db", "username", "password") if name in options
    }
    return RedisUrl(
        scheme=scheme,
        hosts=place.hosts,
        socket=place.socket,
        service=place.service,
        db=given.get("db", place.db),
        username=unquote(username) or given.get("username"),
        password=unquote(password) or given.get("password"),
        options=options,
    )


def checked_redis_url(url: str) -> str:
    """Return ``url`` in the one spelling: ``valkey://`` is ``redis://``, and so on.

    Raises:
        ValueError: See :func:`parse_redis_url`.
    """
    parse_redis_url(url)
    scheme, rest = _split_scheme(url)
    return f"{scheme}://{rest}"


def _split_scheme(url: str) -> tuple[str, str]:
    scheme, separator, rest = url.partition("://")
    scheme = _OTHER_SPELLINGS.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in _SCHEMES:
        raise ValueError("must start with redis://, rediss://, unix:// or redis+sentinel://")
    return scheme, rest


def _place(scheme: str, hosts: str, path: str) -> RedisUrl:
    if scheme == "unix":
        if hosts or not path:
            raise ValueError("must name the socket by its full path, as in unix:///run/redis.sock")
        return RedisUrl(scheme=scheme, socket=unquote(f"/{path}"))
    if scheme.endswith("+sentinel"):
        return _sentinels(scheme, hosts, path)
    if "," in hosts:
        raise ValueError("may name several hosts only as Sentinels, with redis+sentinel://")
    return RedisUrl(scheme=scheme, hosts=(_host(hosts, _REDIS_PORT),), db=_database(path))


def _sentinels(scheme: str, hosts: str, path: str) -> RedisUrl:
    service, _, database = path.partition("/")
    if not service:
        raise ValueError(
            "must name the primary as its Sentinels do, as in redis+sentinel://host:26379/mymaster"
        )
    return RedisUrl(
        scheme=scheme,
        hosts=tuple(_host(host, _SENTINEL_PORT) for host in hosts.split(",")),
        service=unquote(service),
        db=_database(database),
    )


def _host(text: str, default_port: int) -> Host:
    """Read ``name``, ``name:port`` or ``[IPv6]:port``."""
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        name, colon, port = name if bracket else "", rest[:1], rest[1:]
    else:
        name, colon, port = text.partition(":")
    if not name:
        raise ValueError("must name a host, as in redis://localhost:6379/0")
    if not colon:
        return unquote(name), default_port
    if colon != ":" or not port.isdecimal() or not 1 <= int(port) <= _MAX_PORT:
        raise ValueError("must have a port from 1 to 65535")
    return unquote(name), int(port)


def _database(path: str) -> int:
    database = path.strip("/")
    if database and not database.isdecimal():
        raise ValueError("must end in the number of a database, as in redis://localhost:6379/0")
    return int(database or 0)


def safe_redis_url(url: str) -> str:
    """Return ``url`` with ``***`` for its passwords: for messages, logs and screens."""
    scheme, separator, rest = url.partition("://")
    if not separator:  # not a URL, but it may hold a password all the same
        scheme, rest = "", url
    address, question, query = rest.partition("?")
    if "@" in query and "@" not in address:
        # A password that should have been percent-encoded may hold the "?"; rather hide too much.
        address, question, query = rest, "", ""
    # The last "@", for the same reason: such a password may hold one, or a slash.
    userinfo, at, host = address.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        address = f"{user}:{_HIDDEN}@{host}" if colon else address
    parameters = [
        (name, _HIDDEN if name in SECRET_OPTIONS else value)
        for name, value in parse_qsl(query, keep_blank_values=True)
    ]
    return f"{scheme}{separator}{address}{question}{urlencode(parameters, safe='/*')}"


def at_host(place: RedisUrl, host: Host) -> str:
    """Return the URL of one server that is reached as ``place`` says of others."""
    name = f"[{host[0]}]" if ":" in host[0] else quote(host[0])
    userinfo = quote(place.username or "", safe="")
    if place.password is not None:
        userinfo += f":{quote(place.password, safe='')}"
    options = {
        name: {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        for name, value in place.options.items()
        if not name.startswith("sentinel_")
    }
    return (
        f"{'rediss' if place.has_tls else 'redis'}://{userinfo}{'@' if userinfo else ''}"
        f"{name}:{host[1]}/{place.db}{'?' if options else ''}{urlencode(options)}"
    )


def unix_socket_url(path: str) -> str:
    """Return the URL of the server that listens on the socket at ``path``."""
    return f"unix://{quote(path)}"
