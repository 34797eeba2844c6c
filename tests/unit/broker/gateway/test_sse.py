import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.sse import EventStream

Message = MutableMapping[str, Any]


class Connection:
    """The server's side of one request; the client may go away, or the wire break."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._breaks_after = breaks_after

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._breaks_after is not None and len(self.sent) >= self._breaks_after:
            raise OSError("broken")
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Pieces:
    """A body that notes how it was left."""

    def __init__(self, number: int, *, then_waits: bool = False) -> None:
        self.was_closed = False
        self.all_sent = asyncio.Event()
        self._number = number
        self._then_waits = then_waits

    async def iterate(self) -> AsyncIterator[bytes]:
        try:
            for number in range(self._number):
                yield sse.data({"n": number})
            self.all_sent.set()
            if self._then_waits:
                await asyncio.Event().wait()
        finally:
            self.was_closed = True


def test_an_event_is_one_line_of_json_whatever_the_text() -> None:
    event = sse.data({"text": "a\n\ndata: b\r é \u2028"}, "delta")
    head, _, rest = event.partition(b"\n")
    assert head == b"event: delta"
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"\n\n")
    assert rest.count(b"\n") == 2
    assert b"\r" not in rest
    assert json.loads(rest[6:])["text"] == "a\n\ndata: b\r é \u2028"


def test_a_lone_surrogate_does_not_end_a_stream() -> None:
    assert json.loads(sse.data({"text": "a\ud800b"})[6:].decode()) == {"text": "a\ud800b"}


def test_a_comment_is_no_event() -> None:
    assert sse.comment("queued position=3") == b": queued position=3\n\n"


def test_a_whole_stream_is_sent_piece_by_piece_and_closed() -> None:
    async def scenario() -> None:
        connection, pieces = Connection(), Pieces(3)
        response = EventStream(pieces.iterate(), {"x-job-id": "j"})
        await response({"type": "http"}, connection.receive, connection.send)
        start, *parts, last = connection.sent
        headers = dict(start["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"x-accel-buffering"] == b"no"
        assert headers[b"x-job-id"] == b"j"
        assert [part["body"] for part in parts] == [sse.data({"n": n}) for n in range(3)]
        assert all(part["more_body"] for part in parts)
        assert last["more_body"] is False
        assert pieces.was_closed

    asyncio.run(scenario())


def test_a_client_that_goes_away_closes_the_body_at_once() -> None:
    async def scenario() -> None:
        connection, pieces = Connection(), Pieces(2, then_waits=True)
        response = EventStream(pieces.iterate())
        sending = asyncio.create_task(response({}, connection.receive, connection.send))
        await pieces.all_sent.wait()
        connection.gone.set()
        await asyncio.wait_for(sending, 5.0)
        assert pieces.was_closed
        assert connection.sent[-1]["more_body"] is True  # nobody hears an end

    asyncio.run(scenario())


def test_a_server_that_stops_is_not_taken_for_a_client_that_left() -> None:
    async def scenario() -> None:
        connection, pieces = Connection(), Pieces(1, then_waits=True)
        response = EventStream(pieces.iterate())
        sending = asyncio.create_task(response({}, connection.receive, connection.send))
        await pieces.all_sent.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert pieces.was_closed

    asyncio.run(scenario())


def test_a_wire_that_breaks_closes_the_body() -> None:
    async def scenario() -> None:
        connection, pieces = Connection(breaks_after=2), Pieces(5)
        await EventStream(pieces.iterate())({}, connection.receive, connection.send)
        assert connection.body == sse.data({"n": 0})
        assert pieces.was_closed

    asyncio.run(scenario())


@pytest.mark.parametrize("breaks_after", [0, 2, None])
def test_the_end_is_told_even_of_a_body_that_was_never_begun(breaks_after: int | None) -> None:
    left: list[bool] = []

    async def leave() -> None:
        left.append(True)

    async def scenario() -> None:
        connection, pieces = Connection(breaks_after), Pieces(3)
        response = EventStream(pieces.iterate(), leave=leave)
        await response({}, connection.receive, connection.send)
        assert pieces.was_closed == (breaks_after != 0)

    asyncio.run(scenario())
    assert left == [True]
