"""Spans of a gateway, kept in memory by OpenTelemetry's own exporter."""

import asyncio
from collections.abc import Mapping

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.types import Message, Receive, Scope, Send

from mixfleet_broker.errors import QueueFullError
from mixfleet_broker.gateway.tracing import JobTracing, TracedRequests
from mixfleet_broker.gateway.watch import JobWatch
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    Requeued,
    RunStarted,
    TokenChunk,
    Usage,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
JOB = ChatJob(job_id="job1", model="tiny", prompt="x")
START = RunStarted(run=1, worker_id="w", num_tokens=0)
END = JobEnd(
    state="finished", finish_reason="stop", usage=Usage(prompt_tokens=7, completion_tokens=2)
)


class Traced:
    """A watch and an application that are traced into memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")
        self.watch = JobWatch([JobTracing(self.tracer)])
        self.seen_traceparent: str | None = None

    def spans(self) -> Mapping[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def serve(self, headers: dict[str, str], path: str = "/v1/chat", status: int = 200) -> None:
        async def app(scope: Scope, _receive: Receive, send: Send) -> None:
            self.seen_traceparent = scope.get("traceparent")
            self.watch.submitting(JOB, "key")
            await send({"type": "http.response.start", "status": status, "headers": []})

        async def send(_message: Message) -> None:
            pass

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
        asyncio.run(TracedRequests(app, tracer=self.tracer)(scope, receive, send))


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def own_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def test_a_request_its_wait_and_its_answer_are_one_trace() -> None:
    traced = Traced()
    traced.serve({"traceparent": f"00-{TRACE}-{SPAN}-01"})
    traced.watch.saw("job1", START)
    traced.watch.saw("job1", TokenChunk(num_tokens=1, text="a", token_ids=(1,)))
    traced.watch.saw("job1", Requeued(num_tokens=1, reason="lost"))
    traced.watch.saw("job1", RunStarted(run=2, worker_id="w2", num_tokens=1))
    traced.watch.saw("job1", END)
    spans = traced.spans()
    server, queue, answer = spans["POST"], spans["mixfleet.queue"], spans["chat tiny"]
    assert parent_id(server) == int(SPAN, 16)
    assert parent_id(queue) == parent_id(answer) == own_id(server)
    assert traced.seen_traceparent == f"00-{TRACE}-{own_id(server):016x}-01"
    assert answer.attributes is not None
    assert answer.attributes["gen_ai.request.model"] == "tiny"
    assert answer.attributes["gen_ai.usage.input_tokens"] == 7
    assert answer.attributes["gen_ai.usage.output_tokens"] == 2
    assert answer.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert [event.name for event in answer.events] == ["run", "first_token", "run"]
    assert queue.attributes is not None
    assert queue.attributes["messaging.system"] == "redis"


def test_a_bad_traceparent_begins_a_trace_of_our_own() -> None:
    traced = Traced()
    traced.serve({"traceparent": f"00-{'0' * 32}-{SPAN}-01"})
    assert parent_id(traced.spans()["POST"]) is None


def test_probes_leave_no_spans() -> None:
    traced = Traced()
    traced.serve({}, path="/metrics")
    assert "POST" not in traced.spans()


@pytest.mark.parametrize(("status", "code"), [(404, StatusCode.UNSET), (503, StatusCode.ERROR)])
def test_only_what_is_our_fault_is_an_error(status: int, code: StatusCode) -> None:
    traced = Traced()
    traced.serve({}, status=status)
    assert traced.spans()["POST"].status.status_code is code


def test_a_job_that_fails_while_it_waits_ends_its_wait_with_the_code() -> None:
    traced = Traced()
    traced.watch.submitting(JOB, "key")
    traced.watch.saw("job1", JobEnd(state="failed", code="deadline_exceeded"))
    (span,) = traced.spans().values()
    assert span.name == "mixfleet.queue"
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "deadline_exceeded"


def test_spans_of_refused_and_of_left_jobs_are_ended() -> None:
    refused, left = Traced(), Traced()
    refused.watch.submitting(JOB, "key")
    refused.watch.refused(JOB, QueueFullError(model="tiny", depth=1, limit=1))
    left.watch.submitting(JOB, "key")
    left.watch.saw("job1", START)
    left.watch.left("job1")
    assert set(refused.spans()) == {"mixfleet.queue"}
    assert set(left.spans()) == {"mixfleet.queue", "chat tiny"}
