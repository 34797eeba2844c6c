"""Messages between two processes of one worker: four bytes of length, then the bytes."""

import socket
import struct
from typing import Final

_LENGTH: Final = struct.Struct(">I")


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Send one message.

    Raises:
        OSError: The other side is gone, or takes nothing for as long as the socket's timeout.
    """
    connection.sendall(_LENGTH.pack(len(data)))
    connection.sendall(data)


def receive_frame(connection: socket.socket) -> bytes:
    """Return the next message.

    Raises:
        EOFError: The other side is gone.
        OSError: The connection is broken, or silent for as long as the socket's timeout.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return _receive(connection, length)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, filled = memoryview(data), 0
    while filled < length:
        received = connection.recv_into(view[filled:])
        if received == 0:
            raise EOFError("the other process is gone")
        filled += received
    return bytes(data)
