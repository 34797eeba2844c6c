"""Connections that cannot be held open by saying little, nor fill memory by saying much."""

import asyncio
import json
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mixfleet_broker.gateway.api_errors import ApiError

NUM_CONNECTIONS: Final = "num_connections"
"""Where in a scope's state it says how many connections are open, its own among them."""
REQUEST_S: Final = 30.0
"""Longest time for a request to arrive whole, and for a new connection to say anything."""
MAX_HEADER_BYTES: Final = 64 * 1024
_LINGER_S: Final = 1.0
"""For how long what still comes is read and dropped: a reset would take our answer with it."""
_STATUS_LINES: Final = {
    400: b"HTTP/1.1 400 Bad Request",
    408: b"HTTP/1.1 408 Request Timeout",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
}


def _answer(error: ApiError) -> bytes:
    """Return a whole answer to what never became a request, and so has no dialect but OpenAI's."""
    body = json.dumps(error.openai_body()).encode()
    lines = [
        _STATUS_LINES[error.status],
        b"connection: close",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *(f"{name}: {value}".encode("latin-1") for name, value in error.headers().items()),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _invalid() -> ApiError:
    return ApiError(400, "these bytes are not HTTP", code="invalid_http")


def _timed_out() -> ApiError:
    text = f"the request was not whole within {REQUEST_S:g} s"
    return ApiError(408, text, code="request_timeout", details={"limit_s": REQUEST_S})


def _headers_too_large() -> ApiError:
    text = f"the first line and the headers have more than {MAX_HEADER_BYTES} bytes"
    return ApiError(431, text, code="headers_too_large", details={"limit": MAX_HEADER_BYTES})


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
                self._refuse(_headers_too_large())

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
            self._refuse(_headers_too_large())
            raise OverflowError("header fields too large")  # ends the parser's work
        self.scope["state"][NUM_CONNECTIONS] = len(self.connections)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._stop_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - ours is the same for all
        """Say that the bytes are no HTTP, unless the connection has had its answer."""
        self._refuse(_invalid())

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
            self._refuse(_timed_out())

    def _serves(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
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
        self.transport.write(_answer(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)
