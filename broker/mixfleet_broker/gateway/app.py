"""The gateway's application: its parts, its routes, and the dialect of every error."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.gateway import (
    anthropic_messages,
    batches,
    files,
    health,
    jobs,
    metrics,
    openai_chat,
    openai_completions,
    openai_models,
    responses,
    sse,
    tokens,
)
from mixfleet_broker.gateway.aime import Aime
from mixfleet_broker.gateway.aime_files import check_names, read_endpoints
from mixfleet_broker.gateway.aime_routes import AimeRoutes, is_aime
from mixfleet_broker.gateway.aime_shapes import error_body as aime_body
from mixfleet_broker.gateway.anthropic_errors import anthropic_body, is_anthropic
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error, error_of_values
from mixfleet_broker.gateway.batch_runner import BatchRunner
from mixfleet_broker.gateway.caller import Gatekeeper, is_loopback
from mixfleet_broker.gateway.fleet import Fleet
from mixfleet_broker.gateway.guard import REQUEST_ID, ErrorBody, Guard
from mixfleet_broker.gateway.responses_reading import Followers
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.gateway.watch import JobObserver, JobWatch
from mixfleet_broker.settings import Settings
from mixfleet_broker.tracing import SCOPE, traces_if_wanted

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """Return the application; it connects to Redis when it is started.

    Raises:
        ConfigError: An endpoint file of AIME's form cannot be used.
    """
    described = read_endpoints(settings.aime_endpoints) if settings.aime_endpoints else None
    traces = traces_if_wanted("mixfleet-gateway")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        fleet = Fleet(settings)
        gate = Gatekeeper(fleet, settings)
        app.state.metrics = metrics.Metrics(vllm_aliases=settings.vllm_metric_aliases)
        watch = JobWatch([gate, app.state.metrics.jobs, *_job_tracing(traces)])
        service = Service(settings=settings, fleet=fleet, gate=gate, watch=watch)
        app.state.service = service
        app.state.aime = Aime(service, described)
        app.state.followers = Followers()
        app.state.batches = BatchRunner(service)
        try:
            yield
        finally:
            await app.state.batches.close()
            await app.state.aime.close()
            await app.state.followers.close()
            await fleet.close()
            if traces is not None:  # the process may end by a signal, which leaves no later time
                await asyncio.to_thread(traces.shutdown)

    app = FastAPI(
        title="mixfleet",
        version=version("mixfleet"),
        summary="Chat from Mixtral models, by a fleet of workers behind a queue.",
        lifespan=lifespan,
    )
    app.include_router(openai_chat.router)
    app.include_router(openai_completions.router)
    app.include_router(tokens.router)
    app.include_router(openai_models.router)
    app.include_router(responses.router)
    app.include_router(files.router)
    app.include_router(batches.router)
    app.include_router(anthropic_messages.router)
    app.include_router(jobs.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    check_names(described or (), partial(_is_taken, app))
    app.router.default = AimeRoutes(app.router.default)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(MixfleetError, _on_mixfleet_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "x-job-id", "retry-after"],
        )
    app.add_middleware(
        Guard,
        max_body_bytes=settings.max_body_bytes,
        larger=files.body_limits(settings),
        is_local=is_loopback(settings.listen) and not settings.require_key,
        web_origins=(settings.cors_origins or "").split(","),
        max_connections=settings.max_connections,
        error_body=partial(_early_error_body, app),
    )
    _trace_requests(app, traces)
    return app


def _is_taken(app: FastAPI, path: str) -> bool:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
    return any(route.matches(scope)[0] != Match.NONE for route in app.router.routes)


def _trace_requests(app: FastAPI, traces: "TracerProvider | None") -> None:
    if traces is not None:
        # Imported here, as below: OpenTelemetry need not be installed.
        from mixfleet_broker.gateway.tracing import TracedRequests

        app.add_middleware(TracedRequests, tracer=traces.get_tracer(SCOPE))


def _job_tracing(traces: "TracerProvider | None") -> list[JobObserver]:
    if traces is None:
        return []
    from mixfleet_broker.gateway.tracing import JobTracing

    return [JobTracing(traces.get_tracer(SCOPE))]


def error_body(path: str) -> ErrorBody:
    """Return how errors look to the clients of a path."""
    return anthropic_body if is_anthropic(path) else _openai_body


def _early_error_body(app: FastAPI, path: str) -> ErrorBody:
    """Return how errors look that come before all routes, which know AIME's endpoints by name."""
    if is_aime(path) and not _is_taken(app, path):
        return _aime_body
    return error_body(path)


def _aime_body(error: ApiError, _request_id: str) -> dict[str, Any]:
    return aime_body(error, None)


def _openai_body(error: ApiError, _request_id: str) -> dict[str, Any]:
    return error.openai_body()


def _answered(request: Request, error: ApiError) -> Response:
    # The path as it is: a strange Host header makes `request.url` raise. Its bytes may be anything.
    body = error_body(request.scope["path"])(error, request.scope.get("request_id", ""))
    raw = sse.dumps(body).encode(errors="backslashreplace")
    return Response(raw, error.status, error.headers(), media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answered(request, error)


async def _on_mixfleet_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MixfleetError)
    return _answered(request, as_api_error(error))


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    where = [part for part in first["loc"] if part != "body"]
    return _answered(request, error_of_values([{**first, "loc": where}, *others]))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # raised while FastAPI read the body: too large
        return _answered(request, error.__cause__)
    text = str(error.detail)
    if error.status_code == 404:
        text = f"no such route: {request.method} {request.scope['path'][:200]}"
    refusal = ApiError(error.status_code, text, code=f"http_{error.status_code}")
    return _answered(request, refusal.with_headers(dict(error.headers or {})))
