"""The gate before all routes: request ids, hosts, sizes, and an answer to whatever went wrong.

A plain ASGI layer: it costs streams nothing.
"""

import json
import logging
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.gateway.api_errors import OVERLOADED, SERVER, ApiError, as_api_error
from mixfleet_broker.gateway.connection_guard import NUM_CONNECTIONS

logger = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
ANTHROPIC_REQUEST_ID: Final = "request-id"
"""The same, by the name under which Anthropic's clients look for it."""
CROWDED_S: Final = 1.0
"""When whoever came to a full gateway may come again."""
_GOOD_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "[::1]", "testserver"})

ErrorBody = Callable[[ApiError, str], dict[str, Any]]
"""From an error and the request's id to the body that a dialect's clients read."""


class Guard:
    """Wraps the application.

    Args:
        app: The application.
        max_body_bytes: Of a request.
        larger: Limits of paths that have one of their own.
        max_connections: At the same time, as far as the server counts them.
        is_local: Only this machine is served, and without keys: a web page that talked its
            browser into calling us, under another host's name, is refused.
        web_origins: Web sites whose pages may call us all the same; ``*`` is all of them.
        error_body: The dialect of a path.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        larger: Mapping[str, int] | None = None,
        max_connections: int,
        is_local: bool,
        web_origins: Collection[str] = (),
        error_body: Callable[[str], ErrorBody],
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._larger = dict(larger or {})
        self._max_connections = max_connections
        self._is_local = is_local
        self._web_origins = frozenset(web_origins)
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(REQUEST_ID.encode(), b""))
        scope["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                for name in (REQUEST_ID, ANTHROPIC_REQUEST_ID):
                    MutableHeaders(scope=message).append(name, request_id)
            await send(message)

        try:
            self._check_crowd(scope.get("state", {}).get(NUM_CONNECTIONS, 0))
            limit = self._larger.get(scope["path"], self._max_body_bytes)
            self._check(headers, limit)
            await self._app(scope, _limited(receive, limit), send_with_id)
        except Exception as error:
            if begun:
                raise
            refusal = _as_refusal(error, request_id)
            body = self._error_body(scope["path"])(refusal, request_id)
            await _answer(refusal, body, send_with_id)

    def _check_crowd(self, num_connections: int) -> None:
        if num_connections <= self._max_connections:
            return
        raise ApiError(
            503,
            f"{num_connections} connections are open, the limit is {self._max_connections}",
            kind=OVERLOADED,
            code="too_many_connections",
            details={"connections": num_connections, "limit": self._max_connections},
            retryable=True,
            retry_after_s=CROWDED_S,
        ).with_headers({"connection": "close"})

    def _check(self, headers: dict[bytes, bytes], limit: int) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(length.decode("latin-1")[:20], limit)
        if not self._is_local:
            return
        host = headers.get(b"host", b"localhost").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in _LOCAL_HOSTS or self._is_from_elsewhere(headers):
            raise ApiError(
                403,
                f"a gateway without keys serves this machine alone, not {host[:80]!r}",
                kind="permission_error",
                code="host_not_allowed",
            )

    def _is_from_elsewhere(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a browser says that another site's page asks, and that site may not."""
        if headers.get(b"sec-fetch-site") != b"cross-site":
            return False
        origin = headers.get(b"origin", b"").decode("latin-1")
        return "*" not in self._web_origins and origin not in self._web_origins


def _limited(receive: Receive, limit: int) -> Receive:
    num_bytes = 0

    async def receive_limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        if message["type"] == "http.request":
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(f"more than {limit}", limit)
        return message

    return receive_limited


def _too_large(length: str, limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {length} bytes, the limit is {limit}",
        code="body_too_large",
        details={"limit": limit},
    )


def _request_id(given: bytes) -> str:
    """Return the client's own id of a request if it can stand in a header, else a new one."""
    text = given.decode("latin-1")
    return text if _GOOD_REQUEST_ID.fullmatch(text) else f"req_{secrets.token_hex(12)}"


def _as_refusal(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MixfleetError):
        return as_api_error(error)
    logger.error("request_failed request_id=%s", request_id, exc_info=error)
    return ApiError(
        500, f"an error of the gateway, see its log: {request_id}", kind=SERVER, code="internal"
    )


async def _answer(refusal: ApiError, body: dict[str, Any], send: Send) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode(errors="backslashreplace")
    headers = {
        "content-type": "application/json",
        "content-length": str(len(raw)),
        **refusal.headers(),
    }
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": raw})
