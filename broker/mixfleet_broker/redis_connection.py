"""Single connections to Redis: what they do beyond redis-py's own.

A reply that the server cannot serve now drops the connection and counts as no answer. A new
connection must answer soon, however long its commands may block later. A TCP connection may be
encrypted, and may ask Sentinels where to go each time that it connects.
"""

import socket
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from redis.connection import AbstractConnection, Connection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mixfleet_broker.redis_errors import NotReadyError, is_passing
from mixfleet_broker.redis_url import Host


class Primary(Protocol):
    """Knows where the primary is."""

    @property
    def address(self) -> Host | None:
        """Where it was found last, by any connection of the client."""
        ...

    def find(self) -> Host:
        """Ask where it is now; raises a redis-py ConnectionError when nobody knows."""
        ...


class _Connection(AbstractConnection):
    """Shared by both kinds.

    Args:
        handshake_s: Longest wait for a reply while the connection is new.
        options: redis-py's.
    """

    def __init__(self, *, handshake_s: float, **options: Any) -> None:
        super().__init__(**{"redis_connect_func": _greet} | options)
        self.handshake_s = handshake_s

    def connect(self) -> None:
        """Connect, and repeat all of it with patience: redis-py before 5.3 repeats only a part."""
        self.retry.call_with_retry(super().connect, self.disconnect)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next reply.

        Raises:
            NotReadyError: The server cannot serve now. The connection is closed: the next one
                may find another server, or the same one well.
        """
        try:
            return super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not is_passing(error):
                raise
            self.disconnect()
            raise NotReadyError(str(error)) from error

    def limit_replies(self, seconds: float | None) -> None:
        """Set the longest wait for a reply; None: for ever."""
        sock: socket.socket | None = self._sock
        if sock is not None:
            sock.settimeout(seconds)

    def greet(self) -> None:
        """See that the server serves."""
        self.send_command("PING", check_health=False)
        self.read_response()


def _greet(connection: Any) -> None:
    """Authenticate and select the database, as redis-py does, and see that the server serves."""
    connection.limit_replies(connection.handshake_s)
    connection.on_connect()
    connection.greet()
    connection.limit_replies(connection.socket_timeout)


class UnixConnection(_Connection, UnixDomainSocketConnection):
    """A connection to a socket of this machine."""


class TcpConnection(_Connection, Connection):
    """A connection over the network.

    Args:
        tls: Makes the context of an encrypted connection, anew each time, so that renewed
            certificates are read; None: not encrypted.
        primary: Asked for the address; None: always the one given.
        options: See :class:`_Connection`.
    """

    def __init__(
        self,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        primary: Primary | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._tls = tls
        self._primary = primary

    def _connect(self) -> socket.socket:
        """Return a new socket; redis-py calls this wherever it connects."""
        context = None if self._tls is None else _fresh(self._tls)
        if self._primary is not None:
            self.host, self.port = self._primary.find()
        plain: socket.socket = super()._connect()  # type: ignore[no-untyped-call]
        return plain if context is None else self._encrypted(plain, context)

    def _encrypted(self, plain: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain.settimeout(self.handshake_s)
        try:
            return context.wrap_socket(plain, server_hostname=self.host)
        except TimeoutError as error:
            plain.close()
            text = f"{self.host}:{self.port} does not answer the TLS handshake: does it speak TLS?"
            raise RedisTimeoutError(text) from error
        except BaseException:
            plain.close()
            raise

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command, but never to a server that another connection knows is replaced."""
        if self._primary is not None and self._primary.address not in (None, self._peer):
            self.disconnect()
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]

    @property
    def _peer(self) -> Host:
        return self.host, self.port

    def greet(self) -> None:
        """See that the server serves, and as a primary if that is what was asked for."""
        if self._primary is None:
            super().greet()
            return
        # Of all commands that tell the role only HELLO is allowed to every user.
        self.send_command("HELLO", check_health=False)
        try:
            reply = [_text(part) for part in self.read_response()]
        except ResponseError:  # renamed: a write will tell
            return
        role = dict(zip(reply[::2], reply[1::2], strict=False)).get("role")
        if role != "master":
            raise NotReadyError(f"{self.host}:{self.port} is a {role}, not yet the primary")


def _fresh(tls: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    try:
        return tls()
    except (ValueError, OSError) as error:  # files that are being replaced may be back soon
        raise RedisConnectionError(str(error)) from error


def _text(part: object) -> object:
    return part.decode(errors="replace") if isinstance(part, bytes) else part
