"""Where AIME's interface is: paths that nothing else here has, of endpoints that are known.

Endpoints are called as their makers like, so they are looked up only after all other routes: no
model can take the place of a page of ours, and a path of nobody's is the usual 404.
"""

import json
from collections.abc import Awaitable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.gateway.aime import Aime, Body
from mixfleet_broker.gateway.aime_endpoints import Endpoint
from mixfleet_broker.gateway.aime_shapes import error_body
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error

_OF_ALL: Final = frozenset({"GET", "POST"})
_OF_NO_ENDPOINT: Final = (["api", "validate_key"], ["api", "endpoints"])


class AimeRoutes:
    """The last of all routes of an application whose ``state.aime`` is an :class:`Aime`.

    Args:
        otherwise: Answers what is not AIME's.
    """

    def __init__(self, otherwise: ASGIApp) -> None:
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        response = None
        if scope["type"] == "http":
            request = Request(scope, receive)
            response = await _response(request.app.state.aime, request)
        await (response or self._otherwise)(scope, receive, send)


def is_aime(path: str) -> bool:
    """Whether a path, unless a route of ours has it, would be AIME's if its endpoint is known."""
    parts = _parts(path)
    return parts in _OF_NO_ENDPOINT or bool(_name_and_action(parts)[0])


def _parts(path: str) -> list[str]:
    return path.strip("/").split("/")


async def _response(aime: Aime, request: Request) -> Response | None:
    """Return what a request is answered with; None where its path is not AIME's."""
    parts = _parts(request.scope["path"])
    if parts in _OF_NO_ENDPOINT:
        work = aime.validate_key if parts[1] == "validate_key" else aime.names
        return await _answered(None, _of_all(request, work))
    name, action = _name_and_action(parts)
    endpoint = await aime.find(name) if name else None
    if endpoint is None:
        return None
    return await _answered(endpoint, _of_endpoint(aime, request, endpoint, action))


def _name_and_action(parts: list[str]) -> tuple[str, str]:
    """Return the endpoint that a path would be of, and what is asked of it."""
    match parts:
        case [name]:
            return name, "submit"
        # The second is the older path, which AIME's published clients ask.
        case ["api", "endpoints", name] | ["api", name]:
            return name, "details"
        case [name, ("progress" | "login") as action]:
            return name, action
    return "", ""


async def _of_all(request: Request, work: Any) -> Body:
    _check_method(request, _OF_ALL)
    given, _ = await _parameters(request)
    body: Body = await work(request, given)
    return body


async def _of_endpoint(aime: Aime, request: Request, endpoint: Endpoint, action: str) -> Body:
    _check_method(request, frozenset(endpoint.methods) if action != "details" else _OF_ALL)
    given, as_text = await _parameters(request)
    if action == "submit":
        return await aime.submit(request, endpoint, given, as_text=as_text)
    if action == "progress":
        return await aime.progress(request, endpoint, given)
    if action == "login":
        return await aime.login(request, endpoint, given)
    return await aime.details(request, endpoint, given)


def _check_method(request: Request, methods: frozenset[str]) -> None:
    if request.method not in methods:
        allowed = ", ".join(sorted(methods))
        refusal = ApiError(405, f"{request.method}: must be {allowed}", code="http_405")
        raise refusal.with_headers({"allow": allowed})


async def _parameters(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the parameters of a request, and whether they came as texts, in its query."""
    raw = await request.body() if request.method == "POST" else b""
    if not raw:
        return dict(request.query_params), True
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"the body is no JSON: {str(error)[:100]}", code="invalid_json"
        ) from None
    if body is False or body is None:
        # AIME's JavaScript client asks if a key is good by a POST of `false`, with a query.
        return dict(request.query_params), True
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body, False


async def _answered(endpoint: Endpoint | None, work: Awaitable[Body]) -> Response:
    try:
        return _json(await work)
    except ApiError as error:
        refusal = error
    except MixfleetError as error:
        refusal = as_api_error(error)
    return _json(error_body(refusal, endpoint), refusal.status, refusal.headers())


def _json(body: Body, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII: a text that came in may hold what no encoding can write. Polls are never cached.
    shown = {"cache-control": "no-store", **(headers or {})}
    return Response(json.dumps(body), status, shown, media_type="application/json")
