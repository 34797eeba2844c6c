"""Bytes on a connection, as no HTTP client would send them."""

import socket
from dataclasses import dataclass

LIMIT_S = 15.0


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """All that came back until the other side closed the connection, or said nothing more."""

    data: bytes

    @property
    def statuses(self) -> list[int]:
        """Of each answer, in order."""
        heads = self.data.split(b"HTTP/1.")[1:]
        return [int(head[2:5]) for head in heads]

    @property
    def status(self) -> int:
        """Of the first; 0 when there was none."""
        return (self.statuses or [0])[0]

    @property
    def body(self) -> bytes:
        """Of the last."""
        return self.data.rpartition(b"\r\n\r\n")[2]


def exchange(port: int, *pieces: bytes) -> RawAnswer:
    """Send the pieces and read until the end; a request should ask for the connection's close."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:  # it has been closed on us, maybe with an answer
                break
        return RawAnswer(read_all(connection))


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    data = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A request whose answer ends the connection."""
    lines = [f"POST {path} HTTP/{version}", "host: localhost", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
