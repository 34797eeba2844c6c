"""Spans of a gateway: one a request, and under it the wait and the answer of each job.

Needs OpenTelemetry; imported only where traces are switched on.
"""

from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, use_span
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixfleet_broker.gateway.watch import JobObserver, WatchedJob
from mixfleet_broker.traceparent import current_traceparent, valid_traceparent
from mixfleet_broker.tracing import context_of

_PROBES: Final = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Asked every few seconds, by machines: their spans would bury all others."""


class TracedRequests:
    """Wraps the application: a server span for each request, in the trace that its client names.

    Args:
        app: The application.
        tracer: Makes the spans.
    """

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"]}  # noqa: C416 - the last wins
        given = valid_traceparent(headers.get(b"traceparent", b"").decode("latin-1"))
        span = self._tracer.start_span(
            scope["method"],
            context=context_of(given),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": scope["path"][:200]},
        )

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                status: int = message["status"]
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        with use_span(span, end_on_exit=True):
            scope["traceparent"] = current_traceparent()
            await self._app(scope, receive, send_and_note)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                # The route and not the path: ids in names would make each name one of a kind.
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)


@dataclass(slots=True)
class _Spans:
    """What is open of one job."""

    request: Context
    queue: Span
    generation: Span | None = None


class JobTracing(JobObserver):
    """Makes the spans of jobs: ``mixfleet.queue`` from submit to the first run, then the answer's.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: dict[str, _Spans] = {}

    def submitting(self, job: WatchedJob) -> None:
        """Begin the wait."""
        span = self._tracer.start_span(
            "mixfleet.queue",
            kind=SpanKind.PRODUCER,
            attributes={
                "messaging.system": "redis",
                "messaging.operation.type": "send",
                "messaging.destination.name": job.model,
                "messaging.message.id": job.job_id,
            },
        )
        self._open[job.job_id] = _Spans(get_current(), span)

    def started(self, job: WatchedJob) -> None:
        """End the wait and begin the answer, or note that it goes on elsewhere."""
        spans = self._open.get(job.job_id)
        if spans is None:
            return
        if spans.generation is None:
            spans.queue.end()
            spans.generation = self._generation(job, spans.request)
        spans.generation.add_event("run", {"worker_id": job.worker_id, "number": job.num_runs})

    def tokens(self, job: WatchedJob, num_new: int, since_s: float | None) -> None:  # noqa: ARG002
        """Note the first token."""
        if since_s is None:
            spans = self._open.get(job.job_id)
            if spans is not None and spans.generation is not None:
                spans.generation.add_event("first_token")

    def ended(self, job: WatchedJob) -> None:
        """End the answer, with its counts and its reason."""
        spans = self._open.pop(job.job_id, None)
        if spans is None or job.end is None:
            return
        end, span = job.end, spans.generation or spans.queue
        usage = end.usage
        prompt = usage.prompt_tokens if usage is not None else job.num_prompt_tokens
        span.set_attribute("gen_ai.usage.input_tokens", prompt or 0)
        span.set_attribute(
            "gen_ai.usage.output_tokens",
            usage.completion_tokens if usage is not None else job.num_tokens,
        )
        span.set_attribute("gen_ai.response.finish_reasons", [end.finish_reason or end.state])
        if end.state == "failed":
            span.set_attribute("error.type", end.code or "failed")
            span.set_status(StatusCode.ERROR)
        span.end()

    def dropped(self, job: WatchedJob, reason: str) -> None:
        """End what is open of a job that is not followed any more."""
        spans = self._open.pop(job.job_id, None)
        if spans is not None:
            span = spans.generation or spans.queue
            span.set_attribute("mixfleet.dropped", reason)
            span.end()

    def _generation(self, job: WatchedJob, request: Context) -> Span:
        """Begin the answer's span, beside the wait and under the same request."""
        return self._tracer.start_span(
            f"chat {job.model}",
            context=request,
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": job.model,
                "mixfleet.job_id": job.job_id,
            },
        )
