"""Where an embedded server listens: a socket in its directory, or a port of this machine alone."""

import secrets
import socket
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from mixfleet_broker.redis_url import unix_socket_url
from mixfleet_broker.server_directory import ServerDirectory

_LOOPBACK: Final = "127.0.0.1"
_PASSWORD_BYTES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """A socket, which its directory's mode protects, or a port with a password."""

    url: str = field(repr=False)
    """Holds the password when there is one."""
    port: int = 0
    """0: the socket alone."""
    password: str = field(default="", repr=False)


def choose_address(directory: ServerDirectory) -> ServerAddress:
    """Return where the next server of ``directory`` is to listen.

    A socket where its path is short enough; else the port and password of the last server if it
    was killed and the port is free, so that its clients find the next one; else new ones.
    """
    if directory.socket is not None:
        return ServerAddress(url=unix_socket_url(str(directory.socket)))
    last = directory.read_state()
    parts = urlsplit(last.url) if last is not None else None
    if parts is not None and parts.port and parts.password and _is_free(parts.port):
        port, password = parts.port, parts.password
    else:
        port, password = _free_port(), secrets.token_urlsafe(_PASSWORD_BYTES)
    url = f"redis://:{password}@{_LOOPBACK}:{port}/0"
    return ServerAddress(url=url, port=port, password=password)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server does: connections of its predecessor may still linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True
