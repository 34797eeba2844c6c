"""Clients of Redis that live through restarts and failovers.

Patient for workers, quick to fail for clients. All our writes may be repeated safely (scripts are
idempotent, stream ids are explicit), so a command whose reply was lost is simply sent again.
"""

import threading
from collections.abc import Callable
from functools import partial
from ssl import SSLContext
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

from mixfleet_broker.embedded import running_url
from mixfleet_broker.errors import BrokerUnavailableError, ConfigError
from mixfleet_broker.patience import HOW_TO_GET_ONE, PatientRetry
from mixfleet_broker.redis_connection import TcpConnection, UnixConnection
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.redis_url import Host, RedisUrl, at_host, parse_redis_url, safe_redis_url
from mixfleet_broker.sentinel import PrimaryFinder
from mixfleet_broker.settings import Settings
from mixfleet_broker.tls import tls_context

PATIENCE_S: Final = 2.0
"""How long a client waits for a Redis that does not answer."""
MAX_BLOCK_S: Final = 5.0
"""Longest BLOCK of one command, unless :func:`connect` is told otherwise."""

_REPLY_S: Final = 5.0
"""Longest wait for a reply beyond what the command may block; less with less patience."""
_LEAST_REPLY_S: Final = 0.5
_CONNECT_S: Final = 2.0
_SENTINEL_S: Final = 1.0
"""Longest wait for a Sentinel, to connect and to reply: there are others."""
_HEALTH_CHECK_S: Final = 15
_MAX_CONNECTIONS: Final = 10_000
"""As many as a server takes by default; redis-py's own limit is fewer than a large web app has
threads."""


def connect(
    url: str,
    *,
    patience_s: float | None = PATIENCE_S,
    max_block_s: float = MAX_BLOCK_S,
    stop: threading.Event | None = None,
) -> Redis:
    """Return a client of the Redis at ``url`` that has answered once; replies are bytes.

    It may be used from several threads. Close it with ``close()`` or as a context manager.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://`` or ``redis+sentinel://``, see
            docs/operations.md; its query may override what is set here. With Sentinels every
            new connection goes to the primary that they name then.
        patience_s: How long each command waits for a Redis that is away, from the first
            failure; None waits for ever, as a worker does.
        max_block_s: Longest BLOCK of any command of this client. A connection that is silent for
            a little longer is taken for dead, so a smaller value finds a dead network sooner.
        stop: Once set, nothing waits any more: a command that fails raises at once.

    Raises:
        ConfigError: ``url`` is none of these, or names files that cannot be used.
        BrokerUnavailableError: Redis did not answer in time, or refused the credentials or the
            certificate, which is not waited for. The client's commands raise it too, for the
            same reasons.
        BrokerError: Redis refuses the first command: the user may not PING, or there is no such
            database.
    """
    try:
        place = parse_redis_url(url)
        where = _where(place, _tls(place))
        how = _how(place, patience_s=patience_s, max_block_s=max_block_s)
    except (ValueError, OSError) as error:
        raise ConfigError(f"redis={safe_redis_url(url)}: {error}") from None
    retry = PatientRetry(url, patience_s=patience_s, stop=stop)
    client = Redis.from_pool(ConnectionPool(retry=retry, **where, **how))
    try:
        with redis_errors():
            client.ping()
    except BaseException:
        client.close()
        raise
    return client


def _how(place: RedisUrl, *, patience_s: float | None, max_block_s: float) -> dict[str, Any]:
    """Return what connections are told beside where they go.

    Raises:
        ValueError: A blocking read would be cut off.
    """
    reply_s = _REPLY_S if patience_s is None else min(_REPLY_S, max(patience_s, _LEAST_REPLY_S))
    options: dict[str, Any] = {
        "socket_timeout": max_block_s + reply_s,
        "socket_connect_timeout": _CONNECT_S,
        "health_check_interval": _HEALTH_CHECK_S,
        "max_connections": _MAX_CONNECTIONS,
        "db": place.db,
        "username": place.username,
        "password": place.password,
        # Replies have the same shape with every redis-py from 5 to 8.
        "protocol": 2,
    }
    options |= {name: value for name, value in place.options.items() if not _is_ours(name)}
    if options["socket_timeout"] <= max_block_s:
        raise ValueError(
            f"socket_timeout={options['socket_timeout']:g} is not longer than a read may block, "
            f"{max_block_s:g} s"
        )
    # A server that hangs is found without waiting for as long as a command may block.
    return options | {"handshake_s": min(reply_s, options["socket_timeout"])}


def _is_ours(option: str) -> bool:
    return option.startswith(("ssl_", "sentinel_"))


def _tls(place: RedisUrl) -> Callable[[], SSLContext] | None:
    """Return what makes the context of each encrypted connection, tried once; None without."""
    if not place.has_tls:
        return None
    make = partial(tls_context, place.options)
    make()
    return make


def _where(place: RedisUrl, tls: Callable[[], SSLContext] | None) -> dict[str, Any]:
    """Return what tells connections where to go."""
    if place.socket:
        return {"connection_class": UnixConnection, "path": place.socket}
    network: dict[str, Any] = {
        "connection_class": TcpConnection,
        "tls": tls,
        "socket_keepalive": True,
    }
    if not place.service:
        ((host, port),) = place.hosts
        return network | {"host": host, "port": port}

    def to_sentinel(sentinel: Host) -> TcpConnection:
        return TcpConnection(
            host=sentinel[0],
            port=sentinel[1],
            tls=tls,
            username=place.options.get("sentinel_username"),
            password=place.options.get("sentinel_password"),
            handshake_s=_SENTINEL_S,
            socket_timeout=_SENTINEL_S,
            socket_connect_timeout=_SENTINEL_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    return network | {"primary": PrimaryFinder(place.service, place.hosts, to_sentinel)}


def plain_redis_url(url: str) -> str:
    """Return ``url`` for programs that know no Sentinels: with the primary of now in their place.

    Raises:
        ConfigError, BrokerError: See :func:`connect`; the server has answered.
    """
    with connect(url) as redis:
        place = parse_redis_url(url)
        if not place.service:
            return url
        host, port = redis.connection_pool.connection_kwargs["primary"].address
    return at_host(place, (host, port))


def find_redis_url(settings: Settings) -> str:
    """Return the URL of the Redis to use: as set, else the one that `mixfleet up` runs.

    Raises:
        BrokerUnavailableError: None is set and none runs for this data directory.
    """
    url = settings.redis or running_url(settings.data_dir)
    if url is None:
        raise BrokerUnavailableError(
            f"no Redis is set and none runs for {settings.data_dir}: {HOW_TO_GET_ONE}"
        )
    return url
