"""A span for each run that ended its job here, in the trace of whoever sent the job."""

import time
from collections.abc import Callable
from typing import Any, Final

from mixfleet_broker.tracing import SCOPE, context_of, traces_if_wanted
from mixfleet_worker.handoff import EndWrite

_NS: Final = 1_000_000_000

OnEnd = Callable[[EndWrite], None]


def run_traces(model: str, worker_id: str) -> OnEnd | None:
    """Return what is to be told of ends; None unless traces are switched on."""
    traces = traces_if_wanted("mixfleet-worker")
    return None if traces is None else span_maker(traces.get_tracer(SCOPE), model, worker_id)


def span_maker(tracer: Any, model: str, worker_id: str) -> OnEnd:
    """Return a function that makes the span of a run, once it is over.

    Args:
        tracer: OpenTelemetry's.
        model: That is served.
        worker_id: Who serves it.
    """
    from opentelemetry.trace import SpanKind, StatusCode

    def ended(write: EndWrite) -> None:
        times, end = write.times, write.end
        offset = time.time_ns() - round(time.monotonic() * _NS)
        span = tracer.start_span(
            f"process {model}",
            context=context_of(times.traceparent),
            kind=SpanKind.CONSUMER,
            start_time=offset + round(times.claimed_at * _NS),
            attributes={
                "messaging.system": "redis",
                "messaging.operation.type": "process",
                "messaging.destination.name": model,
                "messaging.message.id": write.lease.job_id,
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
                "gen_ai.response.finish_reasons": [end.finish_reason or end.state],
                "mixfleet.worker_id": worker_id,
                "mixfleet.run": write.lease.run,
            },
        )
        if end.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", end.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", end.usage.completion_tokens)
        if times.first_token_at is not None:
            span.add_event("first_token", timestamp=offset + round(times.first_token_at * _NS))
        if end.state == "failed":
            span.set_attribute("error.type", end.code or "failed")
            span.set_status(StatusCode.ERROR)
        span.end(end_time=offset + round(times.ended_at * _NS))

    return ended
