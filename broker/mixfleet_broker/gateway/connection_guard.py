"""Connections that cannot be held open by saying little, nor fill memory by saying much."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_S: Final = 30.0
"""Longest time for a request to arrive whole, and for a new connection to say anything."""
MAX_HEADER_BYTES: Final = 64 * 1024
_LINGER_S: Final = 1.0
"""For how long what still comes is read and dropped: a reset would take our answer with it."""
_CLOSED: Final = b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TIMED_OUT: Final = b"HTTP/1.1 408 Request Timeout" + _CLOSED
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large" + _CLOSED


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's own protocol with a limit of time and of header bytes."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _unparsed_bytes = 0
    _in_headers = True
    _is_refused = False

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
        if self._is_refused:
            return
        super().data_received(data)
        if self._in_headers:
            # What the parser has not told us yet: one endless header, say.
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEADER_BYTES:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to count for a request."""
        self._header_bytes, self._unparsed_bytes, self._in_headers = 0, 0, True
        self._start_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a piece of the first line."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header."""
        self._header_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Count header bytes no more; a request with too many, in one piece, does not begin."""
        self._in_headers = False
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(_TOO_LARGE)
            raise OverflowError("header fields too large")  # ends the parser's work
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._stop_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with the bytes, unless the connection has had its answer."""
        if not self._is_refused:
            super().send_400_response(msg)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(REQUEST_S, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        serves = self._serves() and not self.cycle.more_body
        if serves or self.flow.read_paused:  # the next request may be slow while this one is served
            self._start_timer()
        else:
            self._refuse(_TIMED_OUT)

    def _serves(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def _refuse(self, answer: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._stop_timer()
        if self._serves():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:  # an answer in the middle of another is none
                self.transport.close()
                return
        self.transport.write(answer)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)
