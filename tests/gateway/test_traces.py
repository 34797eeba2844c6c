"""A trace from the caller's span through gateway and worker, by real processes."""

import json
import re
from pathlib import Path

import pytest
import requests
from opentelemetry.sdk.trace import TracerProvider

from mixfleet import Client
from support.gateway import GatewayProcess
from support.worker_process import WorkerProcess

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("redis")]

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
BODY = {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "hello"}]}
SIMULATED = ("--simulated", "--simulated-step-s", "0", "--model", "tiny")


def chat(gateway: GatewayProcess, **headers: str) -> str:
    answer = requests.post(
        f"{gateway.url}/v1/chat/completions", json=BODY, headers=HEADERS | headers, timeout=30
    )
    answer.raise_for_status()
    return answer.headers["x-job-id"]


def names_in_trace(log: str, trace: str = TRACE) -> set[str]:
    """Names of the spans that a process has printed, of one trace."""
    found = set()
    for text in re.findall(r"^\{$.*?^\}$", log, re.MULTILINE | re.DOTALL):
        span = json.loads(text)
        if span["context"]["trace_id"] == f"0x{trace}":
            found.add(span["name"])
    return found


def ended(worker: WorkerProcess) -> str:
    """The log of a worker that was told to end, with all spans."""
    worker.terminate()
    assert worker.exit_status() == 0
    return worker.log


def test_one_trace_goes_from_the_caller_through_gateway_and_worker(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    with WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED) as worker:
        with GatewayProcess(redis_url, tmp_path) as gateway:
            chat(gateway)
            gateway.process.terminate()
            gateway.process.wait(timeout=20)
        expected = {"POST /v1/chat/completions", "mixfleet.queue", "chat tiny"}
        assert names_in_trace(gateway.log) == expected
        assert names_in_trace(ended(worker)) == {"process tiny"}


def test_a_gateway_that_does_not_trace_hands_the_callers_trace_on(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GatewayProcess(redis_url, tmp_path) as gateway:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
        with WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED) as worker:
            chat(gateway)
            assert names_in_trace(ended(worker)) == {"process tiny"}


def test_a_retry_in_another_span_is_the_same_job(redis_url: str, tmp_path: Path) -> None:
    worker = WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED)
    with worker, GatewayProcess(redis_url, tmp_path) as gateway:
        key = {"idempotency-key": "once"}
        first = chat(gateway, **key)
        assert chat(gateway, **key, traceparent=f"00-{'1' * 32}-{SPAN}-01") == first


def test_a_client_hands_on_the_span_that_it_is_in(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    tracer = TracerProvider().get_tracer("test")
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED) as worker,
        Client(redis_url) as client,
    ):
        with tracer.start_as_current_span("caller") as span:
            client.chat("hello", max_tokens=3).result()
        trace = f"{span.get_span_context().trace_id:032x}"
        assert names_in_trace(ended(worker), trace) == {"process tiny"}
