"""Connections that cannot be held open by saying little, nor fill memory by saying much."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_S: Final = 30.0
"""Longest time for a request to arrive whole, and for a new connection to say anything."""
MAX_HEADER_BYTES: Final = 64 * 1024
_CLOSED: Final = b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TIMED_OUT: Final = b"HTTP/1.1 408 Request Timeout" + _CLOSED
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large" + _CLOSED


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's own protocol with a limit of time and of header bytes."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = True

    def connection_made(self, transport: Any) -> None:
        """Begin to count the time until the first request is whole."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count no more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came; too much of it without an end of the headers is refused."""
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to count for a request."""
        self._header_bytes, self._in_headers = 0, True
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Count header bytes no more."""
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._stop_timer()
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(REQUEST_S, self._refuse, _TIMED_OUT)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
