"""TLS in front of a real server, and certificates for it: many server programs lack their own."""

import select
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import trustme

_READ_BYTES = 1 << 16


class Certificates:
    """A certificate authority of a test, and what it signed, as files in ``directory``."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._authority = trustme.CA(organization_name=name)
        self._directory = directory / name
        self._directory.mkdir()
        self.ca_file = self._directory / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca_file)
        self.client_file = self._directory / "client.pem"
        client = self._authority.issue_cert("client@mixfleet.example")
        client.private_key_and_cert_chain_pem.write_to_path(self.client_file)

    def server_context(self, host: str = "127.0.0.1") -> ssl.SSLContext:
        """How a server called ``host`` speaks TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host).configure_cert(context)
        return context

    def demand_of_clients(self, context: ssl.SSLContext) -> None:
        """Let a server take only clients that this authority has signed."""
        self._authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED


class TlsProxy:
    """Listens on a loopback port, speaks TLS there and plainly to ``target``.

    With threads and blocking sockets: asyncio hangs up on a client that it refuses without the
    alert that says why, which a real server sends.

    Args:
        target: ``unix:///path`` or ``redis://host:port``.
        context: Its certificate and what it asks of clients.
        port: Where to listen; 0: anywhere.
    """

    def __init__(self, target: str, context: ssl.SSLContext, *, port: int = 0) -> None:
        self._target = urlsplit(target)
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", port))
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for end in (self._listener, *self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in (self._listener, *self._open):
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is shut down at the end
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with (
            suppress(OSError),  # a refused handshake; an end that is gone
            self._context.wrap_socket(client, server_side=True) as tls,
            self._dial() as server,
        ):
            self._open += [tls, server]
            _relay(tls, server)

    def _dial(self) -> socket.socket:
        if self._target.scheme != "unix":
            return socket.create_connection((self._target.hostname or "", self._target.port or 0))
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target.path)
        return server


def _relay(tls: ssl.SSLSocket, server: socket.socket) -> None:
    other = {tls: server, server: tls}
    while True:
        ready = [tls] if tls.pending() else select.select([tls, server], [], [])[0]
        for end in ready:
            data = end.recv(_READ_BYTES)
            if not data:
                return
            other[end].sendall(data)
