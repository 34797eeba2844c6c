"""Server-sent events: pushed as they come, through proxies that would rather hold them back."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # nginx passes each chunk on
}


def data(value: Any, event: str = "") -> bytes:
    """Return one event whose data is JSON."""
    name = f"event: {event}\n" if event else ""
    # Half a surrogate pair becomes its JSON escape; nothing else needs one.
    return f"{name}data: {dumps(value)}\n\n".encode(errors="backslashreplace")


def comment(text: str) -> bytes:
    """Return a comment, which clients skip and people who look at the wire read."""
    return f": {text}\n\n".encode()


def dumps(value: Any) -> str:
    """Return compact JSON; text stays readable."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class EventStream(Response):
    """A response whose body comes piece by piece.

    Args:
        body: The pieces; closed when the client goes away, or at the end.
        headers: Beside those that all streams have.
        leave: Called at the end in any case, also where the body was never begun.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        headers: Mapping[str, str] | None = None,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._body = body
        self._leave = leave
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send everything; stop at once when the client goes away."""
        sending = asyncio.current_task()
        assert sending is not None
        watching = asyncio.create_task(_cancel_when_gone(receive, sending))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._body:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not watching.done() or watching.cancelled():
                raise  # the server stops
            sending.uncancel()
        except OSError:
            pass  # the connection broke while a piece was sent
        finally:
            watching.cancel()
            close = getattr(self._body, "aclose", None)
            if close is not None:
                await close()
            if self._leave is not None:
                await self._leave()


async def _cancel_when_gone(receive: Receive, sending: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    sending.cancel()
